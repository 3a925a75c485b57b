"""Adding figures of many processes up, and rendering the sum for Prometheus. Pure: no clock, no file, no socket.

Only what `gateway.domain.metrics` names is counted, with its number of labels and buckets; anything else that a
process of another version reports is left out rather than shown wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import prometheus_client
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from gateway.domain.metrics import METRICS, HistogramSample, Metric, Samples

Labels = tuple[str, ...]

_MEANS = frozenset(metric.name for metric in METRICS.values() if metric.is_mean)


class Totals:
    """A running sum of Samples."""

    def __init__(self) -> None:
        self.numbers: dict[str, dict[Labels, float]] = {}
        self.histograms: dict[str, dict[Labels, tuple[list[int], float]]] = {}

    def add(self, samples: Samples, *, gauges: bool) -> None:
        """Count these in; gauges only if asked, for they say what is now, which the dead have no part in."""
        for name, series in samples.numbers.items():
            metric = METRICS.get(name)
            if metric is None or metric.kind == "histogram" or (metric.kind == "gauge" and not gauges):
                continue
            sums = self.numbers.setdefault(name, {})
            for labels, value in series.items():
                if len(labels) == len(metric.labels):
                    sums[labels] = sums.get(labels, 0) + value
        for name, histograms in samples.histograms.items():
            metric = METRICS.get(name)
            if metric is not None and metric.kind == "histogram":
                self._add_histograms(metric, histograms)

    def _add_histograms(self, metric: Metric, histograms: dict[Labels, HistogramSample]) -> None:
        sums = self.histograms.setdefault(metric.name, {})
        for labels, sample in histograms.items():
            if len(labels) != len(metric.labels) or len(sample.buckets) != len(metric.buckets) + 1:
                continue
            before = sums.get(labels)
            if before is None:
                sums[labels] = (list(sample.buckets), sample.sum)
            else:
                sums[labels] = ([a + b for a, b in zip(before[0], sample.buckets, strict=True)], before[1] + sample.sum)

    def samples(self) -> Samples:
        return Samples(
            numbers=self.numbers,
            histograms={
                name: {labels: HistogramSample(buckets, total) for labels, (buckets, total) in series.items()}
                for name, series in self.histograms.items()
            },
        )


def sum_up(counted: Iterable[Samples], live: Iterable[Samples]) -> Samples:
    """The fleet's figures: counters and histograms of all, gauges of the living alone, some as their mean."""
    totals = Totals()
    for samples in counted:
        totals.add(samples, gauges=False)
    sources: Counter[tuple[str, Labels]] = Counter()
    for samples in live:
        totals.add(samples, gauges=True)
        sources.update((name, labels) for name, series in samples.numbers.items() if name in _MEANS for labels in series)
    for name in _MEANS & totals.numbers.keys():
        series = totals.numbers[name]
        totals.numbers[name] = {labels: value / sources[name, labels] for labels, value in series.items()}
    return totals.samples()


def with_facts(samples: Samples, facts: Mapping[str, dict[Labels, float]]) -> Samples:
    """These figures, some of them replaced by what is known better."""
    return Samples(numbers={**samples.numbers, **facts}, histograms=samples.histograms)


def render(samples: Samples) -> bytes:
    """Prometheus text format 0.0.4, every metric of the table in its order."""
    registry = prometheus_client.CollectorRegistry(auto_describe=False)
    registry.register(_Figures(samples))
    return prometheus_client.generate_latest(registry)


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Figures(Collector):
    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Family]:
        for metric in METRICS.values():
            yield self._histogram(metric) if metric.kind == "histogram" else self._number(metric)

    def _number(self, metric: Metric) -> Family:
        family = _family(metric)
        series = self._samples.numbers.get(metric.name, {})
        if not metric.labels and not series:
            series = {(): 0.0}  # so that rate() sees the first count as an increase
        for labels, value in series.items():
            family.add_sample(metric.name, dict(zip(metric.labels, labels, strict=True)), value)
        return family

    def _histogram(self, metric: Metric) -> Family:
        family = _family(metric)
        bounds = [*(f"{bound:g}" for bound in metric.buckets), "+Inf"]
        for labels, sample in self._samples.histograms.get(metric.name, {}).items():
            named = dict(zip(metric.labels, labels, strict=True))
            count = 0
            for bound, in_bucket in zip(bounds, sample.buckets, strict=True):
                count += in_bucket
                family.add_sample(metric.name + "_bucket", {**named, "le": bound}, count)
            family.add_sample(metric.name + "_count", named, count)
            family.add_sample(metric.name + "_sum", named, sample.sum)
        return family


def _family(metric: Metric) -> Family:
    if metric.kind == "counter" and not metric.name.endswith("_total"):
        # A name that OpenTelemetry gives; the renderer would announce a counter under another name.
        return Family(metric.name, metric.help, "unknown")
    return Family(metric.name.removesuffix("_total") if metric.kind == "counter" else metric.name, metric.help, metric.kind)
