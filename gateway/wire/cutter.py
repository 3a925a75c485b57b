"""Network chunks into blocks of whole server-sent events.

Source: WHATWG server-sent events grammar.
"""

from __future__ import annotations

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class LineTooLong(Exception):
    """An event grew over the limit without ending."""


class EventCutter:
    """Network chunks in, blocks of whole events out, with LF line ends. What is incomplete waits, up to a limit."""

    __slots__ = ("_after_cr", "_limit", "_pending", "_started")

    def __init__(self, line_bytes_max: int) -> None:
        self._limit = line_bytes_max
        self._pending = bytearray()
        self._after_cr = False  # the last byte was CR: a following LF belongs to it
        self._started = False

    @property
    def rest(self) -> bytes:
        """The event that has not ended."""
        return bytes(self._pending)

    def feed(self, data: bytes) -> bytes:
        """All whole events up to now, as one block; b"" when none ended. Raises LineTooLong."""
        if not self._started:
            data = self._without_mark(data)
        # Not `in`, which asks first whether the bytes are a number, by an exception: that costs more than all the rest.
        if self._after_cr or data.partition(b"\r")[1]:
            data = self._normalised(data)
        pending = self._pending
        if not pending:
            if data[-2:] == b"\n\n":
                return data
        elif data.startswith(b"\n") and pending.endswith(b"\n"):  # the border itself was cut in two
            data = bytes(pending) + data
            pending.clear()
        end = data.rfind(b"\n\n") + 2
        if end < 2:
            pending += data
            if len(pending) > self._limit:
                raise LineTooLong
            return b""
        block = bytes(pending) + data[:end] if pending else data[:end]
        pending[:] = data[end:]
        if len(pending) > self._limit:
            raise LineTooLong
        return block

    def _without_mark(self, data: bytes) -> bytes:
        """A byte order mark may open the stream; as long as the first bytes may become one they wait."""
        data = bytes(self._pending) + data
        self._pending.clear()
        if len(data) < len(BYTE_ORDER_MARK) and BYTE_ORDER_MARK.startswith(data):
            self._pending += data
            return b""
        self._started = True
        return data.removeprefix(BYTE_ORDER_MARK)

    def _normalised(self, data: bytes) -> bytes:
        """CRLF and lone CR become LF, at once: a CR at the end is a line end, and a LF right after it is dropped."""
        if not data:
            return data
        ends_in_cr = data.endswith(b"\r")
        if self._after_cr:
            data = data.removeprefix(b"\n")
        self._after_cr = ends_in_cr
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
