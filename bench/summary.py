"""Samples to a table for people: medians, ranges, and ratios taken round by round."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Protocol

TITLES = {"json": "JSON, requests/s", "burst": "SSE bursts, requests/s", "paced": "paced SSE, events/s"}
BASE = "envoy"


class Measured(Protocol):
    """The parts of a sample that a table shows."""

    @property
    def kind(self) -> str: ...
    @property
    def subject(self) -> str: ...
    @property
    def round(self) -> int: ...
    @property
    def per_s(self) -> float: ...
    @property
    def cpu_us(self) -> float: ...
    @property
    def errors(self) -> int: ...
    @property
    def latency_ms_p99(self) -> float | None: ...


def table(samples: Sequence[Measured]) -> str:
    """One block a kind. `x envoy` is the median of the ratios within each round: of throughput, for paced streams of CPU."""
    kinds = list(dict.fromkeys(sample.kind for sample in samples))
    return "\n\n".join(_block(kind, [sample for sample in samples if sample.kind == kind]) for kind in kinds)


def _block(kind: str, samples: Sequence[Measured]) -> str:
    head = f"{TITLES.get(kind, kind):26}{'median':>10}{'range':>20}{'p99 ms':>9}{'CPU us':>9}{'x envoy':>9}{'errors':>8}"
    subjects = sorted({sample.subject for sample in samples})
    return "\n".join([head, *(_row(kind, name, samples) for name in subjects)])


def _row(kind: str, subject: str, samples: Sequence[Measured]) -> str:
    own = [sample for sample in samples if sample.subject == subject]
    rates = [sample.per_s for sample in own]
    tails = [sample.latency_ms_p99 for sample in own if sample.latency_ms_p99 is not None]
    tail = f"{median(tails):.1f}" if tails else "-"
    ratios = list(_ratios(kind, own, samples))
    ratio = f"{median(ratios):.2f}" if ratios else "-"
    spread = f"{min(rates):,.0f}-{max(rates):,.0f}"
    cpu_us = median(sample.cpu_us for sample in own)
    errors = sum(sample.errors for sample in own)
    return f"  {subject:24}{median(rates):>10,.0f}{spread:>20}{tail:>9}{cpu_us:>9.1f}{ratio:>9}{errors:>8}"


def _ratios(kind: str, own: Sequence[Measured], samples: Sequence[Measured]) -> Iterable[float]:
    bases = {sample.round: sample for sample in samples if sample.subject == BASE}
    for sample in own:
        if (base := bases.get(sample.round)) is not None:
            value, against = (sample.cpu_us, base.cpu_us) if kind == "paced" else (sample.per_s, base.per_s)
            if against:
                yield value / against
