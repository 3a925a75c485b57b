"""Figures of this edge since it started, kept as plain numbers and handed to control as they stand.

Children are looked up once (`counter`, `histogram`) and then cost an addition; label values come from closed sets.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

from gateway.domain.metrics import METRICS, HistogramSample, Samples

SERIES_MAX = 5000  # per metric; past it, figures go to one series labelled "other"


class Counter:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1) -> None:
        self.value += amount


class Histogram:
    """`observe` only notes a value, which is a call of C; `fold` counts what was noted, many at a time."""

    __slots__ = ("_noted", "bounds", "counts", "observe", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self._noted: list[float] = []
        self.observe: Callable[[float], None] = self._noted.append

    def fold(self) -> None:
        """To be called often: until then what is noted takes up memory."""
        if not self._noted:
            return
        values = sorted(self._noted)
        self._noted.clear()
        self.sum += sum(values)
        below = 0
        for index, bound in enumerate(self.bounds):
            upto = bisect_right(values, bound)
            self.counts[index] += upto - below
            below = upto
        self.counts[-1] += len(values) - below


class Telemetry:
    """All counters, gauges and histograms of one process."""

    def __init__(self) -> None:
        self._counters: dict[str, dict[tuple[str, ...], Counter]] = {}
        self._histograms: dict[str, dict[tuple[str, ...], Histogram]] = {}
        self._gauges: dict[str, Callable[[], dict[tuple[str, ...], float]]] = {}

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
            child = children[self._bounded(children, labels)] = children.get(self._bounded(children, labels)) or Histogram(metric.buckets)
        return child

    def gauge(self, name: str, read: Callable[[], dict[tuple[str, ...], float]]) -> None:
        """A figure that is read when asked for."""
        assert METRICS[name].kind == "gauge"
        self._gauges[name] = read

    def fold(self) -> None:
        """Count what histograms have noted. Called ten times a second, and before anybody reads them."""
        for children in self._histograms.values():
            for child in children.values():
                child.fold()

    def samples(self) -> Samples:
        self.fold()
        numbers: dict[str, dict[tuple[str, ...], float]] = {
            name: {labels: child.value for labels, child in children.items()} for name, children in self._counters.items()
        }
        numbers |= {name: read() for name, read in self._gauges.items()}
        return Samples(
            numbers=numbers,
            histograms={
                name: {labels: HistogramSample(buckets=list(child.counts), sum=child.sum) for labels, child in children.items()}
                for name, children in self._histograms.items()
            },
        )

    @staticmethod
    def _bounded(children: dict[tuple[str, ...], Counter] | dict[tuple[str, ...], Histogram], labels: tuple[str, ...]) -> tuple[str, ...]:
        return labels if len(children) < SERIES_MAX else ("other",) * len(labels)
