"""Each stage of the path alone, in microseconds, summing to the whole, so that a regression has a name.

    python -m bench.micro [json|sse] [--requests 500] [--runs 5]

The stages are the edge's own functions inside `bench.replay`, each wrapped with a clock that takes away what stages within it took
and what the clock itself costs: the difference between a wrapped and a bare run, spread over the wrapped calls. `rest` is what no
stage covers; the whole is measured unwrapped. One core, the median of the runs. A stage whose function is not there any more is
named, not left out silently.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import uvloop

from bench.replay import Replay

# Stage -> the functions it is, as module:name. What a function calls counts to it unless that is another stage.
STAGES = {
    "head": ("gateway.edge.heads:HeadReader.read", "gateway.edge.presented:presented"),
    "repeated head": ("gateway.edge.caller:CallerConnection._on_repeated_head",),
    "parse": ("gateway.wire.envelope:parse",),
    "select": ("gateway.edge.exchange:select",),
    "hold": ("gateway.edge.quotes:worst_nanos", "gateway.edge.admission:Admission.hold_at_once"),
    "request bytes": ("gateway.wire.envelope:Envelope.body_for", "gateway.edge.providers:Upstream.request"),
    "provider call": ("gateway.edge.upstream:Pool.call", "gateway.edge.upstream:Call.complete"),
    "answer head": ("gateway.edge.connection:ProviderConnection._on_head_bytes",),
    "answer body": ("gateway.edge.connection:ProviderConnection._on_body_bytes",),
    "dechunk": ("gateway.wire.framing:whole_chunks",),
    "splice": ("gateway.wire.sse:Splicer.splice_pieces",),
    "answer rewrite": ("gateway.wire.answer:rewrite",),
    "settle": ("gateway.ledger.book:Hold.settle",),
    "bill": ("gateway.edge.settlement:Settlement._bill", "gateway.edge.settlement:Bill.usage_json"),
    "record": ("gateway.edge.settlement:_record", "gateway.wire.records:encode"),
    "journal write": ("gateway.edge.journal:Journal.append",),
    "report": ("gateway.edge.report:ExchangeReport.finished",),
    "log line": ("gateway.log:Log.structs",),
    "answer bytes": (
        "gateway.edge.caller:CallerConnection.answer",
        "gateway.edge.caller:CallerConnection.stream",
        "gateway.edge.caller:CallerConnection.begin_stream",
        "gateway.edge.caller:CallerConnection.end_stream",
    ),
}
SUMS = {
    "admission with a warm lease": (("select", "hold"), 15.0),
    "settle + journal": (("settle", "bill", "record", "journal write"), 25.0),
}
EVENTS = 24  # of the replayed stream


class Clocks:
    """Self time and calls by stage; `inner_ns` and `outer_ns` are what one wrapped call adds to itself and to its caller."""

    def __init__(self) -> None:
        self.own_ns: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self.below: dict[str, int] = {}  # wrapped calls made directly from within
        self._inside = [[0, 0]]  # of the calls under way: time of stages within, and their number
        self.inner_ns, self.outer_ns = self._calibrate()

    def wrap(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        clock, inside = time.perf_counter_ns, self._inside

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            within = [0, 0]
            inside.append(within)
            began = clock()
            try:
                return function(*arguments, **named)
            finally:
                took = clock() - began
                inside.pop()
                inside[-1][0] += took
                inside[-1][1] += 1
                self.own_ns[stage] = self.own_ns.get(stage, 0) + took - within[0]
                self.calls[stage] = self.calls.get(stage, 0) + 1
                self.below[stage] = self.below.get(stage, 0) + within[1]

        return timed

    def own_us(self, stage: str, overhead_us: float) -> float:
        """Its own time, where all wrapped calls together cost `overhead_us`; an empty function tells only how that splits."""
        each_ns = overhead_us * 1000 / max(1, sum(self.calls.values()))
        inner_ns = each_ns * self.inner_ns / (self.inner_ns + self.outer_ns)
        own_ns = self.own_ns.get(stage, 0) - self.calls.get(stage, 0) * inner_ns - self.below.get(stage, 0) * (each_ns - inner_ns)
        return max(0.0, own_ns) / 1000

    def clear(self) -> None:
        for counts in (self.own_ns, self.calls, self.below):
            counts.clear()

    def _calibrate(self) -> tuple[float, float]:
        def nothing(argument: object) -> None: ...

        timed, number = self.wrap("nothing", nothing), 20_000
        began = time.perf_counter_ns()
        for _ in range(number):
            nothing(None)
        bare_ns = (time.perf_counter_ns() - began) / number
        began = time.perf_counter_ns()
        for _ in range(number):
            timed(None)
        whole_ns = (time.perf_counter_ns() - began) / number
        measured_ns = self.own_ns["nothing"] / number
        self.clear()
        return max(0.0, measured_ns - bare_ns), max(0.0, whole_ns - measured_ns)


@contextmanager
def clocked(clocks: Clocks) -> Iterator[list[str]]:
    """The edge with its stages wrapped; gives the functions that are not there. Modules that imported a function by name get it too."""
    undo: list[tuple[Any, str, Any]] = []
    missing = []
    modules = [module for name, module in sys.modules.items() if name.startswith("gateway.")]
    try:
        for stage, functions in STAGES.items():
            for function in functions:
                module, _, path = function.partition(":")
                owner_name, _, name = path.rpartition(".")
                loaded = importlib.import_module(module)
                owner = getattr(loaded, owner_name, None) if owner_name else loaded
                found = vars(owner).get(name) if owner is not None else None
                if not callable(found):
                    missing.append(f"{stage}: {function}")
                    continue
                wrapped = clocks.wrap(stage, found)
                for each in [owner] if owner_name else modules:
                    for known, value in list(vars(each).items()):
                        if value is found:
                            undo.append((each, known, value))
                            setattr(each, known, wrapped)
        yield missing
    finally:
        for each, known, value in reversed(undo):
            setattr(each, known, value)


def timed_us(step: Callable[[], object], requests: int) -> float:
    began = time.perf_counter_ns()
    for _ in range(requests):
        step()
    return (time.perf_counter_ns() - began) / requests / 1000


async def measure(kind: str, requests: int, runs: int) -> tuple[dict[str, float], float, list[str]]:
    """Microseconds per request by stage, `rest` included; the whole; functions that are not there."""
    clocks, wholes = Clocks(), []
    stages: dict[str, list[float]] = {}  # those that this kind of request comes through, also where the clock finds nothing
    missing: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(runs):
            place = Path(folder) / str(number)
            place.mkdir()
            replay = Replay(place, kind)
            timed_us(replay.once, 200)
            await asyncio.sleep(0)
            wholes.append(timed_us(replay.once, requests))
            with clocked(clocks) as missing:
                clocks.clear()
                wrapped = timed_us(replay.once, requests)
            overhead_us = max(0.0, wrapped - wholes[-1]) * requests
            for stage in STAGES.keys() & clocks.calls.keys():
                stages.setdefault(stage, []).append(clocks.own_us(stage, overhead_us) / requests)
            await asyncio.sleep(0)
    whole = median(wholes)
    found = {stage: median(stages[stage]) for stage in STAGES if stage in stages}
    return found | {"rest": whole - sum(found.values())}, whole, missing


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.micro", description="Each stage of the path in microseconds.")
    parser.add_argument("kind", nargs="?", choices=["json", "sse"], default="json")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--runs", type=int, default=5)
    wish = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    stages, whole, missing = uvloop.run(measure(wish.kind, wish.requests, wish.runs))
    for stage, took_us in stages.items():
        each = f"  {took_us / EVENTS:.2f} an event" if stage in ("dechunk", "splice") else ""
        print(f"{stage:30}{took_us:8.2f} us{took_us / whole:8.1%}{each}")
    print(f"{'whole':30}{whole:8.2f} us")
    for name, (parts, target_us) in SUMS.items():
        took_us = sum(stages.get(part, 0.0) for part in parts)
        print(f"{name:30}{took_us:8.2f} us  target {target_us:.0f}  {'met' if took_us <= target_us else 'MISSED'}")
    for each in missing:
        print(f"not there: {each}")


if __name__ == "__main__":
    main()
