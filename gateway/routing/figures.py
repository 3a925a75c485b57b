"""What is known of endpoints, in numbers: the words in which edges, control and the scorer speak of them.

An edge counts into a Tally and hands it over each second; control adds the tallies of all edges up over rolling windows
and pushes Figures back. Windows end now and are named by their length. Times are integer microseconds, so that sums are exact.
"""

from __future__ import annotations

from operator import add, sub
from typing import NamedTuple

import msgspec

from gateway.routing.sketch import Sketch, merge

WINDOWS_S = (1, 5, 60, 300)  # what the scorer looks at, the shortest first
SHARES = (0.5, 0.75, 0.9, 0.99)  # the percentiles that callers can ask for, and that the API shows


class Counts(NamedTuple):
    """Attempts of one endpoint over some stretch of time. A caller's own fault and a caller who left are in none of them."""

    ok: int = 0
    failed: int = 0  # the provider's fault, but for 429
    throttled: int = 0  # 429
    firsts: int = 0  # streams that had a first token, or had waited for one when another endpoint outran them,
    first_us: int = 0  # and how long they took to it, in sum
    prompt_tokens: int = 0  # of those streams, in sum: what their first-token times belong to
    answers: int = 0  # answers whose tokens were counted,
    tokens: int = 0  # how many there were,
    gen_us: int = 0  # and how long they took, in sum: streams from the first token on, whole answers from the start

    def plus(self, other: Counts) -> Counts:
        return _new(Counts, map(add, self, other))

    def minus(self, other: Counts) -> Counts:
        return _new(Counts, map(sub, self, other))

    @property
    def attempts(self) -> int:
        return self.ok + self.failed + self.throttled


_new = tuple.__new__  # each endpoint's are added up twice a second: `_make` costs half as much again
NOTHING = Counts()


class Tally(msgspec.Struct, array_like=True, gc=False):
    """What one edge saw of one endpoint since its last report. Adds up."""

    counts: Counts = NOTHING
    first_s: Sketch = {}  # seconds to the first token
    rate: Sketch = {}  # output tokens per second

    def add(self, other: Tally) -> None:
        self.counts = self.counts.plus(other.counts)
        self.add_sketches(other)

    def add_sketches(self, other: Tally) -> None:
        merge(self.first_s, other.first_s)
        merge(self.rate, other.rate)


class Observed(msgspec.Struct, frozen=True, array_like=True):
    """Edge -> control, each second: what it saw since the last one, and what is under way."""

    seq: int  # counts up from 1 with each report of one edge process
    tallies: dict[str, Tally]  # by endpoint id; only endpoints with news
    inflight: dict[str, int]  # by endpoint id; only those with calls
    ejected: tuple[str, ...] = ()  # endpoint ids that errors put out of service on this edge
    held: tuple[str, ...] = ()  # those that a rate limit keeps from being tried, or their provider's own word


class Percentiles(msgspec.Struct, frozen=True, array_like=True):
    """p50, p75, p90 and p99."""

    p50: float
    p75: float
    p90: float
    p99: float


class Figures(msgspec.Struct, frozen=True, array_like=True):
    """One endpoint as the scorer sees it: counts over WINDOWS_S, percentiles of 5 minutes, calls under way."""

    windows: tuple[Counts, Counts, Counts, Counts] = (NOTHING, NOTHING, NOTHING, NOTHING)
    first_s: Percentiles | None = None  # seconds to the first token; None: no stream in 5 minutes
    rate: Percentiles | None = None  # output tokens per second
    inflight: int = 0
    failures_in_a_row: int = 0  # as this edge saw them; not merged
    successes_in_a_row: int = 0


class Merged(msgspec.Struct, frozen=True, array_like=True):
    """Control -> every edge, each second: the figures of all endpoints that were called lately."""

    seen: dict[str, int]  # by edge incarnation: the `seq` of its last report that is in here
    figures: dict[str, Figures]  # by endpoint id


def percentiles_of(values: tuple[float, ...]) -> Percentiles | None:
    return Percentiles(*values) if values else None
