"""Histograms with logarithmic buckets: percentiles within 1 %, in little room, that add up over time and processes.

A sketch is a plain dict from bucket to count, so that it costs one look-up to fill and travels as it is.
Source: DDSketch (Masson, Rim, Lee; VLDB 2019), without its bounds on the number of buckets: ours follow from the range.
"""

from __future__ import annotations

from math import ceil, log

Sketch = dict[int, int]

ACCURACY = 0.01  # relative; the live figures must agree with a recount within 2 %
VALUE_MIN, VALUE_MAX = 1e-5, 1e7  # seconds and tokens per second alike; 1,382 buckets at the very most
_GAMMA = (1 + ACCURACY) / (1 - ACCURACY)
_PER_LOG = 1 / log(_GAMMA)
_MIDDLE = 2 / (_GAMMA + 1)


def bucket(value: float) -> int:
    """The bucket of a positive value; what lies outside the range counts as its end."""
    value = VALUE_MIN if value < VALUE_MIN else VALUE_MAX if value > VALUE_MAX else value
    return ceil(log(value) * _PER_LOG)


def middle(index: int) -> float:
    """The value that stands for a bucket: no value in it is further away than ACCURACY."""
    return _MIDDLE * _GAMMA**index


def merge(into: Sketch, other: Sketch) -> None:
    """Count `other` in."""
    for index, count in other.items():
        into[index] = into.get(index, 0) + count


def remove(from_: Sketch, other: Sketch) -> None:
    """Take out what was merged before; emptied buckets vanish."""
    for index, count in other.items():
        left = from_[index] - count
        if left:
            from_[index] = left
        else:
            del from_[index]


def quantiles(sketch: Sketch, shares: tuple[float, ...]) -> tuple[float, ...]:
    """Nearest-rank percentiles for ascending shares such as (0.5, 0.99); of an empty sketch none."""
    total = sum(sketch.values())
    found: list[float] = []
    seen = 0
    ordered = iter(sorted(sketch.items()))
    index = 0
    for share in shares if total else ():
        rank = max(1, ceil(share * total))
        while seen < rank:
            index, count = next(ordered)
            seen += count
        found.append(middle(index))
    return tuple(found)
