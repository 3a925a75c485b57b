"""One caller's connection: HTTP/1.1 read strictly, one request at a time, every wait bounded.

Heads are read by `edge.heads`, bodies by `wire.framing`. A request in doubt is refused and the connection closed: two
readers of one byte stream must never disagree on where a request ends. What is asked is told to an `Exchange`, which
answers through this object.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable

from gateway.domain.errors import BadRequest, CallerTimeout, GatewayError, HeadersTooLarge, UriTooLong, envelope
from gateway.edge.body import BodyReader
from gateway.edge.deadline import Deadline
from gateway.edge.door import DRAIN_IDLE_S, Door, Exchange
from gateway.edge.heads import HEAD_BYTES_MAX, LINE_BYTES_MAX, HeadReader, RequestHead, body_length, may_be_head
from gateway.edge.responses import CONTINUE, LAST_CHUNK, answer_head, chunk, error_headers, stream_head
from gateway.edge.writes import WriteWatch
from gateway.settings import Server

AHEAD_BYTES_MAX = 65536  # pipelined requests wait here, unread, until the one before is answered
WRITE_HIGH_BYTES = 65536  # above this the upstream is paused
LINGER_S = 2.0  # how long a refused caller may go on sending before the connection is cut
LINGER_SLOW_S = 0.5  # the same for one who was refused for being slow
LINGER_BYTES_MAX = 64 << 20  # callers who send a whole body before they read: thrown away unread, it costs time on the wire only


class CallerConnection(asyncio.Protocol):
    """Reads requests one by one and writes their answers."""

    __slots__ = (
        "_ahead", "_between", "_buffer", "_chunked_out", "_door", "_eof", "_exchange", "_head_only", "_heads", "_http11", "_keep_alive",
        "_lingered", "_loop", "_scanned", "_settings", "_transport", "_writes", "body", "deadline", "peer",
    )  # fmt: skip

    def __init__(self, door: Door, settings: Server) -> None:
        self._door = door
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._heads = HeadReader(self)
        self.deadline = Deadline(self._loop)  # the exchange's while there is one
        self._writes: WriteWatch | None = None
        self._exchange: Exchange | None = None
        self._buffer = bytearray()  # an incomplete head
        self._scanned = 0  # bytes of it already searched for its end
        self._ahead = bytearray()
        self._between = True  # requests: what arrives begins the next one
        self.body = BodyReader(door.bodies, settings.body_bytes_max)
        self._keep_alive = True
        self._http11 = True
        self._head_only = False
        self._chunked_out = False
        self._lingered = -1  # bytes thrown away while lingering; -1: not lingering
        self._eof = False
        self.peer = ""

    def __repr__(self) -> str:
        return f"<Caller {self.peer} {'busy' if self._exchange else 'idle'}>"

    @property
    def exchange(self) -> Exchange | None:
        return self._exchange

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's transports are not subclasses
        assert self._transport is not None
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        self._writes = WriteWatch(self._loop, self._transport, self._settings.write_stall_s)
        address = transport.get_extra_info("peername")
        self.peer = str(address[0]) if address else ""
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._await_until(self._settings.request_head_s, self.close)
        self._door.on_opened(self)

    def data_received(self, data: bytes) -> None:
        if self._between:
            self._on_head_bytes(data)
        elif self.body.reading:
            self._on_body_bytes(data)
        elif self._lingered >= 0:
            self._throw_away(data)
        else:
            self._ahead += data
            if len(self._ahead) > AHEAD_BYTES_MAX and self._transport is not None:
                self._transport.pause_reading()

    def eof_received(self) -> bool:
        """Who half-closes still gets a whole answer that is paid for; a stream's caller who stops talking has left."""
        self._eof = True
        exchange = self._exchange
        return not (exchange is None or self.body.reading or exchange.ends_with_eof)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.deadline.close()
        if self._writes is not None:
            self._writes.close()
        self.body.let_go()
        self._door.on_closed(self)
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.on_caller_gone()

    def pause_writing(self) -> None:
        assert self._writes is not None
        self._writes.pause()
        if self._exchange is not None:
            self._exchange.on_caller_slow()

    def resume_writing(self) -> None:
        assert self._writes is not None
        self._writes.resume()
        if self._exchange is not None:
            self._exchange.on_caller_ready()
        elif self._lingered < 0 and self._transport is not None and not self._transport.is_closing():
            self._await_request()

    # Reading a request.

    def _on_head_bytes(self, data: bytes) -> None:
        buffer = self._buffer
        if not buffer:
            if self._heads.repeated is not None and self._on_repeated_head(data):
                return
            if data == b"\r\n":
                return
            end = data.find(b"\r\n\r\n") + 4
            if 4 <= end <= HEAD_BYTES_MAX:
                self._on_head(data[:end], data[end:])
                return
            self._await_until(self._settings.request_head_s, self._too_slow)
        buffer += data
        known = self._scanned
        end = buffer.find(b"\r\n\r\n", max(0, known - 3)) + 4
        self._scanned = len(buffer)
        if 4 <= end <= HEAD_BYTES_MAX:
            head, rest = bytes(buffer[:end]), bytes(buffer[end:])
            buffer.clear()
            self._scanned = 0
            self._on_head(head, rest)
        elif len(buffer) > LINE_BYTES_MAX + 16 and buffer.find(b"\r\n", 0, LINE_BYTES_MAX + 16) < 0:
            self._refuse(UriTooLong("the request line is too long"))
        elif len(buffer) > HEAD_BYTES_MAX:
            self._refuse(HeadersTooLarge("the request's headers are too large"))
        elif not may_be_head(buffer, known):
            self._refuse(BadRequest("the request is not valid HTTP/1.1"))  # what will never end need not be waited for

    def _on_head(self, data: bytes, rest: bytes | None) -> None:
        """A whole head, and what came with it; `rest` None: that is waiting in `_ahead`."""
        try:
            head = self._heads.read(data)
            self._frame(head)
        except GatewayError as error:
            self._refuse(error)
            return
        if self.body.left:
            self._heads.remember(head, data)
        self.deadline.clear()
        self._between = False
        exchange = self._exchange = self._door.open_exchange(self, head)
        if (refusal := self.body.refusal()) is not None:
            self._refuse(refusal)
            return
        if not self.body.reading:
            if rest:
                self._ahead += rest
            exchange.on_body(b"")
            return
        if rest is None:
            rest = self.body.take_from(self._ahead)
        if rest:
            self._on_body_bytes(rest)
        if self.body.reading and self._exchange is exchange:
            self._await_until(self._settings.request_body_s, self._too_slow)
            exchange.on_body_awaited()
            if "Expect" in head.headers and self._exchange is exchange and not head.http10 and not rest:
                self._write(CONTINUE)

    def _on_repeated_head(self, data: bytes) -> bool:
        """Whether `data` is the head of an earlier request and a whole body; then it is taken."""
        repeated = self._heads.repeated
        assert repeated is not None
        length, at = repeated.match(data)
        if length == 0 or len(data) - at != length or length > self._settings.body_bytes_max:
            return False
        self._between = self._head_only = False
        self.deadline.clear()
        exchange = self._exchange = self._door.open_exchange(self, repeated.head)
        exchange.on_body(data[at:])
        return True

    def _frame(self, head: RequestHead) -> None:
        self.body.begin(body_length(head, self._settings.body_bytes_max))
        self._keep_alive = head.keep_alive
        self._http11 = not head.http10
        self._head_only = head.method == "HEAD"

    def _on_body_bytes(self, data: bytes) -> None:
        body = self.body
        try:
            rest = body.feed(data)
        except GatewayError as error:
            self._refuse(error)
            return
        if body.reading:
            return
        self.deadline.clear()
        if rest:
            self._ahead[:0] = rest
        whole = body.take()
        if self._exchange is not None:
            self._exchange.on_body(whole)

    def _next_request(self) -> None:
        """The answer is complete; go on with what the caller sent meanwhile."""
        self._exchange = None
        if self.body.held:
            self.body.let_go()
        if self._transport is None:
            return
        ending = not self._keep_alive or self._eof
        if self.body.reading or (ending and self._ahead):  # answered while the caller still sends
            self._linger()
        elif ending:
            self.close()
        elif self._writes is None or not self._writes.paused:  # who does not read is not asked for more
            self._await_request()

    def _await_request(self) -> None:
        idle_s = DRAIN_IDLE_S if self._door.draining else self._settings.client_idle_s
        self.deadline.set(self._loop.time() + idle_s, self.close)
        if self._ahead:
            # From the loop, not from here: ten thousand pipelined requests are not ten thousand stack frames.
            self._loop.call_soon(self._on_ahead)
        else:
            self._between = True

    def _on_ahead(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        ahead = self._ahead
        self._between = True
        end = ahead.find(b"\r\n\r\n") + 4
        if 4 <= end <= HEAD_BYTES_MAX:
            head = bytes(ahead[:end])
            del ahead[:end]  # moves the array's start, not its bytes
            self._on_head(head, None)
            while ahead and self.body.reading:
                self._on_body_bytes(self.body.take_from(ahead))
        else:
            data = bytes(ahead)
            ahead.clear()
            self._on_head_bytes(data)
        if len(ahead) <= AHEAD_BYTES_MAX and not transport.is_closing() and not transport.is_reading():
            transport.resume_reading()

    # Answering.

    def answer(self, status: int, body: bytes, headers: Iterable[tuple[str, str]] = (), *, content_type: str = "application/json") -> None:
        """A whole answer, and on to the next request."""
        self._keep_alive = keep = self._may_keep_alive()
        head = answer_head(status, len(body), headers, content_type, close=not keep)
        self._write(head if self._head_only else head + body)
        self._next_request()

    def answer_error(self, error: GatewayError, headers: Iterable[tuple[str, str]] = ()) -> None:
        """An error as the JSON envelope, with Retry-After where known."""
        self.answer(error.http_status, envelope(error), (*headers, *error_headers(error)))

    def begin_stream(self, status: int, headers: Iterable[tuple[str, str]], content_type: str | None = None, *, length: int = -1) -> None:
        """The head of an answer that comes in pieces; `length` -1: unknown, so HTTP/1.0 callers get it until we close."""
        self._write(self._stream_head(status, headers, content_type, length))

    def stream(self, data: bytes) -> None:
        """A piece of the answer begun. May call back `on_caller_slow`."""
        self._write(chunk(data) if self._chunked_out else data)

    def end_stream(self, data: bytes = b"") -> None:
        """The last piece, in one write with the end of the framing, and on to the next request."""
        if self._chunked_out:
            self._write(chunk(data) + LAST_CHUNK if data else LAST_CHUNK)
        elif data:
            self._write(data)
        self._next_request()

    def answer_stream(self, status: int, data: bytes, headers: Iterable[tuple[str, str]], content_type: str) -> None:
        """A stream that ends with its first piece: all of it in one write, and in one copy, and on to the next request."""
        head = self._stream_head(status, headers, content_type, -1)
        self._write(b"%b%x\r\n%b\r\n%b" % (head, len(data), data, LAST_CHUNK) if self._chunked_out else head + data)
        self._next_request()

    def _stream_head(self, status: int, headers: Iterable[tuple[str, str]], content_type: str | None, length: int) -> bytes:
        self._chunked_out = self._http11 and length < 0
        if length < 0 and not self._http11:
            self._keep_alive = False
        self._keep_alive = self._may_keep_alive()
        return stream_head(status, headers, content_type, close=not self._keep_alive, chunked=self._chunked_out)

    def turn_away(self, error: GatewayError) -> None:
        """No room for this connection: an answer if it gets through, and no lingering, for descriptors are what is short."""
        body = envelope(error)
        headers = error_headers(error)
        self._write(answer_head(error.http_status, len(body), headers, "application/json", close=True) + body)
        self.close()

    def close(self) -> None:
        """Close once everything written is sent, within `write_stall_s`."""
        self._exchange = None
        if self._transport is not None and not self._transport.is_closing():
            self.deadline.clear()
            if self._writes is not None and self._transport.get_write_buffer_size():
                self._writes.begin()
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def close_if_idle(self) -> None:
        """Draining: a connection between requests has nothing to wait for."""
        if self._exchange is None and not self._buffer and not self._ahead and self._lingered < 0:
            self.close()

    def _may_keep_alive(self) -> bool:
        return self._keep_alive and not self.body.reading and not self._eof and not self._door.draining

    def _write(self, data: bytes) -> None:
        transport = self._transport
        if transport is not None and not transport.is_closing():
            if self._writes is not None and self._writes.paused:
                self._writes.add(len(data))
            transport.write(data)

    # Refusing and waiting.

    def _refuse(self, error: GatewayError) -> None:
        """Framing or size in doubt: answer, then read no further request from this connection."""
        self._keep_alive = False
        if self._exchange is not None:
            self._exchange.on_body_refused(error)
            return
        self._door.on_refused(error)
        body = envelope(error)
        self._write(answer_head(error.http_status, len(body), (), "application/json", close=True) + body)
        self._linger()

    def _linger(self) -> None:
        """Closing while the caller still sends would reset the connection and lose the answer on its way."""
        self.body.end()
        self._buffer.clear()
        self._ahead.clear()
        self._between = False
        self._lingered = 0
        transport = self._transport
        if transport is None:
            return
        if self._eof:
            self.close()
            return
        if transport.can_write_eof():
            transport.write_eof()
        if not transport.is_reading() and not transport.is_closing():
            transport.resume_reading()
        self._await_until(LINGER_S, self.abort)

    def _throw_away(self, data: bytes) -> None:
        self._lingered += len(data)
        if self._lingered > LINGER_BYTES_MAX:
            self.abort()

    def _too_slow(self) -> None:
        self._refuse(CallerTimeout("the request did not arrive in time"))
        self._await_until(LINGER_SLOW_S, self.abort)

    def _await_until(self, seconds: float, then: Callable[[], None]) -> None:
        self.deadline.set(self._loop.time() + seconds, then)
