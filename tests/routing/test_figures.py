"""Figures agree with a recount: percentiles within 2 %, counts exactly, over windows and over edges."""

from __future__ import annotations

import random
from math import ceil

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.routing.figures import NOTHING, WINDOWS_S, Counts, Merged, Observed, Tally
from gateway.routing.fleet import Fleet
from gateway.routing.sketch import Sketch, bucket, merge, middle, quantiles, remove
from gateway.routing.windows import CountHistory, SketchWindow

values = st.lists(st.floats(min_value=1e-4, max_value=1e4), min_size=1, max_size=300)


def sketch_of(numbers: list[float]) -> Sketch:
    sketch: Sketch = {}
    for number in numbers:
        merge(sketch, {bucket(number): 1})
    return sketch


@given(values, st.sampled_from([0.5, 0.75, 0.9, 0.99, 1.0]))
def test_percentiles_are_within_two_percent_of_nearest_rank(numbers: list[float], share: float) -> None:
    exact = sorted(numbers)[ceil(share * len(numbers)) - 1]
    assert quantiles(sketch_of(numbers), (share,))[0] == pytest.approx(exact, rel=0.0101)


@given(values, values)
def test_what_is_merged_can_be_taken_out_again(some: list[float], more: list[float]) -> None:
    sketch = sketch_of(some)
    merge(sketch, sketch_of(more))
    assert sum(sketch.values()) == len(some) + len(more)
    remove(sketch, sketch_of(more))
    assert sketch == sketch_of(some)


def test_absurd_values_count_as_the_end_of_the_range() -> None:
    assert bucket(0.0) == bucket(-5.0) == bucket(1e-9)
    assert bucket(float("inf")) == bucket(1e30)
    assert middle(bucket(1e30)) == pytest.approx(1e7, rel=0.01)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(min_value=0.01, max_value=40.0), st.integers(1, 5)), min_size=1, max_size=80))
def test_counts_over_every_window_agree_with_a_recount_within_a_step(steps: list[tuple[float, int]]) -> None:
    history = CountHistory(step_s=0.5, span_s=WINDOWS_S[-1])
    added: list[tuple[float, int]] = []
    now_s = 100.0
    for gap_s, ok in steps:
        now_s += gap_s
        history.add(Counts(ok=ok), now_s)
        added.append((now_s, ok))
    for window_s, counts in zip(WINDOWS_S, history.windows(now_s), strict=True):
        least = sum(ok for at_s, ok in added if at_s >= now_s - window_s + 0.5)
        most = sum(ok for at_s, ok in added if at_s >= now_s - window_s - 0.5)
        assert least <= counts.ok <= most


def test_a_window_forgets_what_is_older() -> None:
    history = CountHistory(step_s=0.5, span_s=300.0)
    window = SketchWindow(300.0)
    history.add(Counts(ok=1), 0.0)
    window.add({bucket(0.3): 1}, 0.0)
    assert history.last(300.0, 299.0).ok == 1
    assert window.percentiles(299.0) is not None
    assert history.last(300.0, 301.0) == NOTHING
    assert history.is_idle(301.0)
    assert window.percentiles(340.0) is None


def test_history_does_not_grow_with_time() -> None:
    history = CountHistory(step_s=0.5, span_s=10.0)
    for step in range(10_000):
        history.add(Counts(ok=1), step * 0.1)
    assert len(history._times) <= 30


def tally(rng: random.Random, calls: int) -> tuple[Tally, list[float]]:
    firsts = [rng.lognormvariate(-1, 0.5) for _ in range(calls)]
    counts = Counts(ok=calls, firsts=calls, first_us=int(sum(firsts) * 1e6))
    return Tally(counts, sketch_of(firsts), {}), firsts


def test_the_fleet_shows_what_all_edges_saw() -> None:
    rng, fleet = random.Random(3), Fleet()
    seen: list[float] = []
    for second in range(60):
        for edge in ("a", "b", "c"):
            news, firsts = tally(rng, 5)
            fleet.observe(edge, Observed(second + 1, {"e": news}, {"e": 2}), float(second))
            seen += firsts
    shown = fleet.shown("e", 60.0)
    assert shown.latency_last_30m is not None
    seen.sort()
    assert shown.latency_last_30m.p50 == pytest.approx(1000 * seen[ceil(0.5 * len(seen)) - 1], rel=0.02)
    assert shown.latency_last_30m.p99 == pytest.approx(1000 * seen[ceil(0.99 * len(seen)) - 1], rel=0.02)
    merged = fleet.merged(60.0)
    assert merged.figures["e"].windows[-1].ok == 900
    assert merged.figures["e"].inflight == 6
    assert merged.seen == {"a": 60, "b": 60, "c": 60}


def test_a_report_counts_once() -> None:
    fleet = Fleet()
    report = Observed(1, {"e": Tally(Counts(ok=5), {}, {})}, {"e": 1})
    fleet.observe("a", report, 1.0)
    fleet.observe("a", report, 1.5)
    assert fleet.merged(2.0).figures["e"].windows[-1].ok == 5


def test_a_dead_edge_has_no_calls_under_way_but_its_past_stays() -> None:
    fleet = Fleet()
    fleet.observe("a", Observed(1, {"e": Tally(Counts(ok=5), {}, {})}, {"e": 7}), 1.0)
    fleet.lost("a")
    assert fleet.merged(2.0).figures["e"].inflight == 0
    assert fleet.merged(2.0).figures["e"].windows[-1].ok == 5


def test_uptime_leaves_rate_limits_out_and_says_nothing_of_too_few() -> None:
    fleet = Fleet()
    fleet.observe("a", Observed(1, {"e": Tally(Counts(ok=9, failed=3, throttled=500), {}, {})}, {}), 1.0)
    fleet.observe("a", Observed(2, {"few": Tally(Counts(ok=9), {}, {})}, {}), 1.0)
    assert fleet.shown("e", 2.0).uptime_last_5m == fleet.shown("e", 2.0).uptime_last_1d == 75.0
    assert fleet.shown("few", 2.0).uptime_last_5m is None
    assert fleet.shown("never called", 2.0).uptime_last_30m is None


def test_endpoints_nobody_calls_any_more_are_forgotten() -> None:
    fleet = Fleet()
    fleet.observe("a", Observed(1, {"e": Tally(Counts(ok=20), {}, {})}, {}), 1.0)
    assert fleet.merged(400.0).figures == {}
    assert fleet.shown("e", 400.0).uptime_last_1d == 100.0
    fleet.merged(90_000.0)
    assert fleet._endpoints == {}


def test_reports_and_pushes_survive_the_link() -> None:
    fleet = Fleet()
    report = Observed(1, {"e": Tally(Counts(ok=5, first_us=7), {-3: 4}, {900: 1})}, {"e": 1})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=Observed) == report
    fleet.observe("a", report, 1.0)
    merged = fleet.merged(1.0)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(merged), type=Merged) == merged
