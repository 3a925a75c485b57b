"""How good choices are, against an oracle: regret of ours and of simple policies over eight scenarios, in virtual time.

    python -m bench.routing [--seeds 20] [--out bench/results]

The loss of a request is price / cheapest + first-token time / shortest + (tokens / rate) / shortest, weighted as `[routing]`
says so that 1 is best in everything; a failure is 10. The oracle picks by the true means of the moment. Regret is loss / oracle's - 1.
All policies meet the same arrivals and the same noise. Prints a table, writes routing.json and routing.svg; exits 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import msgspec

from bench.machine import Machine, describe_machine
from bench.routing_plot import plot
from bench.routing_policies import POLICIES, SIMPLE
from bench.routing_world import DURATION_S, Run, Scenario, run, scenarios, share_of
from gateway.routing.scorer import Weights
from gateway.settings import Routing

REGRET_MAX = 0.05
BEHIND_MAX = 0.02
OFF_S_MAX = 2.0
FLIPS_PER_MIN_MAX = 1.0
BACK_S_MAX = 60.0
WARM_UP_S = 30.0
T95 = {1: 0.0, 2: 12.7, 3: 4.3, 4: 3.18, 5: 2.78, 10: 2.26, 20: 2.09}  # Student's t by number of seeds


class Regret(msgspec.Struct, frozen=True):
    """Mean over seeds, and half the width of its 95 % interval; both are shares."""

    mean: float
    half_width: float
    failures: float  # per run


class Goal(msgspec.Struct, frozen=True):
    name: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.value <= self.limit


class Result(msgspec.Struct, frozen=True):
    seeds: int
    weights: Weights
    regret: dict[str, dict[str, Regret]]  # scenario -> policy
    goals: list[Goal]
    took_s: float
    machine: Machine | None = None


def measure(seeds: int, worlds: Sequence[Scenario] | None = None) -> Result:
    """All policies through these scenarios (default: all eight)."""
    began = time.perf_counter()
    settings = Routing()
    weights = Weights(settings.price_weight, settings.latency_weight, settings.throughput_weight)
    regret: dict[str, dict[str, Regret]] = {}
    ours: dict[str, tuple[Scenario, list[Run]]] = {}
    for scenario in worlds or scenarios():
        runs = {name: [run(scenario, make, seed, weights) for seed in range(seeds)] for name, make in POLICIES.items()}
        best = [each.loss for each in runs["oracle"]]
        regret[scenario.name] = {name: _regret(each, best) for name, each in runs.items()}
        ours[scenario.name] = (scenario, runs["ours"])
    return Result(seeds, weights, regret, [*_regret_goals(regret), *_conduct_goals(ours)], round(time.perf_counter() - began, 1))


def _regret(runs: Sequence[Run], best: Sequence[float]) -> Regret:
    values = [each.loss / oracle - 1 for each, oracle in zip(runs, best, strict=True)]
    factor = T95.get(len(values), 2.0)
    return Regret(
        mean(values),
        factor * stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0,
        mean(each.failures for each in runs),
    )


def _regret_goals(regret: dict[str, dict[str, Regret]]) -> list[Goal]:
    behind = max(row["ours"].mean - min(row[name].mean for name in SIMPLE) for row in regret.values())
    return [
        Goal("regret, averaged over scenarios", mean(row["ours"].mean for row in regret.values()), REGRET_MAX),
        Goal("behind the best simple policy, in the worst scenario", behind, BEHIND_MAX),
    ]


def _conduct_goals(ours: dict[str, tuple[Scenario, list[Run]]]) -> list[Goal]:
    """In the worst of all seeds, but for flips, which are averaged."""
    goals = []
    if "brown-out" in ours:
        scenario, runs = ours["brown-out"]
        goals.append(Goal("seconds from evidence of a brown-out until 90 % are off", max(off_s(each) for each in runs), OFF_S_MAX))
        goals.append(
            Goal("seconds from healing until 80 % of its share are back", max(back_s(scenario, each) for each in runs), BACK_S_MAX)
        )
    if "steady" in ours:
        _, runs = ours["steady"]
        minutes = (DURATION_S - WARM_UP_S) / 60
        flips = mean(sum(at_s > WARM_UP_S for at_s in each.flips) / minutes for each in runs)
        goals.append(Goal("flips of the leader per minute, steady", flips, FLIPS_PER_MIN_MAX))
    return goals


def off_s(each: Run) -> float:
    """Seconds from the first evidence until the ill endpoint gets at most a tenth of the next two seconds' traffic."""
    assert each.evidence_s is not None
    at_s = each.evidence_s
    while (share := share_of(each.chosen, 0, at_s, at_s + 2.0)) is None or share > 0.1:
        at_s += 0.1
    return at_s - each.evidence_s


def back_s(scenario: Scenario, each: Run) -> float:
    """Seconds from healing until ten seconds of traffic hold 80 % of the endpoint's former share; endless: never."""
    assert scenario.fault is not None
    start_s, end_s = scenario.fault
    before = share_of(each.chosen, 0, start_s - 30.0, start_s) or 0.0
    at_s = end_s
    while at_s + 10.0 < DURATION_S:
        if (share_of(each.chosen, 0, at_s, at_s + 10.0) or 0.0) >= 0.8 * before:
            return at_s - end_s
        at_s += 1.0
    return float("inf")


def table(result: Result) -> str:
    """Regret in percent, a scenario a line; then the goals."""
    names = [name for name in POLICIES if name != "oracle"]
    lines = [f"{'regret, %':18}" + "".join(f"{name:>18}" for name in names)]
    for scenario, row in result.regret.items():
        cells = (f"{100 * row[name].mean:.1f} ± {100 * row[name].half_width:.1f}" for name in names)
        lines.append(f"{scenario:18}" + "".join(f"{cell:>18}" for cell in cells))
    averages = (f"{100 * mean(row[name].mean for row in result.regret.values()):.1f}" for name in names)
    lines.append(f"{'average':18}" + "".join(f"{cell:>18}" for cell in averages))
    lines.append("")
    for goal in result.goals:
        lines.append(f"{'holds ' if goal.holds else 'MISSED'}  {goal.name}: {goal.value:.3g} (at most {goal.limit:g})")
    lines.append(f"{result.seeds} seeds, {result.took_s:.0f} s")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Regret of endpoint choice against an oracle, in virtual time.")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    result = measure(given.seeds)
    result = msgspec.structs.replace(result, machine=asyncio.run(describe_machine((None, None))))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "routing.json").write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    averages = {
        scenario: {name: (each.mean, each.half_width) for name, each in row.items() if name != "oracle"}
        for scenario, row in result.regret.items()
    }
    (given.out / "routing.svg").write_text(plot(averages))
    print(table(result))
    return 0 if all(goal.holds for goal in result.goals) else 1


if __name__ == "__main__":
    sys.exit(main())
