"""Each stage of the path alone, in microseconds, summing to the whole, so that a regression has a name.

    python -m bench.micro [json|sse] [--requests 100] [--runs 100]

The stages are the edge's own functions inside `bench.replay`, each wrapped with a clock that takes away what stages within it took and
what the clocks cost. That is the difference between the wrapped path and the bare one, spread over the wrapped calls; what they cost
around an empty function is printed beside it: the rest of it is what code loses by being called through a wrapper, and the larger it is,
the less a stage of many calls is to be believed. `rest` is what no stage covers. Of the runs, bare and wrapped in turn, the quickest
count, for noise only adds. A stage whose function is not there any more is named, not left out silently. Below the stages stands what the
choice among 8 endpoints costs with each kind of wish (`bench.decisions`), the reading of the wishes included: the median over batches.
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
from typing import Any

import msgspec
import uvloop

from bench.decisions import ENDPOINTS, TARGET_US, decisions_us
from bench.replay import Replay

# Stage -> the functions it is, as module:name. What a function calls counts to it unless that is another stage.
STAGES = {
    "head": ("gateway.edge.heads:HeadReader.read", "gateway.edge.presented:presented"),
    "repeated head": ("gateway.edge.caller:CallerConnection._on_repeated_head", "gateway.edge.heads:RepeatedHead.match"),
    "new exchange": ("gateway.edge.server:EdgeServer.open_exchange",),
    "known key": (
        "gateway.edge.exchange:InferenceExchange._authenticate",
        "gateway.edge.snapshots:Keys.find",
        "gateway.edge.exchange:InferenceExchange._on_key",
    ),
    "intake": ("gateway.edge.exchange:InferenceExchange._begin", "gateway.edge.intake:Intake.next_turn"),
    "exchange": (
        "gateway.edge.exchange:InferenceExchange._serve",
        "gateway.edge.exchange:InferenceExchange._on_reserved",
        "gateway.edge.exchange:InferenceExchange._next_attempt",
        "gateway.edge.exchange:InferenceExchange._finish",
        "gateway.edge.exchange:InferenceExchange.send_last",
        "gateway.edge.exchange:InferenceExchange.rearm",
    ),
    "parse": ("gateway.wire.envelope:parse",),
    "select": ("gateway.edge.exchange:select",),
    "hold": ("gateway.edge.quotes:worst_nanos", "gateway.edge.admission:Admission.hold_at_once"),
    "rates": ("gateway.edge.rates:Rates.current",),
    "request bytes": ("gateway.wire.envelope:Envelope.body_for", "gateway.edge.providers:Upstream.request"),
    "attempt": ("gateway.edge.attempts:Attempt.start", "gateway.edge.relay:StreamAttempt.start"),
    "provider call": ("gateway.edge.upstream:Pool.call", "gateway.edge.upstream:Call.complete"),
    "endpoint's state": (
        "gateway.routing.live:Live.begin",
        "gateway.routing.live:Live.first_content",
        "gateway.routing.live:Live.succeeded",
    ),
    "answer head": ("gateway.edge.connection:ProviderConnection._on_head_bytes",),
    "known head": ("gateway.edge.known_heads:KnownHeads.find", "gateway.edge.connection:ProviderConnection._on_known_head"),
    "answer body": (
        "gateway.edge.connection:ProviderConnection._on_body_bytes",
        "gateway.edge.attempts:AnswerAttempt._on_answer",
        "gateway.edge.relay:StreamAttempt.on_whole",
    ),
    "dechunk": ("gateway.wire.framing:whole_chunks",),
    "splice": ("gateway.wire.sse:Splicer.splice_pieces", "gateway.wire.shape:Shape.remember"),
    "stream's end": ("gateway.edge.relay:StreamAttempt._on_done",),
    "answer rewrite": ("gateway.wire.answer:rewrite",),
    "settle": (
        "gateway.edge.settlement:Settlement.settle",
        "gateway.edge.settlement:Settlement._let_go",
        "gateway.ledger.book:Hold.settle",
    ),
    "bill": ("gateway.edge.settlement:Settlement._bill", "gateway.edge.settlement:Bill.usage_json"),
    "record": (
        "gateway.edge.settlement:Settlement._settled",
        "gateway.edge.settlement:_record",
        "gateway.wire.records:encode",
    ),
    "journal write": ("gateway.edge.journal:Journal.append",),
    "report": ("gateway.edge.report:ExchangeReport.finished",),
    "log line": ("gateway.log:Log.structs",),
    "answer bytes": (
        "gateway.edge.caller:CallerConnection.answer",
        "gateway.edge.caller:CallerConnection.stream",
        "gateway.edge.caller:CallerConnection.begin_stream",
        "gateway.edge.caller:CallerConnection.answer_stream",
        "gateway.edge.caller:CallerConnection.end_stream",
    ),
}
REST = "rest"
SUMS = {
    "admission with a warm lease": (("select", "hold", "rates"), 15.0),
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

    @property
    def empty_us(self) -> float:
        """What all calls so far would have cost around empty functions."""
        return (sum(self.calls.values()) * self.inner_ns + sum(self.below.values()) * self.outer_ns) / 1000

    def own_us(self, stage: str, times: float) -> float:
        """Its own time, without what the clocks cost: one call itself, and one call of each stage within it, `times` the empty ones'."""
        overhead_ns = self.calls.get(stage, 0) * self.inner_ns + self.below.get(stage, 0) * self.outer_ns
        return (self.own_ns.get(stage, 0) - times * overhead_ns) / 1000

    def clear(self) -> None:
        for counts in (self.own_ns, self.calls, self.below):
            counts.clear()

    def _calibrate(self) -> tuple[float, float]:
        """The quickest of a few tries: noise only adds."""

        def nothing(argument: object) -> None: ...

        timed, number, found = self.wrap("nothing", nothing), 2_000, []
        for _ in range(20):
            began = time.perf_counter_ns()
            for _ in range(number):
                nothing(None)
            bare_ns = time.perf_counter_ns() - began
            self.clear()
            began = time.perf_counter_ns()
            for _ in range(number):
                timed(None)
            whole_ns = time.perf_counter_ns() - began
            found.append((whole_ns, bare_ns, self.own_ns["nothing"]))
        whole_ns, bare_ns, measured_ns = (min(each) / number for each in zip(*found, strict=True))
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


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Microseconds per request."""

    stages: dict[str, float]  # `rest` included
    whole: float
    clocks: float  # what the wrapped path took more
    empty_clocks: float  # what as many clocks cost around empty functions
    missing: list[str]  # functions that are not there


async def measure(kind: str, requests: int, runs: int) -> Measured:
    bare, wrapped, missing = float("inf"), float("inf"), list[str]()
    clocks, best = Clocks(), Clocks()
    with tempfile.TemporaryDirectory() as folder:
        replay = Replay(Path(folder), kind)
        timed_us(replay.once, 200)
        for _ in range(runs):
            await asyncio.sleep(0)
            bare = min(bare, timed_us(replay.once, requests))
            clocks.clear()
            with clocked(clocks) as missing:
                took_us = timed_us(clocks.wrap(REST, replay.once), requests)
            if took_us < wrapped:
                wrapped, best, clocks = took_us, clocks, best
    empty_us = best.empty_us / requests
    times = max(0.0, wrapped - bare) / empty_us
    stages = {stage: best.own_us(stage, times) / requests for stage in (*STAGES, REST) if stage in best.calls}
    return Measured(stages=stages, whole=bare, clocks=wrapped - bare, empty_clocks=empty_us, missing=missing)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.micro", description="Each stage of the path in microseconds.")
    parser.add_argument("kind", nargs="?", choices=["json", "sse"], default="json")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--runs", type=int, default=100)
    wish = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = uvloop.run(measure(wish.kind, wish.requests, wish.runs))
    for stage, took_us in found.stages.items():
        each = f"  {took_us / EVENTS:.2f} an event" if stage in ("dechunk", "splice") else ""
        print(f"{stage:30}{took_us:8.2f} us{took_us / found.whole:8.1%}{each}")
    total = sum(found.stages.values())
    print(f"{'sum':30}{total:8.2f} us, {total / found.whole - 1:+.1%} of the whole")
    print(f"{'whole':30}{found.whole:8.2f} us")
    print(f"{'taken away for the clocks':30}{found.clocks:8.2f} us, {found.empty_clocks:.2f} around empty functions")
    for name, (parts, target_us) in SUMS.items():
        took_us = sum(found.stages.get(part, 0.0) for part in parts)
        print(f"{name:30}{took_us:8.2f} us  target {target_us:.0f}  {'met' if took_us <= target_us else 'MISSED'}")
    print(f"\nselection among {ENDPOINTS} endpoints with wishes, target {TARGET_US:.0f}")
    for name, took_us in decisions_us(wish.runs).items():
        print(f"{name:30}{took_us:8.2f} us  {'met' if took_us <= TARGET_US else 'MISSED'}")
    for each in found.missing:
        print(f"not there: {each}")


if __name__ == "__main__":
    main()
