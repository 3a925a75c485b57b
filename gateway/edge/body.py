"""Bodies of one connection's requests, read piece by piece within bounds: each by what may be sent at most, all by `edge.bodies`."""

from __future__ import annotations

from gateway.domain.errors import BadRequest, BodyTooLarge, Overloaded
from gateway.edge.bodies import Bodies
from gateway.wire.framing import CHUNKED, Dechunker, FramingError

CHUNKED_BYTES = 65536  # taken in one piece of what waits already


class BodyReader:
    """Reads one body after the other. `reading`: the present one has not come to its end."""

    __slots__ = ("_bodies", "_bytes_max", "_dechunker", "_pieces", "_size", "_sizes_max", "held", "left", "reading")

    def __init__(self, bodies: Bodies, bytes_max: int) -> None:
        self._bodies = bodies
        self._sizes_max = bytes_max  # of any
        self._bytes_max = bytes_max  # of the present one
        self._pieces: list[bytes] = []
        self._size = 0
        self.held = 0  # bytes of one that came in pieces, until its request is answered
        self.left = 0  # bytes to come, where the length is known
        self._dechunker: Dechunker | None = None
        self.reading = False

    def __repr__(self) -> str:
        return f"<BodyReader {'reading' if self.reading else 'idle'} held {self.held}>"

    def begin(self, length: int) -> None:
        """A body of this length follows (CHUNKED: it tells)."""
        self._dechunker = Dechunker() if length == CHUNKED else None
        self.left = max(0, length)
        self._bytes_max = self._sizes_max
        self._size = 0
        self.reading = length != 0

    def limit(self, bytes_max: int) -> None:
        """The present one may be no larger than this."""
        self._bytes_max = min(self._bytes_max, bytes_max)

    def refusal(self) -> BodyTooLarge | None:
        """Why what its length says need not be read."""
        return self._too_large() if self.left > self._bytes_max else None

    def feed(self, data: bytes) -> bytes:
        """What came behind the body's end. Raises BadRequest, BodyTooLarge, or Overloaded when there is no room for more in pieces."""
        dechunker, rest = self._dechunker, b""
        if dechunker is None:
            if len(data) > self.left:
                data, rest = data[: self.left], data[self.left :]
            self.left -= len(data)
            ended = self.left == 0
        else:
            try:
                data = dechunker.feed(data)
            except FramingError:
                raise BadRequest("the body's chunks are malformed") from None
            ended, rest = dechunker.done, dechunker.rest
            if self._size + len(data) > self._bytes_max:
                raise self._too_large()
        self._size += len(data)
        self._pieces.append(data)
        if ended:
            self.reading = False
        elif self._bodies.take(len(data)):
            self.held += len(data)
        else:
            raise Overloaded("too many large requests are under way; try again shortly", retry_after_s=1.0)
        return rest

    def take(self) -> bytes:
        """The whole one."""
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        return body

    def take_from(self, ahead: bytearray) -> bytes:
        """The next bytes of it that are already here, off the front of `ahead`."""
        size = self.left if self._dechunker is None else CHUNKED_BYTES
        data = bytes(ahead[:size])
        del ahead[:size]
        return data

    def end(self) -> None:
        """Nobody reads on, whatever comes."""
        self.reading = False
        self._dechunker = None
        self._pieces.clear()

    def let_go(self) -> None:
        """The request is answered, or its body's end will not come."""
        self._pieces.clear()  # a connection is a cycle, which the collector may find much later
        if self.held:
            self._bodies.give_back(self.held)
            self.held = 0

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is larger than {self._bytes_max} bytes")
