"""Closed-loop load over keep-alive connections: every connection sends its next request when the answer is complete.

For JSON answers and SSE bursts (`closed_loop`), and for long paced streams whose events are counted (`Paced`). A closed loop
tells throughput honestly and latency only at that throughput: a slow server is asked less. No pipelining, no retries.

    python -m bench.load --url http://127.0.0.1:9001/v1/chat/completions --body body.json --connections 64 --seconds 5

prints a Report as one JSON line. An answer counts as an error when its status is not 200, when the connection breaks, or when
a stream ends without `[DONE]`.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, cast
from urllib.parse import urlsplit

import msgspec
import uvloop

HEAD_BYTES_MAX = 65_536
BODY_END = b"0\r\n\r\n"
TAIL_BYTES = 32  # holds `[DONE]` and the end of the chunked body
BREAKS_MAX = 100  # per connection; then the server is down, not flaky


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One request, sent again and again."""

    url: str  # http://host:port/path
    body: bytes
    stream: bool = False
    headers: dict[str, str] = {}

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname or "127.0.0.1", parts.port or 80

    def request(self) -> bytes:
        parts = urlsplit(self.url)
        given = {"Host": parts.netloc, "Content-Type": "application/json", "Content-Length": str(len(self.body))} | self.headers
        lines = [f"POST {parts.path or '/'} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + self.body


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a loop saw. Latencies are from sending a request to the last byte of its answer."""

    tool: str
    connections: int
    seconds: float
    requests: int
    errors: int
    requests_per_s: float
    latency_ms_p50: float
    latency_ms_p99: float
    latency_ms_max: float
    latency_ms_p90: float | None = None  # these three of bench.load alone
    latency_ms_p999: float | None = None
    late_ms_p99: float | None = None  # open loop: how late the loader itself sent what was due
    events: int | None = None  # SSE events, where the tool can see them


def percentile(ordered: Sequence[float], share: float) -> float:
    """The nearest-rank percentile of sorted values; 0 for none."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


class Tally:
    """Counts of one loop, shared by its connections."""

    def __init__(self) -> None:
        self.latencies_s = array("d")
        self.errors = 0
        self.events = 0
        self.first_error = ""

    def failed(self, what: str) -> None:
        self.errors += 1
        self.first_error = self.first_error or what

    def report(self, connections: int, seconds: float) -> Report:
        ordered = sorted(self.latencies_s)
        return Report(
            tool="bench.load",
            connections=connections,
            seconds=seconds,
            requests=len(ordered),
            errors=self.errors,
            requests_per_s=len(ordered) / seconds,
            latency_ms_p50=percentile(ordered, 0.5) * 1000,
            latency_ms_p99=percentile(ordered, 0.99) * 1000,
            latency_ms_max=percentile(ordered, 1.0) * 1000,
            latency_ms_p90=percentile(ordered, 0.9) * 1000,
            latency_ms_p999=percentile(ordered, 0.999) * 1000,
            events=self.events,
        )


class LoadConnection(asyncio.Protocol):
    """Sends the request, reads its answer, again until stopped. `lost` is done when the connection is gone."""

    def __init__(self, target: Target, request: bytes, tally: Tally, first_event: asyncio.Event | None = None) -> None:
        self._stream = target.stream
        self._request = request
        self._tally = tally
        self._first_event = first_event
        self._head = b""
        self._in_body = False
        self._left = -1  # bytes of the body; -1: chunked or until close
        self._tail = b""
        self._sent_s = 0.0
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.stopped = False
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by class
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.stopped:
            self._tally.failed(f"connection lost: {exc or 'closed by the server'}")
        if not self.lost.done():  # cancelled with whoever waited for it
            self.lost.set_result(None)

    def stop(self) -> None:
        self.stopped = True
        self.transport.abort()

    def _send(self) -> None:
        self._head, self._in_body, self._left, self._tail = b"", False, -1, b""
        self._sent_s = time.perf_counter()
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if self.stopped:
            return
        if self._in_body:
            self._read_body(data)
            return
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end >= 0:
            body = self._head[end + 4 :]
            self._read_head(self._head[:end])
            if body or self._left == 0:
                self._read_body(body)
        elif len(self._head) > HEAD_BYTES_MAX:
            self._fail("head too long")

    def _read_head(self, head: bytes) -> None:
        self._in_body = True
        if head[9:12] != b"200":
            self._fail(f"status {head[9:12].decode('latin-1')}")
            return
        self._left = self.length_of(head)

    @staticmethod
    def length_of(head: bytes) -> int:
        """Bytes of the body that follows this head; -1: chunked or until close."""
        lowered = head.lower()
        at = lowered.find(b"\r\ncontent-length:")
        return int(lowered[at + 17 :].partition(b"\r\n")[0]) if at >= 0 else -1

    def _read_body(self, data: bytes) -> None:
        if self.stopped:
            return
        joined = self._tail + data
        if self._stream:
            # The tail holds events that were counted before: only what begins in its last 5 bytes is new.
            count = joined.count(b"data: ", max(0, len(self._tail) - 5))
            self._tally.events += count
            if count and self._first_event is not None:
                self._first_event.set()
        self._tail = joined[-TAIL_BYTES:]
        if self._left >= 0:
            self._left -= len(data)
            complete = self._left <= 0
        else:
            complete = self._tail.endswith(BODY_END)
        if complete:
            self._complete()

    def _complete(self) -> None:
        if self._stream and b"[DONE]" not in self._tail:
            self._fail("stream without [DONE]")
            return
        self._tally.latencies_s.append(time.perf_counter() - self._sent_s)
        self._next()

    def _next(self) -> None:
        self._send()

    def _fail(self, what: str) -> None:
        self._tally.failed(what)
        self.stop()


async def closed_loop(target: Target, *, connections: int, seconds: float) -> Report:
    """Keeps `connections` requests in flight for that long. Raises an ExceptionGroup of OSError
    when the server cannot be reached."""
    tally, request = Tally(), target.request()
    began = time.perf_counter()
    try:
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(_keep_asking(target, request, tally))
    except TimeoutError:
        pass
    return tally.report(connections, time.perf_counter() - began)


async def _keep_asking(target: Target, request: bytes, tally: Tally) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(BREAKS_MAX):
        _, connection = await loop.create_connection(partial(LoadConnection, target, request, tally), *target.address)
        try:
            await connection.lost
        finally:
            connection.stop()


class Paced:
    """Long streams, open side by side; `events` counts what has arrived so far.

    `async with Paced(target, streams=100) as paced` returns from entering when every stream has had its first event.
    """

    def __init__(
        self, target: Target, *, streams: int, begin_s_max: float = 30.0, on_begun: Callable[[int], None] = lambda number: None
    ) -> None:
        """They have `begin_s_max` to begin, all together; `on_begun` is told how many have."""
        self._target = target
        self._streams = streams
        self._begin_s_max = begin_s_max
        self._on_begun = on_begun
        self._tally = Tally()
        self._open: list[LoadConnection] = []

    @property
    def events(self) -> int:
        return self._tally.events

    @property
    def errors(self) -> int:
        return self._tally.errors

    @property
    def first_error(self) -> str:
        return self._tally.first_error

    async def __aenter__(self) -> Self:
        loop, request = asyncio.get_running_loop(), self._target.request()
        started = [asyncio.Event() for _ in range(self._streams)]
        try:
            async with asyncio.timeout(self._begin_s_max):
                for event in started:
                    made = partial(LoadConnection, self._target, request, self._tally, event)
                    _, connection = await loop.create_connection(made, *self._target.address)
                    self._open.append(connection)
                for number, event in enumerate(started):
                    await event.wait()
                    self._on_begun(number + 1)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._close()

    async def _close(self) -> None:
        for connection in self._open:
            connection.stop()
        for connection in self._open:
            await connection.lost


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.load", description="Closed-loop load, or open-loop with --rate.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--body", type=Path, required=True, help="file with the request's JSON")
    parser.add_argument("--stream", action="store_true", help="answers are SSE")
    parser.add_argument("--header", action="append", default=[], metavar="NAME:VALUE")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second, whatever comes back; 0: a closed loop")
    arguments = parser.parse_args()
    headers = {name: value.strip() for name, _, value in (text.partition(":") for text in arguments.header)}
    target = Target(url=arguments.url, body=arguments.body.read_bytes(), stream=arguments.stream, headers=headers)
    if arguments.rate:
        from bench.open_loop import open_loop  # it builds on this module

        report = uvloop.run(open_loop(target, rate_per_s=arguments.rate, connections=arguments.connections, seconds=arguments.seconds))
    else:
        report = uvloop.run(closed_loop(target, connections=arguments.connections, seconds=arguments.seconds))
    print(msgspec.json.encode(report).decode())


if __name__ == "__main__":
    main()
