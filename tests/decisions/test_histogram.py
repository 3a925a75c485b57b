"""A histogram counts each value once, in the first bucket whose bound it does not exceed, whenever it is folded."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from gateway.edge.telemetry import Histogram

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
