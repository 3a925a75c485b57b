"""A histogram counts each value once, in the first bucket whose bound it does not exceed, whenever it is folded."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from gateway.edge.telemetry import FOLDS, Histogram, Telemetry

BOUNDS = (0.1, 0.5, 2.0)
values = st.lists(st.one_of(st.sampled_from((0.0, 0.1, 0.5, 2.0, 2.1)), st.floats(0.0, 5.0)), max_size=30)


@given(st.lists(values, max_size=5))
def test_every_value_is_counted_once_in_its_bucket(batches: list[list[float]]) -> None:
    histogram = Histogram(BOUNDS)
    for batch in batches:
        for value in batch:
            histogram.observe(value)
        histogram.fold()
    seen = [value for batch in batches for value in batch]
    assert math.isclose(histogram.sum, sum(seen), abs_tol=1e-9)
    for at, bound in enumerate(BOUNDS):
        assert sum(histogram.counts[: at + 1]) == sum(value <= bound for value in seen)
    assert sum(histogram.counts) == len(seen)


def test_every_histogram_has_its_turn_each_second_and_a_busy_one_at_each_call() -> None:
    telemetry = Telemetry()
    quiet = [telemetry.histogram("gen_ai_server_request_duration_seconds", "north", f"acme/m{number}") for number in range(95)]
    busy = telemetry.histogram("gateway_overhead_seconds")
    left = []
    for call in range(50):
        for _ in range(20):
            busy.observe(0.001)
        quiet[call % 95].observe(0.1)
        telemetry.fold()
        left.append(len(busy.noted))
        assert sum(len(each.noted) for each in quiet) <= 10
    assert max(left[:20]) > 20 and left[30:] == [0] * 20  # it took a turn to see that it is busy
    for _ in range(2 * FOLDS):
        telemetry.fold()
    assert not any(each.noted for each in (*quiet, busy)) and not busy.is_busy
    assert sum(busy.counts) == 1000 and sum(sum(each.counts) for each in quiet) == 50
