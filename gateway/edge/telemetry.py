"""Figures of this edge since it started, kept as plain numbers and handed to control as they stand.

Children are looked up once (`counter`, `histogram`) and then cost an addition; label values come from closed sets.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import TypeVar

from gateway.domain.metrics import METRICS, HistogramSample, Samples

SERIES_MAX = 5000  # per metric; past it, figures go to one series labelled "other"
FOLDS = 10  # a histogram has its turn every so many calls of `fold`
BUSY = 100  # values between two turns, from which on it is folded at each call: many at once would hold up whoever waits
FEW = 8  # values, under which they are counted one by one: sorting pays for more

Labels = tuple[str, ...]

C = TypeVar("C")


class Counter:
    __slots__ = ("told", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.told: float | None = None  # what control was told last

    def add(self, amount: float = 1) -> None:
        self.value += amount


class Histogram:
    """`observe` only notes a value, which is a call of C; `fold` counts what was noted, many at a time."""

    __slots__ = ("_before", "bounds", "counts", "is_busy", "is_told", "noted", "observe", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.is_busy = False
        self._before = 0  # values at the end of the last turn
        self.is_told = False  # whether control knows all that was folded
        self.noted: list[float] = []
        self.observe: Callable[[float], None] = self.noted.append

    def fold(self) -> None:
        """To be called often: until then what is noted takes up memory."""
        noted = self.noted
        if not noted:
            return
        self.is_told = False
        self.sum += sum(noted)
        if len(noted) < FEW:
            for value in noted:
                self.counts[bisect_left(self.bounds, value)] += 1
            noted.clear()
            return
        values = sorted(noted)
        noted.clear()
        below = 0
        for index, bound in enumerate(self.bounds):
            upto = bisect_right(values, bound)
            self.counts[index] += upto - below
            below = upto
        self.counts[-1] += len(values) - below

    def end_turn(self) -> None:
        """See whether there was much since the last turn."""
        number = sum(self.counts)
        self.is_busy = number - self._before >= BUSY
        self._before = number


class Telemetry:
    """All counters, gauges and histograms of one process."""

    def __init__(self) -> None:
        self._counters: dict[str, dict[Labels, Counter]] = {}
        self._histograms: dict[str, dict[Labels, Histogram]] = {}
        self._gauges: dict[tuple[str, ...], Callable[[], tuple[dict[Labels, float], ...]]] = {}
        self._gauges_told: dict[str, dict[Labels, float]] = {}
        self._all: list[Histogram] = []
        self._next = 0  # of these, whose turn it is
        self._busy: list[Histogram] = []
        self._is_new = True  # nothing was told to this control yet

    def counter(self, name: str, *labels: str) -> Counter:
        children = self._counters.setdefault(name, {})
        child = children.get(labels)
        if child is None:
            assert METRICS[name].kind == "counter" and len(METRICS[name].labels) == len(labels)
            child = children[self._bounded(children, labels)] = children.get(self._bounded(children, labels)) or Counter()
        return child

    def histogram(self, name: str, *labels: str) -> Histogram:
        children = self._histograms.setdefault(name, {})
        child = children.get(labels)
        if child is None:
            metric = METRICS[name]
            assert metric.kind == "histogram" and len(metric.labels) == len(labels)
            named = self._bounded(children, labels)
            child = children.get(named)
            if child is None:
                child = children[named] = Histogram(metric.buckets)
                self._all.append(child)
        return child

    def gauge(self, name: str, read: Callable[[], dict[Labels, float]]) -> None:
        """A figure that is read when asked for."""
        self.gauges((name,), lambda: (read(),))

    def gauges(self, names: tuple[str, ...], read: Callable[[], tuple[dict[Labels, float], ...]]) -> None:
        """Figures that are read together."""
        assert all(METRICS[name].kind == "gauge" for name in names)
        self._gauges[names] = read

    def fold(self) -> None:
        """Count what was noted by a tenth of the histograms, in turn, and by the busy ones. Called ten times a second."""
        for child in self._busy:
            child.fold()
        end = self._next + -(-len(self._all) // FOLDS)
        for child in self._all[self._next : end]:
            if child.noted or child.is_busy:
                child.fold()
                child.end_turn()
        if end < len(self._all):
            self._next = end
        else:
            self._next = 0
            self._busy = [child for child in self._all if child.is_busy]

    def joined(self) -> None:
        """Whoever is told of figures knows none yet."""
        self._is_new = True

    def samples(self) -> Samples:
        """All figures."""
        self._is_new = True
        return self.changed()

    def changed(self) -> Samples:
        """Those that changed since this was last asked for, of gauges all of a name; at first, all there are."""
        everything, self._is_new = self._is_new, False
        numbers: dict[str, dict[Labels, float]] = {}
        for name, counters in self._counters.items():
            news = [(labels, child) for labels, child in counters.items() if child.value != child.told or everything]
            for _, child in news:
                child.told = child.value
            if news:
                numbers[name] = {labels: child.value for labels, child in news}
        for names, read in self._gauges.items():
            for name, values in zip(names, read(), strict=True):
                if everything or values != self._gauges_told.get(name):
                    numbers[name] = self._gauges_told[name] = values
        histograms: dict[str, dict[Labels, HistogramSample]] = {}
        for name, children in self._histograms.items():
            found = {labels: _sample(child) for labels, child in children.items() if child.noted or not child.is_told or everything}
            if found:
                histograms[name] = found
        return Samples(numbers=numbers, histograms=histograms, whole=everything)

    @staticmethod
    def _bounded(children: dict[Labels, C], labels: Labels) -> Labels:
        return labels if len(children) < SERIES_MAX else ("other",) * len(labels)


def _sample(child: Histogram) -> HistogramSample:
    child.fold()
    child.is_told = True
    return HistogramSample(buckets=list(child.counts), sum=child.sum)
