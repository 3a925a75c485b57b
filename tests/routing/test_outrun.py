"""What is learned of an endpoint that was outrun: that it was slow, as far as it showed, and nothing else."""

from __future__ import annotations

import pytest

from gateway.routing.scorer import estimate
from gateway.routing.windows import ANSWERS_MIN, AnswerTimes
from tests.routing.scene import Scene, endpoint, model_of


def warmed() -> Scene:
    scene = Scene(model_of([endpoint("a"), endpoint("b")]))
    scene.warm({"a": 0.3, "b": 0.3}, calls=40)
    return scene


def first_s(scene: Scene) -> float:
    found = estimate(scene.live("a").figures(scene.now_s)).first_s
    assert found is not None
    return found


def test_a_stream_that_was_waited_for_longer_than_usual_counts_as_slow() -> None:
    scene = warmed()
    live, before = scene.live("a"), first_s(scene)
    for _ in range(5):
        number = live.begin(scene.now_s, stream=True)
        scene.now_s += 3.0
        live.outrun(number, scene.now_s, 3.0, prompt_tokens=100)
    assert first_s(scene) > 2 * before
    assert live.percentiles(scene.now_s + 10)[0].p99 == pytest.approx(3.0, rel=0.02)
    tally = live.report(1, scene.now_s)
    assert tally is not None and tally.counts.firsts == 45 and tally.counts.prompt_tokens == 4500  # other edges hear of it


@pytest.mark.parametrize("waited_s", [0.0001, 0.05, 0.29])
def test_one_that_had_not_waited_long_does_not_look_quick(waited_s: float) -> None:
    scene = warmed()
    live, before = scene.live("a"), scene.live("a").figures(scene.now_s).windows[-1]
    for stream in (True, False):
        for _ in range(50):
            live.outrun(live.begin(scene.now_s, stream=stream), scene.now_s, waited_s, tokens=0 if stream else 50)
    assert live.figures(scene.now_s).windows[-1] == before


def test_a_whole_answer_that_was_waited_for_is_slow_by_the_tokens_that_it_has_not_made() -> None:
    scene = warmed()  # 50 tokens a second
    live = scene.live("a")
    before = live.figures(scene.now_s).windows[-1]
    live.outrun(live.begin(scene.now_s, stream=False), scene.now_s, 20.0, tokens=100)
    after = live.figures(scene.now_s).windows[-1]
    assert (after.answers, after.tokens, after.gen_us) == (before.answers + 1, before.tokens + 100, before.gen_us + 20_000_000)


def test_being_outrun_is_neither_failure_nor_success() -> None:
    scene = warmed()
    live, before = scene.live("a"), scene.live("a").figures(scene.now_s)
    for _ in range(100):
        live.outrun(live.begin(scene.now_s, stream=True), scene.now_s, 5.0)
    after = live.figures(scene.now_s)
    assert (after.windows[-1].ok, after.windows[-1].failed, after.windows[-1].throttled) == (40, 0, 0)
    assert (after.failures_in_a_row, after.successes_in_a_row) == (before.failures_in_a_row, before.successes_in_a_row)
    assert live.inflight == 0 and live.breaker.admits(scene.now_s)


def test_a_probe_that_was_outrun_heals_nothing_and_makes_room_for_the_next() -> None:
    scene = warmed()
    live = scene.live("a")
    for _ in range(60):
        scene.fail("a")
    assert live.breaker.ejected
    scene.now_s += 60
    live.outrun(live.begin(scene.now_s, stream=True), scene.now_s, 5.0)
    assert live.breaker.ejected and live.breaker.admits_probe(scene.now_s)


def test_a_whole_answer_is_slow_beyond_the_p95_once_there_are_enough() -> None:
    times = AnswerTimes()
    for number in range(ANSWERS_MIN - 1):
        times.add(1.0 + number / 10, 10.0)
    assert times.slow_s(10.0) == 0.0
    times.add(9.0, 10.1)
    assert times.slow_s(10.6) == pytest.approx(2.85, rel=0.02)
    for _ in range(5000):  # however seldom anybody asks
        times.add(4.0, 11.0)
    assert times.slow_s(16.0) == pytest.approx(6.0, rel=0.02)  # where nearly all take the same time
    assert times.slow_s(400.0) == 0.0  # of five minutes
