"""One provider connection: writes a request, frames its answer, and goes back to the pool.

Heads are read by aiohttp's C parser, told that no answer has a body so that it reads heads only; bodies are framed by
`wire.framing`. What is not plain HTTP/1.1 ends the connection.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp.http import HttpProcessingError, HttpResponseParser
from multidict import CIMultiDictProxy

from gateway.domain.errors import UpstreamGarbage
from gateway.edge.known_heads import KnownHeads
from gateway.wire.framing import CHUNKED, Dechunker, FramingError, content_length, whole_chunks

if TYPE_CHECKING:
    from gateway.edge.upstream import Call, Pool

HEAD_BYTES_MAX = 65536
INTERIM_ANSWERS_MAX = 8  # 1xx before the answer
_VERSION = b"HTTP/1."
_UNBOUNDED = -1


class ProviderConnection(asyncio.Protocol):
    """One call at a time; told to the `Call` it serves."""

    __slots__ = (
        "_buffer",
        "_call",
        "_dechunker",
        "_got_bytes",
        "_interim",
        "_keep_alive",
        "_left",
        "_parser",
        "_pool",
        "_reading_head",
        "_reused",
        "_transport",
        "idle_since",
        "retired",
    )

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._parser = HttpResponseParser(
            self,  # type: ignore[arg-type]  # it only wants a base protocol for bodies, and reads none
            asyncio.get_running_loop(),
            2**16,
            response_with_body=False,
            read_until_eof=False,
            auto_decompress=False,
        )
        self._call: Call | None = None
        self._buffer = b""
        self._reading_head = True
        self._dechunker: Dechunker | None = None
        self._left = 0  # bytes of a body of known length; _UNBOUNDED: until the connection closes
        self._keep_alive = False
        self._interim = 0
        self._got_bytes = False
        self._reused = False
        self.idle_since = 0.0
        self.retired = False  # not to be used again

    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing() and self._call is None

    def begin(self, call: Call, *, reused: bool) -> bool:
        """Send the call's request; False: this connection can serve no more."""
        transport = self._transport
        if transport is None or self._call is not None or transport.is_closing():
            return False
        self._call = call
        self._reused = reused
        self._reading_head = True
        self._got_bytes = False
        self._interim = 0
        call.on_begun(self)
        transport.write(call.request)
        return True

    def pause(self) -> None:
        if self._transport is not None and self._transport.is_reading():
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing() and not self._transport.is_reading():
            self._transport.resume_reading()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        self._call = None
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]  # uvloop's transports are not subclasses
        self._pool.on_opened(self)

    def data_received(self, data: bytes) -> None:
        call = self._call
        if call is None:
            self.abort()  # nobody asked: what follows an answer unasked cannot be told from the next answer
            return
        self._got_bytes = True
        try:
            if self._reading_head:
                self._on_head_bytes(data, call)
            else:
                self._on_body_bytes(data, call)
        except (FramingError, HttpProcessingError, ValueError):
            self._fail_garbage()

    def eof_received(self) -> bool:
        return False  # close; connection_lost tells the call

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pool.on_closed(self)
        call, self._call = self._call, None
        if call is None:
            return
        if not self._got_bytes and self._reused:
            # The provider closed an idle connection just as we used it and has not seen the request: a fresh one, once.
            call.resend()
        elif not self._reading_head and self._left == _UNBOUNDED and exc is None:
            call.complete()
        elif self._reading_head:
            call.fail(UpstreamGarbage("Provider closed the connection without an answer"))
        else:
            call.fail(UpstreamGarbage("Provider broke off its answer"))

    # The answer.

    def _on_head_bytes(self, data: bytes, call: Call) -> None:
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        heads = self._pool.heads
        if heads is not None and not call.bodyless and self._on_known_head(data, call, heads):
            return
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            if len(data) > HEAD_BYTES_MAX or not data.startswith(_VERSION[: len(data)]):
                raise FramingError("not the head of an answer")
            self._buffer = data
            return
        if not data.startswith(_VERSION):
            raise FramingError("not HTTP/1")
        messages = self._parser.feed_data(data[:end])[0]
        if len(messages) != 1:
            raise FramingError("not one answer")
        message, rest = messages[0][0], data[end:]
        status, headers = message.code, message.headers
        if status < 200:
            self._interim += 1
            if status == 101 or self._interim > INTERIM_ANSWERS_MAX:
                raise FramingError("interim answers")
            if rest:
                self._on_head_bytes(rest, call)
            return
        self._frame(status, headers, call.bodyless)
        self._keep_alive = not message.should_close and self._left != _UNBOUNDED
        self._reading_head = False
        if heads is not None and status == 200 and self._keep_alive and not call.bodyless:
            heads.remember(headers, data[:end])
        call.listener.on_head(status, headers)
        if self._call is call and (rest or (self._left == 0 and self._dechunker is None)):
            self._on_body_bytes(rest, call)

    def _on_known_head(self, data: bytes, call: Call, heads: KnownHeads) -> bool:
        """Whether `data` begins with a head that was read before; then it is taken."""
        headers, length, at = heads.find(data)
        if headers is None:
            return False
        self._reading_head, self._keep_alive = False, True
        pieces = whole_chunks(data[at:]) if length == CHUNKED else [data[at:]] if len(data) - at == length else None
        if pieces is not None:
            self._release(call)
            call.complete_with(headers, pieces)
            return True
        if length == CHUNKED:
            self._dechunker, self._left = Dechunker(), 0
        else:
            self._dechunker, self._left = None, length
        call.listener.on_head(200, headers)
        if self._call is call and at < len(data):
            self._on_body_bytes(data[at:], call)
        return True

    def _frame(self, status: int, headers: CIMultiDictProxy[str], bodyless: bool) -> None:
        """Decide where the body ends (RFC 9112 section 6.3)."""
        self._dechunker = None
        self._left = 0
        if bodyless or status in (204, 304):
            return
        if codings := headers.getall("Transfer-Encoding", None):
            if len(codings) > 1 or codings[0].strip().lower() != "chunked":
                raise FramingError("transfer coding")
            self._dechunker = Dechunker()
        elif lengths := headers.getall("Content-Length", None):
            if len(lengths) > 1 and len(set(lengths)) > 1:
                raise FramingError("content length")
            self._left = content_length(lengths[0].strip())
        else:
            self._left = _UNBOUNDED

    def _on_body_bytes(self, data: bytes, call: Call) -> None:
        dechunker, left = self._dechunker, self._left
        if dechunker is not None:
            data = dechunker.feed(data)
            ended = dechunker.done
            if dechunker.rest:
                self._keep_alive = False  # more than was asked for
        elif left == _UNBOUNDED:
            ended = False
        else:
            if len(data) > left:
                data = data[:left]
                self._keep_alive = False
            self._left = left = left - len(data)
            ended = left == 0
        if data:
            call.listener.on_data(data)
        if ended and self._call is call:
            self._release(call)
            call.complete()

    def _release(self, call: Call) -> None:
        """The answer is all here."""
        self._call = None
        if self._transport is not None and self._transport.get_write_buffer_size():
            self.abort()  # answered before it had read the request: it may never read the rest
        elif self._keep_alive and not self.retired:
            if call.paused:
                self.resume()
            self._pool.keep(self)
        else:
            self.close()

    def _fail_garbage(self) -> None:
        call, in_head = self._call, self._reading_head
        self.abort()
        if call is not None:
            call.fail(UpstreamGarbage("Provider's answer is not valid HTTP" if in_head else "Provider's answer broke its framing"))
