"""One request through the edge's own objects, without sockets: where the interpreter's time goes.

`python -m bench.replay [json|sse]` prints microseconds per request, bytecodes per request, and the functions that execute
most of them. Bytecodes do not depend on the machine or its neighbours: the same code gives the same count.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, cast

import uvloop

from gateway.domain.catalog import Catalog, DataPolicy, Endpoint, Model, Price, Provider
from gateway.domain.keys import KeyRecord
from gateway.edge.admission import Admission
from gateway.edge.caller import CallerConnection
from gateway.edge.connection import ProviderConnection
from gateway.edge.content import Contents
from gateway.edge.journal import Journal
from gateway.edge.parts import Parts
from gateway.edge.providers import Providers
from gateway.edge.report import ExchangeReport
from gateway.edge.server import EdgeServer
from gateway.edge.settlement import Settlement
from gateway.edge.site import Site
from gateway.edge.snapshots import Choice, Keys, choices_of
from gateway.edge.telemetry import Telemetry
from gateway.ledger.book import Book
from gateway.link.client import LinkClient
from gateway.link.messages import Grant, KeyFound, Want
from gateway.log import Log
from gateway.routing.budget import RetryBudget
from gateway.routing.router import Router
from gateway.settings import Billing, Limits, Routing, Server, Timeouts, Upstream

USAGE = {"prompt_tokens": 225, "completion_tokens": 20, "total_tokens": 245}
SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
SECRET = b"sk-or-v1-" + b"a" * 64
ENDPOINT = Endpoint(
    id="acme/sage-1@north", model_id="acme/sage-1", provider="north", tag="north", upstream_model="sage-1",
    price=Price(prompt=2_500_000_000, completion=10_000_000_000), context_length=131072,
)  # fmt: skip
CATALOG = Catalog(
    revision="replay",
    providers={
        "north": Provider(slug="north", name="North", base_url="http://127.0.0.1:1/v1", data=DataPolicy(trains=False, retains=False))
    },
    models={
        "acme/sage-1": Model(id="acme/sage-1", canonical_slug="acme/sage-1", name="Sage", endpoints=(ENDPOINT,), context_length=131072)
    },
)


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def get_extra_info(self, name: str, default: object = None) -> object:
        return ("127.0.0.1", 1) if name == "peername" else default

    def is_closing(self) -> bool:
        return False

    def is_reading(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int) -> None: ...


class KnownKeys:
    """A link that knows every key at once."""

    def find_key(self, digest: str, then: Any) -> None:
        then(KeyFound(id=0, key=KeyRecord(digest=digest, account_id="user", name="replay", label="sk-or-v1-aaa...aaa")))


class Replay:
    """A caller's connection and a provider's, with an edge between."""

    def __init__(self, folder: Path, kind: str) -> None:
        loop = asyncio.get_running_loop()
        telemetry, log = Telemetry(), Log("replay", os.open(os.devnull, os.O_WRONLY))
        book, routing = Book(), Routing()
        router: Router[Choice] = Router(routing)

        def grant(message: object) -> None:
            if isinstance(message, Want):
                admission.on_grant(Grant(message.resource, 10**9))

        admission = Admission(book=book, send=grant, limits=Limits(), now=loop.time)
        admission.on_welcome()
        book.granted("balance:user", 10**15, 0.0)
        self._journal = Journal(
            folder, slot=0, incarnation="replay", fsync="never", fsync_s=0, bytes_max=2**40, on_appended=lambda: None, log=log
        )  # fmt: skip
        self._journal.open()
        providers = Providers(telemetry=telemetry, calls_max=1000)
        providers.update(CATALOG)
        router.replace(CATALOG, choices_of(CATALOG, router, lambda endpoint: True))
        report = ExchangeReport(telemetry, log)
        self._settlement = Settlement(journal=self._journal, report=report, billing=Billing(), log=log)
        parts = Parts(
            keys=Keys(cast(LinkClient, KnownKeys())),
            admission=admission,
            settlement=self._settlement,
            site=Site(Server()),
            router=router,
            retries=RetryBudget(share=0.2, per_s=10.0, edges=1, attempts_max=routing.attempts_max, now_s=loop.time()),
            attempts_max=routing.attempts_max,
            providers=providers,
            report=report,
            timeouts=Timeouts(),
            upstream=Upstream(),
            contents=Contents(send=lambda content: None, exchange_bytes_max=2**20, discount_millionths=0),
        )
        self._intake = parts.intake
        upstream = providers.of(ENDPOINT)
        assert upstream is not None
        self._caller_wire, provider_wire = Wire(), Wire()
        self._caller = CallerConnection(EdgeServer(settings=Server(), parts=parts, control=upstream.pool, log=log), Server())
        self._caller.connection_made(cast(asyncio.Transport, self._caller_wire))
        self._provider = ProviderConnection(upstream.pool)
        # What a transport needs here, and no more: the assertion of a whole one is the only thing in the way.
        self._provider._transport = cast(asyncio.Transport, provider_wire)
        upstream.pool.on_opened(self._provider)
        upstream.pool.keep(self._provider)
        self._provider_wire = provider_wire
        self._request, self._answer = request(kind), answer(kind)
        self._event = b""

    def begin_events(self) -> None:
        """A stream that has had its head and first words, and stays open: each `event` from here on is the steady state."""
        frames = sse_frames()
        self._caller.data_received(self._request)
        self._provider.data_received(SSE_HEAD + frames[0] + frames[1])
        self._event = frames[2]
        for _ in range(3):
            self.event()

    def event(self) -> bytes:
        """One paced event through the open stream; what the caller got."""
        self._provider.data_received(self._event)
        got = b"".join(self._caller_wire.written)
        self._caller_wire.written.clear()
        return got

    def once(self) -> bytes:
        """One request and its answer; what the caller got."""
        self._caller.data_received(self._request)
        self._provider.data_received(self._answer)
        self._settlement.settle()  # the loop's own turn would do it, and the next line's
        self._intake.next_turn()
        got = b"".join(self._caller_wire.written)
        self._caller_wire.written.clear()
        self._provider_wire.written.clear()
        return got


def request(kind: str) -> bytes:
    body: dict[str, object] = {"model": "acme/sage-1", "messages": [{"role": "user", "content": "x" * 900}], "max_tokens": 64}
    if kind == "sse":
        body["stream"] = True
    data = json.dumps(body, separators=(",", ":")).encode()
    head = b"POST /api/v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nAuthorization: Bearer %b\r\n" % SECRET
    return head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)


def answer(kind: str) -> bytes:
    common = {"id": "chatcmpl-1", "created": 1, "model": "sage-1"}
    if kind == "json":
        choice = {"index": 0, "message": {"role": "assistant", "content": "y" * 200}, "finish_reason": "stop"}
        data = json.dumps({**common, "object": "chat.completion", "choices": [choice], "usage": USAGE}, separators=(",", ":")).encode()
        return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)
    return b"%b%b0\r\n\r\n" % (SSE_HEAD, b"".join(sse_frames()))


def sse_frames() -> list[bytes]:
    """The chunks of the answer to a streamed request, one event each."""
    common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "sage-1"}
    events: list[dict[str, object]] = [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
    events += [{"delta": {"content": " word"}, "finish_reason": None}] * 20
    events.append({"delta": {}, "finish_reason": "stop"})
    chunks: list[dict[str, object]] = [{**common, "choices": [{"index": 0, **event}]} for event in events]
    chunks.append({**common, "choices": [], "usage": USAGE})
    lines = [b"data: %b\n\n" % json.dumps(each, separators=(",", ":")).encode() for each in chunks]
    return [b"%x\r\n%b\r\n" % (len(line), line) for line in [*lines, b"data: [DONE]\n\n"]]


def bytecodes(step: Callable[[], object]) -> collections.Counter[CodeType]:
    """Bytecodes that one step executes, by function."""
    counted: collections.Counter[CodeType] = collections.Counter()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            counted[frame.f_code] += 1
        return trace

    sys.settrace(trace)
    try:
        step()
    finally:
        sys.settrace(None)
    return counted


async def main(kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        replay = Replay(Path(folder), kind)
        assert b"200 OK" in replay.once()
        for _ in range(500):
            replay.once()
        seconds = []
        for _ in range(20):
            began = time.process_time()
            for _ in range(200):
                replay.once()
            seconds.append((time.process_time() - began) / 200)
            await asyncio.sleep(0)
        counted = bytecodes(replay.once)
    print(f"{kind}: {statistics.median(seconds) * 1e6:.1f} us (best {min(seconds) * 1e6:.1f}), {counted.total():,} bytecodes a request")
    for code, number in counted.most_common(25):
        print(f"{number:6,}  {Path(code.co_filename).name}:{code.co_firstlineno} {code.co_qualname}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", nargs="?", choices=["json", "sse"], default="json")
    uvloop.run(main(parser.parse_args().kind))
