"""Samples to a table for people: medians, ranges, and ratios taken round by round."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Protocol

TITLES = {
    "json": "JSON, requests/s",
    "burst": "SSE bursts, requests/s",
    "paced": "paced SSE, events/s",
    "open": "open loop at 60 %, requests/s",
}
BASE = "envoy"
OURS = "gateway"


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
    @property
    def added_ms(self) -> dict[str, float] | None: ...


def table(samples: Sequence[Measured]) -> str:
    """One block a kind. `x envoy` is the median of the ratios within each round: of throughput, for paced streams of CPU."""
    kinds = list(dict.fromkeys(sample.kind for sample in samples))
    return "\n\n".join(_block(kind, [sample for sample in samples if sample.kind == kind]) for kind in kinds)


def ratios(samples: Sequence[Measured], ours: str = OURS) -> dict[str, dict[str, float]]:
    """Our rate over each peer's, by peer and title: medians of the ratios within each round. Of paced streams: their CPU over ours."""
    found: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(sample.kind for sample in samples if sample.kind != "open"):
        of_kind = [sample for sample in samples if sample.kind == kind]
        mine = [sample for sample in of_kind if sample.subject == ours]
        for peer in sorted({sample.subject for sample in of_kind} - {ours}):
            each = list(_ratios(kind, mine, of_kind, peer))
            if each and median(each) > 0:
                ratio = median(each)
                found.setdefault(peer, {})["paced SSE, CPU" if kind == "paced" else TITLES.get(kind, kind)] = (
                    1 / ratio if kind == "paced" else ratio
                )
    return found


def ratio_table(samples: Sequence[Measured]) -> str:
    """How many times each peer the gateway is; above 1 the gateway is faster, or uses less CPU."""
    found = ratios(samples)
    titles = list(dict.fromkeys(title for row in found.values() for title in row))
    head = f"{'gateway / peer':26}" + "".join(f"{title:>26}" for title in titles)
    rows = [
        f"  {peer:24}" + "".join(f"{row[title]:>26.2f}" if title in row else f"{'-':>26}" for title in titles)
        for peer, row in found.items()
    ]
    return "\n".join([head, *rows])


def _block(kind: str, samples: Sequence[Measured]) -> str:
    head = f"{TITLES.get(kind, kind):26}{'median':>10}{'range':>20}{'p99 ms':>9}{'CPU us':>9}{'x envoy':>9}{'errors':>8}"
    subjects = sorted({sample.subject for sample in samples})
    added = [_added(name, samples) for name in subjects if kind == "open"]
    return "\n".join([head, *(_row(kind, name, samples) for name in subjects), *added])


def _added(subject: str, samples: Sequence[Measured]) -> str:
    own = [sample.added_ms for sample in samples if sample.subject == subject and sample.added_ms]
    names = own[0] if own else {}
    return f"  {subject:24}added ms: " + "  ".join(f"{name} {median(each[name] for each in own):.2f}" for name in names)


def _row(kind: str, subject: str, samples: Sequence[Measured]) -> str:
    own = [sample for sample in samples if sample.subject == subject]
    rates = [sample.per_s for sample in own]
    tails = [sample.latency_ms_p99 for sample in own if sample.latency_ms_p99 is not None]
    tail = f"{median(tails):.1f}" if tails else "-"
    ratios = list(_ratios(kind, own, samples, BASE))
    ratio = f"{median(ratios):.2f}" if ratios else "-"
    spread = f"{min(rates):,.0f}-{max(rates):,.0f}"
    cpu_us = median(sample.cpu_us for sample in own)
    errors = sum(sample.errors for sample in own)
    return f"  {subject:24}{median(rates):>10,.0f}{spread:>20}{tail:>9}{cpu_us:>9.1f}{ratio:>9}{errors:>8}"


def _ratios(kind: str, own: Sequence[Measured], samples: Sequence[Measured], base_name: str) -> Iterable[float]:
    bases = {sample.round: sample for sample in samples if sample.subject == base_name}
    for sample in own:
        if (base := bases.get(sample.round)) is not None:
            value, against = (sample.cpu_us, base.cpu_us) if kind == "paced" else (sample.per_s, base.per_s)
            if against:
                yield value / against
