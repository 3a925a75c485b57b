"""Turns a behaviour and a request into steps: which bytes leave when, and how the connection ends.

Pure, so every fault can be read and tested without a socket. `bench.delivery` performs a plan.
"""

from __future__ import annotations

import enum
import functools
import zlib
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import NamedTuple

import msgspec

from bench.answers import ID_MARK, Ask, Event, Writer, amount_of, dump, error_body, events, json_body
from bench.behaviour import Behaviour

PIECE_BYTES = 65_536
REASONS = {
    200: b"OK",
    400: b"Bad Request",
    401: b"Unauthorized",
    404: b"Not Found",
    429: b"Too Many Requests",
    500: b"Internal Server Error",
}
HTML = b"<!doctype html><html><head><title>Maintenance</title></head><body><h1>Back soon</h1></body></html>\n"


class Ending(enum.Enum):
    """What happens to the connection when the steps are used up."""

    KEEP = "keep"
    CLOSE = "close"  # FIN
    RESET = "reset"  # RST
    HANG = "hang"  # silence until the other side closes


class Step(NamedTuple):
    """`data` leaves `at_s` seconds after the request; then `made` completion tokens are made."""

    at_s: float
    data: bytes
    made: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """An answer. Its steps are made as they are taken; ID_MARK in them stands for the id."""

    steps: Iterator[Step]
    ending: Ending
    status: int
    prompt_tokens: int
    cached_tokens: int
    reasoning_tokens: int


def plan_answer(behaviour: Behaviour, ask: Ask, *, created: int, close: bool, http10: bool) -> Plan:
    """The plan for one request. `close`: the caller wants the connection closed; `created` in unix seconds."""
    outcome = _Outcome(behaviour, ask, created, close, http10)
    steps, ending = outcome.choose()
    amount = amount_of(behaviour, ask)
    failed = behaviour.status != 200 or behaviour.error_body
    return Plan(
        steps=steps,
        ending=Ending.CLOSE if ending is Ending.KEEP and outcome.close else ending,
        status=behaviour.status,
        prompt_tokens=0 if failed else amount.prompt,
        cached_tokens=0 if failed else amount.cached,
        reasoning_tokens=0 if failed else amount.reasoning,
    )


def head(status: int, content_type: str, framing: bytes, *, close: bool, extra: dict[str, str] | None = None) -> bytes:
    """A response head. `framing` is a whole header line with its CRLF, or empty."""
    lines = [b"HTTP/1.1 %d %b\r\nContent-Type: %b\r\n" % (status, REASONS.get(status, b"Status"), content_type.encode())]
    lines.append(framing)
    lines += [f"{name}: {value}\r\n".encode("latin-1") for name, value in (extra or {}).items()]
    lines.append(b"X-Request-Id: req-%b\r\n" % ID_MARK)
    if close:
        lines.append(b"Connection: close\r\n")
    return b"".join([*lines, b"\r\n"])


def whole(status: int, body: bytes, *, content_type: str = "application/json", close: bool = False) -> bytes:
    """A complete response without an id."""
    start = b"HTTP/1.1 %d %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n"
    end = b"Connection: close\r\n\r\n" if close else b"\r\n"
    return start % (status, REASONS.get(status, b"Status"), content_type.encode(), len(body)) + end + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class _Outcome:
    """Chooses and makes the steps of one answer."""

    def __init__(self, behaviour: Behaviour, ask: Ask, created: int, close: bool, http10: bool) -> None:
        self.behaviour, self.ask, self.created = behaviour, ask, created
        automatic = "chunked" if ask.stream else "length"
        framing = automatic if behaviour.framing == "auto" else behaviour.framing
        self.framing = "close" if http10 and framing == "chunked" else framing
        self.close = close or self.framing == "close"
        self.start_s = behaviour.headers_delay_ms / 1000
        self.first_s = self.start_s + behaviour.ttft_ms / 1000
        self.frame: Callable[[bytes], bytes] = chunk if self.framing == "chunked" else bytes

    def choose(self) -> tuple[Iterator[Step], Ending]:
        behaviour = self.behaviour
        if behaviour.refuse:
            return iter(()), Ending.CLOSE
        if behaviour.silent_accept:
            return iter(()), Ending.HANG
        if behaviour.raw:
            return self._raw(), Ending.CLOSE if behaviour.raw_close else Ending.KEEP
        if behaviour.status != 200 or behaviour.error_body:
            return self._body(error_body(behaviour, behaviour.status), self.start_s), Ending.KEEP
        if behaviour.empty:
            return self._body(b"", self.start_s), Ending.KEEP
        if behaviour.html:
            return self._body(HTML, self.start_s, "text/html; charset=utf-8"), Ending.KEEP
        if behaviour.huge_line:
            return self._pieces(self._huge_line()), Ending.KEEP
        if behaviour.gzip_bomb:
            return self._pieces(gzip_bomb(behaviour.gzip_bomb), {"Content-Encoding": "gzip"}), Ending.KEEP
        return (self._stream() if self.ask.stream else self._json()), self._fault_ending()

    def _fault_ending(self) -> Ending:
        behaviour = self.behaviour
        for limit, ending in (
            (behaviour.reset_after_events, Ending.RESET),
            (behaviour.close_after_events, Ending.CLOSE),
            (behaviour.stall_after_events, Ending.HANG),
        ):
            if limit is not None:
                return ending
        return Ending.KEEP

    def _head(self, length: Callable[[], int], content_type: str = "", extra: dict[str, str] | None = None) -> bytes:
        kind = content_type or ("text/event-stream" if self.ask.stream else "application/json")
        if self.framing == "length":
            framing = b"Content-Length: %d\r\n" % length()
        else:
            framing = b"Transfer-Encoding: chunked\r\n" if self.framing == "chunked" else b""
        return head(self.behaviour.status, kind, framing, close=self.close, extra=self.behaviour.headers | (extra or {}))

    def _body(self, body: bytes, at_s: float, content_type: str = "") -> Iterator[Step]:
        """Head and body at once."""
        kind = content_type or ("application/json" if body else "")
        extra = {"Retry-After": self.behaviour.retry_after} if self.behaviour.retry_after else None
        framed = self.frame(body) if body else b""
        yield Step(at_s, self._head(lambda: len(body), kind, extra) + framed + self._terminator(), 0)

    def _terminator(self) -> bytes:
        return b"0\r\n\r\n" if self.framing == "chunked" else b""

    def _raw(self) -> Iterator[Step]:
        gap_s = self.behaviour.raw_gap_ms / 1000
        for number, data in enumerate(self.behaviour.raw):
            yield Step(self.start_s + number * gap_s, data, 0)

    def _pieces(self, pieces: Callable[[], Iterator[bytes]], extra: dict[str, str] | None = None) -> Iterator[Step]:
        yield Step(self.start_s, self._head(lambda: sum(map(len, pieces())), extra=extra), 0)
        for piece in pieces():
            yield Step(self.first_s, self.frame(piece), 0)
        yield Step(self.first_s, self._terminator(), 0)

    def _huge_line(self) -> Callable[[], Iterator[bytes]]:
        opening = b'data: {"id":"' if self.ask.stream else b'{"id":"'
        full = b"x" * PIECE_BYTES

        def pieces() -> Iterator[bytes]:
            yield opening
            for _ in range(self.behaviour.huge_line // PIECE_BYTES):
                yield full
            if rest := self.behaviour.huge_line % PIECE_BYTES:
                yield full[:rest]

        return pieces

    def _json(self) -> Iterator[Step]:
        behaviour = self.behaviour
        amount = amount_of(behaviour, self.ask)
        done_s = self.first_s + (amount.completion / behaviour.tokens_per_s if behaviour.tokens_per_s else 0.0)
        if behaviour.error_event_after is not None:
            yield from self._body(error_body(behaviour, 500), done_s)
            return
        body = json_body(behaviour, self.ask, self.created)
        if behaviour.truncated_json:
            body = body[: len(body) // 2]
        if self._fault_ending() is Ending.KEEP:
            yield Step(done_s, self._head(lambda: len(body)) + self.frame(body) + self._terminator(), amount.completion)
        else:
            yield Step(done_s, self._head(lambda: len(body)) + self.frame(body)[: len(body) // 2], 0)

    def _stream(self) -> Iterator[Step]:
        behaviour = self.behaviour
        beat_s = 1 / behaviour.tokens_per_s if behaviour.tokens_per_s else 0.0
        yield Step(self.start_s, self._head(lambda: sum(len(event.data) for event in self._events())), 0)
        for event in self._events():
            yield Step(self.first_s + event.beat * beat_s, self.frame(event.data), event.made)
        if self._fault_ending() is Ending.KEEP and (terminator := self._terminator()):
            yield Step(0.0, terminator, 0)

    def _events(self) -> Iterator[Event]:
        """The stream's events with in-band faults applied."""
        behaviour = self.behaviour
        healthy = events(behaviour, self.ask, self.created)
        if behaviour.truncated_json:
            return self._truncated(healthy)
        if (limit := behaviour.events_max()) is None:
            return healthy
        cut = islice(healthy, limit)
        return cut if behaviour.error_event_after is None else self._with_error(cut)

    def _with_error(self, before: Iterator[Event]) -> Iterator[Event]:
        last = Event(b"", 0, 0)
        for event in before:
            last = event
            yield event
        data = Writer(self.behaviour, self.ask, self.created).event(error_body(self.behaviour, 500))
        yield Event(data, last.made, last.beat)

    def _truncated(self, healthy: Iterator[Event]) -> Iterator[Event]:
        """Two events, the second cut inside its JSON."""
        first, second = islice(chain(healthy, (Event(b"", 0, 0),) * 2), 2)
        yield first
        yield Event(second.data[: len(second.data) // 2], 0, second.beat)


def gzip_bomb(inflated_bytes: int) -> Callable[[], Iterator[bytes]]:
    """Pieces of one gzip member that inflates to that many bytes (rounded up to whole MiB) of one JSON string."""

    def pieces() -> Iterator[bytes]:
        data = _bomb(max(1, -(-inflated_bytes // 1_048_576)))
        for start in range(0, len(data), PIECE_BYTES):
            yield data[start : start + PIECE_BYTES]

    return pieces


@functools.lru_cache(maxsize=4)
def _bomb(mebibytes: int) -> bytes:
    """After a full flush a deflated block stands alone, so one MiB is compressed once and repeated."""
    filler = b" " * 1_048_576
    opening = b'data: {"id":"'
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = deflate.compress(opening) + deflate.flush(zlib.Z_FULL_FLUSH)
    block = deflate.compress(filler) + deflate.flush(zlib.Z_FULL_FLUSH)
    checksum = zlib.crc32(opening)
    for _ in range(mebibytes):
        checksum = zlib.crc32(filler, checksum)
    size = (len(opening) + mebibytes * len(filler)) & 0xFFFFFFFF
    trailer = checksum.to_bytes(4, "little") + size.to_bytes(4, "little")
    return b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff" + first + block * mebibytes + deflate.flush() + trailer


def models_body(names: list[str], owner: str) -> bytes:
    """The models list in OpenAI's shape."""
    return dump({"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": owner} for name in names]})
