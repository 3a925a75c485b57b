"""Request heads: read by aiohttp's C parser, then held to plain HTTP/1.0 or 1.1 to an origin server.

The parser is told that there are no bodies, so that it reads heads only. It knows more dialects than are spoken here and
is lenient in places: what it lets through and two readers could understand differently is refused.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
from aiohttp.http import HttpProcessingError, HttpRequestParser
from aiohttp.http_exceptions import LineTooLong
from multidict import CIMultiDictProxy

from gateway.domain.errors import BadRequest, BodyTooLarge, HeadersTooLarge, UnsupportedMediaType, UriTooLong
from gateway.wire.framing import CHUNKED, LENGTH_DIGITS_MAX, FramingError, content_length

if TYPE_CHECKING:
    from gateway.edge.presented import Presented

HEAD_BYTES_MAX = 32768
LINE_BYTES_MAX = 8190
HEADERS_MAX = 128
NEW_HEADS_MAX = 4


class RequestHead(msgspec.Struct):
    """A request's head, as far as anybody acts on it."""

    method: str
    target: str  # origin-form, as sent
    path: str
    headers: CIMultiDictProxy[str]
    http10: bool
    keep_alive: bool  # the caller wants to send more after this; never with HTTP/1.0
    presented: Presented | None = None  # what inference has read of it


class RepeatedHead:
    """Recognises a head that differs from an earlier one in the digits of its Content-Length alone.

    Clients on a kept connection send such heads over and over; the same bytes say the same thing, so nothing is to be
    parsed again.
    """

    __slots__ = ("_after", "_before", "head")

    def __init__(self, head: RequestHead, before: bytes, after: bytes) -> None:
        self.head = head
        self._before = before  # the head up to the digits
        self._after = after  # from behind them to its end

    @classmethod
    def of(cls, head: RequestHead, data: bytes) -> RepeatedHead | None:
        """Of a head that was read from `data`; None where its length is not plain to see, or a body is not all there is to it."""
        digits = head.headers.get("Content-Length", "").encode()
        at = data.lower().find(b"\r\ncontent-length: %b\r\n" % digits)
        if at < 0 or head.method == "HEAD" or head.http10 or not head.keep_alive:
            return None
        if "Expect" in head.headers or "Transfer-Encoding" in head.headers:
            return None
        at += len(b"\r\nContent-Length: ")
        return cls(head, data[:at], data[at + len(digits) :])

    def match(self, data: bytes) -> tuple[int, int]:
        """The body's length and where it begins in `data`; (0, 0) when this is another head. Looks at every byte of it."""
        before, after = self._before, self._after
        if data.startswith(before):
            at = len(before)
            end = data.find(b"\r", at, at + LENGTH_DIGITS_MAX + 1)
            digits = data[at:end]
            if digits.isdigit() and data.startswith(after, end):
                return int(digits), end + len(after)
        return 0, 0


def may_be_head(begun: bytearray, known: int) -> bool:
    """Whether this can become a head whose first `known` bytes could: it begins as a method, or as an empty line before one, and
    no line ends in a bare LF.
    """
    first = begun[0]
    if not (65 <= first <= 90 or first == 13):
        return False
    return begun.count(b"\n", known) == begun.count(b"\r\n", max(0, known - 1))


class HeadReader:
    """Reads the heads of one connection, one by one."""

    __slots__ = ("_parser", "_protocol", "_read", "repeated")

    def __init__(self, protocol: asyncio.Protocol) -> None:
        self._protocol = protocol
        self._parser = self._new_parser()
        self._read = 0  # heads with a body
        self.repeated: RepeatedHead | None = None  # by which the next head may be known

    def remember(self, head: RequestHead, data: bytes) -> None:
        """Of a request with a body: the next one may repeat it. Who sends another head each time is not looked at any more."""
        if self._read < NEW_HEADS_MAX:
            self._read += 1
            self.repeated = RepeatedHead.of(head, data)

    def read(self, data: bytes) -> RequestHead:
        """The head that `data` is, from its first byte to its empty line. Raises a CallerFault."""
        data = data.removeprefix(b"\r\n")  # one empty line before a request is to be ignored (RFC 9112 section 2.2)
        try:
            messages, upgraded, _ = self._parser.feed_data(data)
        except LineTooLong:
            too_long_target = data.find(b"\r\n") > LINE_BYTES_MAX
            raise (UriTooLong if too_long_target else HeadersTooLarge)("the request's head is too large") from None
        except (HttpProcessingError, ValueError) as error:
            if "Too many headers" in str(error):
                raise HeadersTooLarge("the request has too many headers") from None
            raise BadRequest("the request is not valid HTTP/1.1") from None
        if upgraded:
            self._parser = self._new_parser()  # offers to switch protocols are not taken up
        if len(messages) != 1:
            raise BadRequest("the request is not valid HTTP/1.1")
        message = messages[0][0]
        method, target = message.method, message.path
        line_end = data.find(b"\r\n")
        if method == "CONNECT" or not target.startswith("/") or line_end != len(method) + len(target) + len("  HTTP/1.1"):
            raise BadRequest("the request line must be a method, a path and a version, with one space between")
        if data[line_end - 8 : line_end - 1] != b"HTTP/1.":  # the parser also knows 0.9, 2.0, RTSP and ICE
            raise _VersionNotSupported("only HTTP/1.1 and HTTP/1.0 are spoken here")
        http10 = message.version.minor == 0
        if not http10 and "Host" not in message.headers:  # the parser refuses a second one
            raise BadRequest("the Host header is missing")
        return RequestHead(
            method, target, target.partition("?")[0], message.headers, http10, keep_alive=not (http10 or message.should_close)
        )

    def _new_parser(self) -> HttpRequestParser:
        return HttpRequestParser(
            self._protocol,  # type: ignore[arg-type]  # it only wants a base protocol for bodies, and reads none
            asyncio.get_running_loop(),
            2**16,
            max_line_size=LINE_BYTES_MAX,
            max_headers=HEADERS_MAX,
            max_field_size=LINE_BYTES_MAX,
            response_with_body=False,
            auto_decompress=False,
        )


def body_length(head: RequestHead, bytes_max: int) -> int:
    """The body's bytes, or CHUNKED. Raises a CallerFault when that is in doubt, or the body is none that is taken here."""
    headers = head.headers
    coding = headers.get("Transfer-Encoding")
    length = headers.get("Content-Length")
    size = 0
    if coding is not None:
        if length is not None or head.http10:
            raise BadRequest("the body's framing is ambiguous")
        if ",".join(headers.getall("Transfer-Encoding")).strip().lower() != "chunked":
            raise _NotImplemented("only the chunked transfer coding is understood")
        size = CHUNKED
    elif length is not None:
        try:
            size = content_length(length)
        except FramingError:
            raise BadRequest("Content-Length is not a number") from None
        if size > bytes_max:
            raise BodyTooLarge(f"the body is larger than {bytes_max} bytes")
    if "Content-Encoding" in headers and any(value.lower() != "identity" for value in headers.getall("Content-Encoding")):
        raise UnsupportedMediaType("compressed bodies are not accepted; send the body without Content-Encoding")
    if headers.get("Expect", "100-continue").lower() != "100-continue":
        raise _ExpectationFailed("only 100-continue can be expected")
    return size


class _VersionNotSupported(BadRequest):
    status = 505
    code = "http_version"


class _NotImplemented(BadRequest):
    status = 501
    code = "not_implemented"


class _ExpectationFailed(BadRequest):
    status = 417
    code = "expectation_failed"
