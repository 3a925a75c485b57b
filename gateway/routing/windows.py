"""Rolling windows over tallies. Time comes as an argument, in seconds of any monotonic clock.

Counts are kept as running totals with a snapshot a second: any window is one subtraction. Sketches are kept as a ring of
slots whose sum is maintained, since copies of whole histograms would take a megabyte an endpoint.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque

from gateway.routing.budget import slow_s
from gateway.routing.figures import NOTHING, SHARES, WINDOWS_S, Counts, Figures, Percentiles, Tally, percentiles_of
from gateway.routing.sketch import Sketch, bucket, merge, quantiles, remove

SLOTS = 10  # a sketch's window moves by a tenth of its length
ANSWERS_MIN = 20  # of fewer the slowest twentieth is nobody
ANSWERS_NOTED_MAX = 1000
SLOW_S, SLOW_S_UNKNOWN = 5.0, 0.5  # seconds until it is worked out anew


class CountHistory:
    """Counts over any stretch of whole `step_s` up to `span_s` before now."""

    __slots__ = ("_before", "_span_s", "_step_s", "_times", "total")

    def __init__(self, *, step_s: float, span_s: float) -> None:
        self.total = NOTHING
        self._step_s = step_s
        self._span_s = span_s
        self._times: list[float] = []  # of snapshots, ascending
        self._before: list[Counts] = []  # the total just before anything of that time

    def add(self, counts: Counts, now_s: float) -> None:
        if not self._times or now_s - self._times[-1] >= self._step_s:
            self._times.append(now_s)
            self._before.append(self.total)
            if self._times[0] < now_s - 1.25 * self._span_s:  # now and then, for it moves the rest
                self._forget(now_s)
        self.total = self.total.plus(counts)

    def last(self, window_s: float, now_s: float) -> Counts:
        """What was added within this many seconds before now."""
        index = bisect_left(self._times, now_s - window_s)
        return self.total.minus(self._before[index]) if index < len(self._times) else NOTHING

    def attempts(self, window_s: float, now_s: float) -> int:
        """The same of attempts alone."""
        index = bisect_left(self._times, now_s - window_s)
        return self.total.attempts - self._before[index].attempts if index < len(self._times) else 0

    def windows(self, now_s: float) -> tuple[Counts, Counts, Counts, Counts]:
        """The counts over WINDOWS_S."""
        now, short, minute, long = (self.last(window_s, now_s) for window_s in WINDOWS_S)
        return now, short, minute, long

    def is_idle(self, now_s: float) -> bool:
        """Nothing within the whole span."""
        return not self._times or self._times[-1] < now_s - self._span_s

    def _forget(self, now_s: float) -> None:
        index = bisect_left(self._times, now_s - self._span_s)
        del self._times[:index], self._before[:index]


class SketchWindow:
    """One histogram over the last `span_s` seconds, within a tenth."""

    __slots__ = ("_percentiles", "_slot_s", "_slots", "_sum")

    def __init__(self, span_s: float) -> None:
        self._slot_s = span_s / SLOTS
        self._slots: deque[tuple[int, Sketch]] = deque()
        self._sum: Sketch = {}
        self._percentiles: Percentiles | None = None  # of what is in `_sum`; None: to be worked out

    def add(self, sketch: Sketch, now_s: float) -> None:
        slot = self._forget(now_s)
        if not self._slots or self._slots[-1][0] != slot:
            self._slots.append((slot, {}))
        self._percentiles = None
        merge(self._slots[-1][1], sketch)
        merge(self._sum, sketch)

    def percentiles(self, now_s: float) -> Percentiles | None:
        self._forget(now_s)
        if self._percentiles is None and self._sum:
            self._percentiles = percentiles_of(quantiles(self._sum, SHARES))
        return self._percentiles

    def quantiles(self, shares: tuple[float, ...], now_s: float, *, of_at_least: int) -> tuple[float, ...]:
        """Empty where there are fewer values than that."""
        self._forget(now_s)
        return quantiles(self._sum, shares) if sum(self._sum.values()) >= of_at_least else ()

    def _forget(self, now_s: float) -> int:
        slot = int(now_s // self._slot_s)
        while self._slots and self._slots[0][0] <= slot - SLOTS:
            self._percentiles = None
            remove(self._sum, self._slots.popleft()[1])
        return slot


class EndpointWindows:
    """All that the scorer needs of one endpoint, from the tallies that are added."""

    __slots__ = ("counts", "first_s", "rate")

    def __init__(self) -> None:
        self.counts = CountHistory(step_s=0.5, span_s=WINDOWS_S[-1])
        self.first_s = SketchWindow(WINDOWS_S[-1])
        self.rate = SketchWindow(WINDOWS_S[-1])

    def add(self, tally: Tally, now_s: float) -> None:
        self.counts.add(tally.counts, now_s)
        self.add_sketches(tally, now_s)

    def add_sketches(self, tally: Tally, now_s: float) -> None:
        """Of a tally whose counts were added, or will be."""
        if tally.first_s:
            self.first_s.add(tally.first_s, now_s)
        if tally.rate:
            self.rate.add(tally.rate, now_s)

    def figures(self, now_s: float, inflight: int = 0) -> Figures:
        """With percentiles: for those who push and show them."""
        return Figures(self.counts.windows(now_s), self.first_s.percentiles(now_s), self.rate.percentiles(now_s), inflight)


class AnswerTimes:
    """How long an endpoint's whole answers took over 5 minutes, as one edge saw it, in seconds from the asking."""

    __slots__ = ("_noted", "_slow_s", "_took_s", "_until_s")

    def __init__(self) -> None:
        self._noted: list[float] = []
        self._took_s = SketchWindow(WINDOWS_S[-1])
        self._slow_s = 0.0
        self._until_s = float("-inf")

    def add(self, took_s: float, now_s: float) -> None:
        self._noted.append(took_s)
        if len(self._noted) >= ANSWERS_NOTED_MAX:
            self._count(now_s)

    def slow_s(self, now_s: float) -> float:
        """Seconds after which one is slow: the p95, if it is far enough from the median. 0.0: too few are known."""
        if now_s >= self._until_s:
            self._count(now_s)
            usual = self._took_s.quantiles((0.5, 0.95), now_s, of_at_least=ANSWERS_MIN)
            self._slow_s = slow_s(*usual) if usual else 0.0
            self._until_s = now_s + (SLOW_S if usual else SLOW_S_UNKNOWN)
        return self._slow_s

    def _count(self, now_s: float) -> None:
        counted: Sketch = {}
        for took_s in self._noted:
            index = bucket(took_s)
            counted[index] = counted.get(index, 0) + 1
        self._noted.clear()
        if counted:
            self._took_s.add(counted, now_s)
