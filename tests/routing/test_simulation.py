"""The short form of `python -m bench.routing`: the goals of choice and of conduct hold, and one seed gives one result."""

from __future__ import annotations

from xml.etree import ElementTree

from bench.routing import measure, table
from bench.routing_plot import plot
from bench.routing_policies import Ours
from bench.routing_world import run, scenarios
from gateway.routing.scorer import Weights

NAMES = ("steady", "brown-out", "newcomer")


def test_the_goals_hold_in_the_short_form() -> None:
    result = measure(2, [scenario for scenario in scenarios() if scenario.name in NAMES])
    missed = [goal.name for goal in result.goals if not goal.holds]
    assert not missed, table(result)
    assert set(result.regret) == set(NAMES)


def test_one_seed_gives_one_result() -> None:
    scenario = scenarios()[1]
    runs = [run(scenario, Ours, 3, Weights()) for _ in range(2)]
    assert runs[0].chosen == runs[1].chosen
    assert runs[0].loss == runs[1].loss
    assert run(scenario, Ours, 4, Weights()).loss != runs[0].loss


def test_the_plot_is_a_drawing_with_a_bar_a_policy() -> None:
    drawing = ElementTree.fromstring(
        plot({"steady & co": {"ours": (0.02, 0.01), "random": (0.4, 0.1)}, "liar": {"ours": (0.03, 0.0), "random": (9.0, 0.0)}})
    )
    assert len(drawing.findall("{http://www.w3.org/2000/svg}rect")) == 1 + 4 + 2
