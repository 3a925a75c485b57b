"""Where an HTTP/1.1 message's body ends: strict reading of lengths and chunks (RFC 9112 sections 6 and 7).

Heads are read by aiohttp's C parser; bodies are framed here, because a proxy wants whole runs of bytes without a
stream object between, and because on both sides a doubt about framing must end the connection, not be repaired.
"""

from __future__ import annotations

CHUNK_LINE_BYTES_MAX = 256  # size and extensions
TRAILER_BYTES_MAX = 8192
# Framing may cost as much as the data plus this much: 1 MiB in 1-byte chunks is an attack on our CPU, not an upload.
CHUNK_OVERHEAD_BYTES_MAX = 65536

_HEX = frozenset(b"0123456789abcdefABCDEF")


class FramingError(Exception):
    """The body's end cannot be known; the connection is not to be used again."""


def content_length(value: str) -> int:
    """A Content-Length of plain digits. Raises FramingError."""
    if not (value.isascii() and value.isdigit()) or len(value) > 15:
        raise FramingError("content length")
    return int(value)


class Dechunker:
    """Incremental decoder of the chunked coding. `done` after the last chunk; `rest` then holds what followed.

    Chunk extensions are refused: nobody sends them in earnest, and peers disagree on how they end. Trailers are
    read and dropped.
    """

    __slots__ = ("_left", "_overhead", "_payload_bytes", "_pending", "_state", "done", "rest")

    _SIZE, _DATA, _DATA_END, _TRAILERS = range(4)

    def __init__(self) -> None:
        self._pending = b""
        self._left = 0  # bytes of the current chunk still to come
        self._state = self._SIZE
        self._overhead = 0
        self._payload_bytes = 0
        self.done = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`. Raises FramingError; never returns what follows the message."""
        if self._state == self._SIZE and not self._pending:
            payload = self._whole_chunk(data)
            if payload is not None:
                return payload
        return self._feed(data)

    def _whole_chunk(self, data: bytes) -> bytes | None:
        """The common case: `data` is exactly one chunk."""
        line_end = data.find(b"\r\n", 0, 12)
        if line_end <= 0:
            return None
        digits = data[:line_end]
        if not _HEX.issuperset(digits):
            return None
        size = int(digits, 16)
        if size < line_end + 4 or len(data) != line_end + size + 4 or data[-2:] != b"\r\n":  # small ones are counted: the slow way
            return None
        self._payload_bytes += size
        return data[line_end + 2 : -2]

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
                if end - at < 2:
                    if data[at:end] != b"\r":
                        raise FramingError("chunk end")
                    break
                if data[at : at + 2] != b"\r\n":
                    raise FramingError("chunk end")
                at += 2
                self._state = self._SIZE
                continue
            line_end = data.find(b"\r\n", at)
            if line_end < 0:
                if end - at > (CHUNK_LINE_BYTES_MAX if self._state == self._SIZE else TRAILER_BYTES_MAX):
                    raise FramingError("line too long")
                break
            line = data[at:line_end]
            at = line_end + 2
            self._on_line(line)
        if self.done:
            self.rest = data[at:]
        else:
            self._pending = data[at:]
        return payload[0] if len(payload) == 1 else b"".join(payload)

    def _on_line(self, line: bytes) -> None:
        self._overhead += len(line) + 2
        if self._overhead > self._payload_bytes + CHUNK_OVERHEAD_BYTES_MAX:
            raise FramingError("framing outweighs data")
        if self._state == self._TRAILERS:
            if not line:
                self.done = True
            elif b"\n" in line or b"\r" in line:
                raise FramingError("trailer")
            return
        if not line or len(line) > 12 or not _HEX.issuperset(line):
            raise FramingError("chunk size")
        self._left = int(line, 16)
        self._state = self._DATA if self._left else self._TRAILERS
