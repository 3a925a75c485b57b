"""A provider's answer head that comes again is not parsed again, and whatever is not that very head is: both ways run side by side."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator

import pytest
from multidict import CIMultiDictProxy

from gateway.domain.errors import GatewayError
from gateway.edge import connection as connection_module
from gateway.edge.connection import ProviderConnection
from gateway.edge.known_heads import _ACTED_ON, VALUE_BYTES_MAX, KnownHeads
from gateway.edge.resolver import Resolver
from gateway.edge.upstream import CallListener, Origin, Pool
from tests.decisions.test_shortcuts import BODY, LENGTHS, LINES, MUTANTS

ANSWERS = [
    b"HTTP/1.1 200 OK\r\ndate: Mon, 02 Nov 2026 10:00:00 GMT\r\ncontent-length: 15\r\ncontent-type: application/json\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
]
CHUNKS = b"f\r\n%b\r\n0\r\n\r\n" % BODY


def altered(head: bytes) -> Iterator[bytes]:
    """Answers that begin like one with this head, or nearly so."""
    body = BODY if b"-length" in head else CHUNKS
    yield from (head + body, head, head + body[:4], head + body + b"more", head + b"0\r\n\r\n", head[:-2], head[:9])
    for at in range(len(head)):
        yield head[:at] + head[at + 1 :] + body
        for byte in MUTANTS:
            yield head[:at] + byte + head[at + 1 :] + body
            yield head[:at] + byte + head[at:] + body
    for length in (*LENGTHS, b"3"):
        yield head.replace(b": 15\r", b": %b\r" % length) + body
    borders = [at + 2 for at in range(len(head)) if head.startswith(b"\r\n", at)]
    for line in (*LINES, b"HTTP/1.1 200 OK\r\n", b"Retry-After: 1\r\n"):
        for at in borders:
            yield head[:at] + line + head[at:] + body
    for status in (b"100 Continue", b"204 No Content", b"304 Not Modified", b"404 Not Found", b"200 Ok"):
        yield head.replace(b"200 OK", status) + body
    yield head.replace(b"1.1", b"1.0") + body


class Line(asyncio.Transport):
    """A transport to nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def write(self, data: object) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closed

    def is_reading(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True

    abort = close


class Heard(CallListener):
    """What a call tells its listener."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def on_head(self, status: int, headers: CIMultiDictProxy[str]) -> None:
        self.told.append((status, [(name, value) for name, value in headers.items() if name.lower() in _ACTED_ON]))

    def on_data(self, data: bytes) -> None:
        self.told.append(data)

    def on_end(self) -> None:
        self.told.append("end")

    def on_failed(self, error: GatewayError) -> None:
        self.told.append(error.message)


def heard(data: bytes, heads: KnownHeads, *, bodyless: bool = False) -> tuple[list[object], bool]:
    """What an answer of these bytes tells, and whether its connection may be used again."""
    pool = Pool(Origin("127.0.0.1", 1), resolver=Resolver(), tls=None, calls_max=1)
    pool.heads = heads
    connection, listener = ProviderConnection(pool), Heard()
    connection.connection_made(Line())
    pool.keep(connection)
    pool.call(b"request", listener, connect_s=1, bodyless=bodyless)
    connection.data_received(data)
    return listener.told, connection.usable()


@pytest.mark.parametrize("head", ANSWERS)
@pytest.mark.parametrize("bodyless", [False, True])
async def test_an_answer_of_a_known_head_tells_what_it_tells_to_a_stranger(head: bytes, bodyless: bool) -> None:
    known = KnownHeads()
    for each in ANSWERS:
        heard(each + (BODY if b"-length" in each else CHUNKS), known)
    for data in altered(head):
        assert heard(data, copy.copy(known), bodyless=bodyless) == heard(data, KnownHeads(), bodyless=bodyless), data


@pytest.mark.parametrize("head", ANSWERS)
async def test_what_nobody_acts_on_may_be_another_each_time(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    head = head.replace(b"\r\n\r\n", b"\r\nX-Request-Id: req-1\r\nDate: today\r\n\r\n")
    body = BODY if b"-length" in head else CHUNKS
    known = KnownHeads()
    first = heard(head + body, known)
    other = head.replace(b"req-1", b"req-" + b"2" * 40).replace(b"today", b"")
    with monkeypatch.context() as patched:
        patched.setattr(connection_module, "HttpResponseParser", lambda *a, **k: None)
        assert heard(other + body, known) == first
    for broken in (b"\0", b"\xff", b"\r", b"\n", b"\r\nContent-Length: 3", b"2" * VALUE_BYTES_MAX * 8):
        data = head.replace(b"req-1", broken) + body
        assert heard(data, known) == heard(data, KnownHeads())


async def test_a_head_that_comes_again_is_not_parsed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    known = KnownHeads()
    for head in ANSWERS:
        body = BODY if b"-length" in head else CHUNKS
        first = heard(head + body, known)
        with monkeypatch.context() as patched:
            patched.setattr(connection_module, "HttpResponseParser", lambda *a, **k: None)
            assert heard(head + body, known) == first
