"""Reads HTTP/1.x requests from a byte stream: keep-alive, pipelining, content-length and chunked bodies.

Built for speed in front of a trusted load: equal heads are parsed once. It refuses what it cannot frame, no more.
"""

from __future__ import annotations

import msgspec

HEAD_BYTES_MAX = 65_536
BODY_BYTES_MAX = 67_108_864
HEADS_KEPT_MAX = 512
CHUNKED = -1


class BadFraming(ValueError):
    """The bytes are not a request that this reader can find the end of."""


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """A request's head. `length` is the body's bytes, or CHUNKED."""

    method: str
    path: str  # without query
    headers: tuple[tuple[str, str], ...]  # as received
    shown_headers: tuple[tuple[str, str], ...]  # the same without credentials
    length: int
    close: bool  # the connection ends after the answer
    http10: bool
    expects_continue: bool


class Request(msgspec.Struct, frozen=True, gc=False):
    head: Head
    body: bytes


class RequestReader:
    """Feed bytes, take requests. Heads are shared between readers through `heads`, a cache that the owner passes."""

    def __init__(self, heads: dict[bytes, Head]) -> None:
        self._heads = heads
        self._data = b""  # unread; while a body is incomplete, only what follows it
        self._head: Head | None = None
        self._body = bytearray()
        self._chunk_left = -1  # bytes of the current chunk and its CRLF; -1: a size line comes next
        self._trailers = False
        self._continued = False

    @property
    def buffered_bytes(self) -> int:
        return len(self._data)

    def feed(self, data: bytes) -> None:
        self._data = self._data + data if self._data else data

    def takes_continue(self) -> bool:
        """Whether `100 Continue` is due now; true once a request."""
        if self._head is None or not self._head.expects_continue or self._continued:
            return False
        self._continued = True
        return True

    def next(self) -> Request | None:
        """The next complete request, or None until more bytes come. Raises BadFraming."""
        head = self._head
        if head is None:
            data = self._data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > HEAD_BYTES_MAX:
                    raise BadFraming("head too long")
                return None
            raw = data[:end]
            head = self._heads.get(raw) or self._learn(raw)
            start = end + 4
            if 0 <= head.length <= len(data) - start:
                stop = start + head.length
                self._data = data[stop:]
                return Request(head, data[start:stop])
            self._head, self._data = head, data[start:]
            self._body, self._chunk_left, self._trailers, self._continued = bytearray(), -1, False, False
        complete = self._chunks() if head.length == CHUNKED else self._fill(head.length)
        if not complete:
            return None
        self._head = None
        return Request(head, bytes(self._body))

    def _learn(self, raw: bytes) -> Head:
        if len(self._heads) >= HEADS_KEPT_MAX:
            self._heads.clear()
        head = self._heads[raw] = parse_head(raw)
        return head

    def _fill(self, length: int) -> bool:
        missing = length - len(self._body)
        self._body += self._data[:missing]
        self._data = self._data[missing:]
        return len(self._body) == length

    def _chunks(self) -> bool:
        data, at = self._data, 0
        try:
            while True:
                if self._chunk_left >= 0:
                    part = data[at : at + self._chunk_left]
                    self._body += part
                    at += len(part)
                    self._chunk_left -= len(part)
                    if self._chunk_left:
                        return False
                    del self._body[-2:]  # the CRLF behind the chunk
                    self._chunk_left = -1
                end = data.find(b"\r\n", at)
                if end < 0:
                    if len(data) - at > 1024:
                        raise BadFraming("chunk size line too long")
                    return False
                line, at = data[at:end], end + 2
                if self._trailers:
                    if not line:
                        return True
                    continue
                self._start_chunk(line)
        finally:
            self._data = data[at:]

    def _start_chunk(self, line: bytes) -> None:
        try:
            size = int(line.split(b";")[0], 16)
        except ValueError as error:
            raise BadFraming("chunk size") from error
        if size < 0 or len(self._body) + size > BODY_BYTES_MAX:
            raise BadFraming("chunk size")
        if size == 0:
            self._trailers = True
        else:
            self._chunk_left = size + 2


def parse_head(raw: bytes) -> Head:
    """A head from its bytes without the empty line. Raises BadFraming."""
    lines = raw.decode("latin-1").split("\r\n")
    try:
        method, target, version = lines[0].split(" ")
    except ValueError as error:
        raise BadFraming("request line") from error
    headers = tuple(_header(line) for line in lines[1:])
    named = {name.lower(): value.lower() for name, value in headers}
    http10 = version == "HTTP/1.0"
    connection = named.get("connection", "")
    return Head(
        method=method,
        path=target.partition("?")[0],
        headers=headers,
        shown_headers=tuple((name, "(hidden)" if name.lower() == "authorization" else value) for name, value in headers),
        length=_length(named),
        close=connection == "close" or (http10 and connection != "keep-alive"),
        http10=http10,
        expects_continue=named.get("expect") == "100-continue",
    )


def _header(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    if not colon:
        raise BadFraming("header without a colon")
    return name, value.strip(" \t")


def _length(named: dict[str, str]) -> int:
    if "transfer-encoding" in named:
        if named["transfer-encoding"] != "chunked" or "content-length" in named:
            raise BadFraming("transfer-encoding")
        return CHUNKED
    text = named.get("content-length", "0")
    if not (text.isascii() and text.isdigit()) or int(text) > BODY_BYTES_MAX:
        raise BadFraming("content-length")
    return int(text)
