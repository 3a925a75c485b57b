"""Where an HTTP/1.1 message's body ends: strict reading of lengths and chunks (RFC 9112 sections 6 and 7).

Heads are read by aiohttp's C parser; bodies are framed here, because a proxy wants whole runs of bytes without a
stream object between, and because on both sides a doubt about framing must end the connection, not be repaired.
"""

from __future__ import annotations

import re

CHUNK_SIZE_DIGITS_MAX = 12  # 256 TiB
CHUNKED = -1  # in the place of a length
LENGTH_DIGITS_MAX = 12
SIZE_LINE_BYTES_MAX = 1024  # a chunk's size with its extensions, which are a signature at most
TRAILERS_BYTES_MAX = 8192  # all of them together
# Framing may cost as much as the data plus this much: 1 MiB in 1-byte chunks is an attack on our CPU, not an upload.
CHUNK_OVERHEAD_BYTES_MAX = 65536

_END = b"0\r\n\r\n"  # the last chunk, without trailers
_SIZES = {b"%x" % size: size for size in range(1, 4096)}  # of nearly all chunks: looked up in half the time it takes to read them
_SIZE_LINE = re.compile(rb"([0-9a-fA-F]{1,%d})(?:[\t ]*;[\t\x20-\x7e\x80-\xff]*)?" % CHUNK_SIZE_DIGITS_MAX)
_SIZE_LINE_BEGUN = re.compile(rb"(?:[0-9a-fA-F]{1,%d}[\t ]*(?:;[\t\x20-\x7e\x80-\xff]*)?)?" % CHUNK_SIZE_DIGITS_MAX)
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*")


class FramingError(Exception):
    """The body's end cannot be known; the connection is not to be used again."""


def content_length(value: str) -> int:
    """A Content-Length of plain digits. Raises FramingError."""
    if not (value.isascii() and value.isdigit()) or len(value) > 15:
        raise FramingError("content length")
    return int(value)


class Dechunker:
    """Incremental decoder of the chunked coding. `done` after the last chunk; `rest` then holds what followed.

    Chunk extensions and trailers are checked and dropped: lines of either end in CRLF alone, peers disagreeing on any other
    end. What is refused does not depend on how the bytes were cut.
    """

    __slots__ = ("_left", "_overhead", "_payload_bytes", "_pending", "_state", "_trailers_bytes", "done", "rest")

    _SIZE, _DATA, _DATA_END, _TRAILERS = range(4)

    def __init__(self) -> None:
        self._pending = b""
        self._left = 0  # bytes of the current chunk still to come
        self._state = self._SIZE
        self._overhead = 0
        self._payload_bytes = 0
        self._trailers_bytes = 0
        self.done = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`. Raises FramingError; never returns what follows the message."""
        if self._state != self._SIZE or self._pending:
            left = self._left
            if self._state != self._DATA or data[left : left + 2] != b"\r\n":
                return self._feed(data)
            self._payload_bytes += left
            self._left, self._state = 0, self._SIZE
            return data[:left] + self.feed(data[left + 2 :]) if len(data) > left + 2 else data[:left]
        line_end = data.find(b"\r\n", 0, 8)
        size = _SIZES.get(data[:line_end])
        if size is not None and len(data) == line_end + size + 4 and data.endswith(b"\r\n") and self._overhead <= self._payload_bytes:
            self._overhead += line_end + 4
            self._payload_bytes += size
            return data[line_end + 2 : -2]
        # The common case, in C all the way: chunks whose data holds no line end of its own, as a rule one per event.
        lines = data.split(b"\r\n")
        chunks = lines[1:-1:2]
        sizes, lengths = list(map(_SIZES.get, lines[:-1:2])), list(map(len, chunks))
        whole = len(lengths)
        if sizes[:whole] != lengths:
            whole = whole - 1 if sizes[: whole - 1] == lengths[:-1] else _agreeing(sizes, lengths)
            del chunks[whole:]
        payload = b"".join(chunks)
        overhead = sum(map(len, lines[: 2 * whole : 2])) + 4 * whole
        if self._overhead + overhead + len(_END) > self._payload_bytes + CHUNK_OVERHEAD_BYTES_MAX:  # the last chunk weighs as well
            return self._feed(data)  # which weighs chunk by chunk
        self._overhead += overhead
        self._payload_bytes += len(payload)
        at = len(payload) + overhead
        if at == len(data):
            return payload
        if at == len(data) - len(_END) and data.endswith(_END):
            self.done = True
            return payload
        return payload + self._feed(data[at:])

    def _feed(self, data: bytes) -> bytes:
        if self._pending:
            data = self._pending + data
            self._pending = b""
        payload: list[bytes] = []
        at = 0
        end = len(data)
        while at < end and not self.done:
            if self._state == self._DATA:
                run = data[at : at + self._left]
                payload.append(run)
                at += len(run)
                self._left -= len(run)
                self._payload_bytes += len(run)
                if self._left == 0:
                    self._state = self._DATA_END
                continue
            if self._state == self._DATA_END:
                if not b"\r\n".startswith(data[at : at + 2]):
                    raise FramingError("chunk end")
                if end - at < 2:
                    break
                at += 2
                self._state = self._SIZE
                continue
            line_end = data.find(b"\r\n", at)
            if line_end < 0:
                self._check_begun(data[at:])
                break
            line = data[at:line_end]
            at = line_end + 2
            if self._state == self._SIZE:
                self._on_size(line)
            else:
                self._on_trailer(line)
        if self.done:
            self.rest = data[at:]
        else:
            self._pending = data[at:]
        return payload[0] if len(payload) == 1 else b"".join(payload)

    def _check_begun(self, line: bytes) -> None:
        """A line without its end yet: refuse at once what no end could mend."""
        line = line.removesuffix(b"\r")
        if self._state == self._SIZE:
            if len(line) > SIZE_LINE_BYTES_MAX or _SIZE_LINE_BEGUN.fullmatch(line) is None:
                raise FramingError("chunk size")
        elif self._trailers_bytes + len(line) > TRAILERS_BYTES_MAX:
            raise FramingError("trailers too long")

    def _on_size(self, line: bytes) -> None:
        said = _SIZE_LINE.fullmatch(line) if len(line) <= SIZE_LINE_BYTES_MAX else None
        if said is None:
            raise FramingError("chunk size")
        self._weigh(len(line))
        self._left = int(said[1], 16)
        self._state = self._DATA if self._left else self._TRAILERS

    def _on_trailer(self, line: bytes) -> None:
        self._trailers_bytes += len(line) + 2
        if self._trailers_bytes > TRAILERS_BYTES_MAX:
            raise FramingError("trailers too long")
        if not line:
            self.done = True
        elif _TRAILER.fullmatch(line) is None:
            raise FramingError("trailer")

    def _weigh(self, line_bytes: int) -> None:
        """Called before each chunk's data: the framing so far against the data so far."""
        self._overhead += line_bytes + 4
        if self._overhead > self._payload_bytes + CHUNK_OVERHEAD_BYTES_MAX:
            raise FramingError("framing outweighs data")


def whole_chunks(data: bytes) -> list[bytes] | None:
    """The chunks of a body that is all here; None where it is not, or where that is not plain to see."""
    if not data.endswith(b"\r\n0\r\n\r\n"):
        return None
    lines = data[: -len(b"\r\n0\r\n\r\n")].split(b"\r\n")
    chunks = lines[1::2]
    lengths = list(map(len, chunks))
    if list(map(_SIZES.get, lines[::2])) != lengths:
        return None
    return chunks if len(data) <= 2 * sum(lengths) + CHUNK_OVERHEAD_BYTES_MAX else None


def _agreeing(sizes: list[int | None], lengths: list[int]) -> int:
    """How many chunks from the first on are as long as they say."""
    return next(i for i, (size, length) in enumerate(zip(sizes, lengths, strict=False)) if size != length)
