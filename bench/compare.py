"""Whether B is better or worse than A, two results files of the same bench, with noise taken into account.

    python -m bench.compare A.json B.json [--base envoy]

Compared are ratios to a base subject within each round where both files have one, because a slow minute of the machine hits subject
and base alike; raw figures otherwise. The verdict is an exact permutation test of the difference of means: few rounds make any
normal approximation, and a bootstrap of three values, too sure of itself. With three rounds a side the smallest p there is is 0.1,
so `--p` is 0.1 by default, and five rounds or more are better. A change below `--share` is never called one. Exit status 1: worse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, median

import msgspec

from bench.rounds import Result, Sample

COMBINATIONS_MAX = 200_000  # 10 rounds a side are 184,756


class Verdict(msgspec.Struct, frozen=True):
    """One line. `change`: of the medians, as a share; positive is better, for rates and CPU alike."""

    kind: str
    subject: str
    measure: str
    change: float
    p: float
    word: str  # better, worse, same, or unclear: large, but the rounds do not agree


def permutation_p(a: Sequence[float], b: Sequence[float]) -> float:
    """The share of all ways to deal the values into two hands whose means differ at least as much. Raises ValueError for too many."""
    values = [*a, *b]
    total, size, seen = sum(values), len(a), abs(mean(a) - mean(b))
    hits = ways = 0
    for hand in combinations(values, size):
        ways += 1
        if ways > COMBINATIONS_MAX:
            raise ValueError(f"more than {COMBINATIONS_MAX} ways: fewer rounds, please")
        inside = sum(hand)
        hits += abs(inside / size - (total - inside) / len(b)) >= seen * (1 - 1e-9)
    return hits / ways


def compare(a: Sequence[Sample], b: Sequence[Sample], *, base: str = "envoy", p_max: float = 0.1, share_min: float = 0.03) -> list[Verdict]:
    """A verdict for each kind, subject and measure that both have; the base itself only where it cannot be a base."""
    found = []
    for kind in dict.fromkeys(sample.kind for sample in a):
        for subject in dict.fromkeys(sample.subject for sample in a if sample.kind == kind):
            for measure in ("cpu_us",) if kind in ("paced", "open") else ("per_s", "cpu_us"):
                related = subject != base and _has(a, kind, base) and _has(b, kind, base)
                mine = _values(a, kind, subject, measure, base if related else None)
                theirs = _values(b, kind, subject, measure, base if related else None)
                if mine and theirs and median(mine) > 0 and median(theirs) > 0:
                    found.append(_verdict(kind, subject, measure + (f" / {base}" if related else ""), mine, theirs, p_max, share_min))
    return found


def _has(samples: Sequence[Sample], kind: str, subject: str) -> bool:
    return any(sample.kind == kind and sample.subject == subject for sample in samples)


def _values(samples: Sequence[Sample], kind: str, subject: str, measure: str, base: str | None) -> list[float]:
    own = {sample.round: float(getattr(sample, measure)) for sample in samples if (sample.kind, sample.subject) == (kind, subject)}
    if base is None:
        return list(own.values())
    bases = {sample.round: float(getattr(sample, measure)) for sample in samples if (sample.kind, sample.subject) == (kind, base)}
    return [value / bases[number] for number, value in own.items() if bases.get(number)]


def _verdict(kind: str, subject: str, measure: str, a: Sequence[float], b: Sequence[float], p_max: float, share_min: float) -> Verdict:
    ratio = median(b) / median(a)
    change = ratio - 1 if measure.startswith("per_s") else 1 / ratio - 1
    p = permutation_p(a, b)
    if abs(change) < share_min:
        word = "same"
    elif p > p_max:
        word = "unclear"
    else:
        word = "better" if change > 0 else "worse"
    return Verdict(kind, subject, measure, change, p, word)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.compare", description="A verdict on two results files.")
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("--base", default="envoy")
    parser.add_argument("--p", type=float, default=0.1)
    parser.add_argument("--share", type=float, default=0.03)
    wish = parser.parse_args()
    a, b = (msgspec.json.decode(path.read_bytes(), type=Result) for path in (wish.a, wish.b))
    if a.machine.cpu != b.machine.cpu or a.machine.python != b.machine.python:
        print(f"beware: other machines or Pythons: {a.machine.cpu} {a.machine.python}, {b.machine.cpu} {b.machine.python}")
    verdicts = compare(a.samples, b.samples, base=wish.base, p_max=wish.p, share_min=wish.share)
    for each in verdicts:
        print(f"{each.kind:22}{each.subject:14}{each.measure:18}{each.change:>+8.1%}  p {each.p:.2f}  {each.word}")
    return 1 if any(each.word == "worse" and each.subject.startswith("gateway") for each in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
