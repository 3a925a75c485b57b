"""Heads of answers as one provider writes them, known by their form: the same names in the same order, each time.

What a head says that anybody here acts on is its status, its framing and a few headers. Where those are, byte for byte,
what they were in a head that the parser has read, and only other headers have other values (a date, a request id, what
is left of a limit), there is nothing new to read.
"""

from __future__ import annotations

import re

from multidict import CIMultiDict, CIMultiDictProxy

from gateway.wire.framing import CHUNKED, LENGTH_DIGITS_MAX

HEADS_MAX = 16  # that are learned in a row; after it one in HEADS_EACH, for who has a new form each time
HEADS_EACH = 256
VALUE_BYTES_MAX = 1024
_ACTED_ON = (
    "connection",
    "content-encoding",
    "content-type",
    "keep-alive",
    "location",
    "retry-after",
    "trailer",
    "transfer-encoding",
    "upgrade",
)
_LENGTH = re.compile(rb"(?i:content-length): ([0-9]{1,%d})" % LENGTH_DIGITS_MAX)
_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\x20-\x7e]*")


class KnownHeads:
    """The last forms of a provider's good answers: of known length, and chunked. Such an answer has a body and leaves its
    connection open. Of its headers those that are acted on are told.
    """

    __slots__ = ("_chunked", "_chunked_headers", "_learned", "_sized", "_sized_headers")

    def __init__(self) -> None:
        self._sized: re.Pattern[bytes] | None = None
        self._chunked: re.Pattern[bytes] | None = None
        self._sized_headers: CIMultiDictProxy[str] | None = None
        self._chunked_headers: CIMultiDictProxy[str] | None = None
        self._learned = 0

    def find(self, data: bytes) -> tuple[CIMultiDictProxy[str] | None, int, int]:
        """The headers of a known head, the body's length (CHUNKED: of none) and where it begins in `data`; None: another head."""
        if self._sized is not None and (found := self._sized.match(data)) is not None:
            return self._sized_headers, int(found[1]), found.end()
        if self._chunked is not None and (found := self._chunked.match(data)) is not None:
            return self._chunked_headers, CHUNKED, found.end()
        return None, 0, 0

    def remember(self, headers: CIMultiDictProxy[str], data: bytes) -> None:
        """A head that was read from `data`, all of it."""
        self._learned += 1
        if self._learned > HEADS_MAX and self._learned % HEADS_EACH:
            return
        status, *lines = data.removesuffix(b"\r\n\r\n").split(b"\r\n")
        lengths = [line for line in lines if line[:15].lower() == b"content-length:"]
        if not all(map(_LINE.fullmatch, lines)) or len(lengths) + ("Transfer-Encoding" in headers) != 1:
            return
        if lengths and _LENGTH.fullmatch(lengths[0]) is None:
            return
        form = re.compile(b"\r\n".join([re.escape(status), *map(_form, lines)]) + b"\r\n\r\n")
        told = CIMultiDictProxy(CIMultiDict([(name, value) for name, value in headers.items() if name.lower() in _ACTED_ON]))
        if lengths:
            self._sized, self._sized_headers = form, told
        else:
            self._chunked, self._chunked_headers = form, told


def _form(line: bytes) -> bytes:
    """The pattern of a header's line."""
    name = line.partition(b":")[0]
    lowered = name.lower().decode()
    if lowered in _ACTED_ON:
        return re.escape(line)
    if lowered == "content-length":
        return re.escape(name) + rb": ([0-9]{1,%d})" % LENGTH_DIGITS_MAX
    return re.escape(name) + rb":[\x20-\x7e]{0,%d}" % VALUE_BYTES_MAX
