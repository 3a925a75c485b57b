"""What an exchange said, for accounts that let it be kept: the request as it came, the answer as its caller got it.

It stays in memory until the end of the exchange is on record, and then leaves for control. Nothing here writes it anywhere,
and nothing shows it: no log line, no error, no `repr`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from gateway.edge.exchange import KEEPALIVE
from gateway.ledger.pricing import MILLION
from gateway.link.messages import Content

if TYPE_CHECKING:
    from gateway.edge.caller import CallerConnection
    from gateway.edge.exchange import InferenceExchange

HELD_BYTES_MAX = 64 * 1024 * 1024  # of all exchanges under way; what comes above it is cut


class Contents:
    """`keep` begins it for one exchange; `send` gets what an exchange said, once, after its end."""

    def __init__(self, *, send: Callable[[Content], None], exchange_bytes_max: int, discount_millionths: int) -> None:
        self.exchange_bytes_max = exchange_bytes_max  # of a request and its answer together
        self.paid_millionths = MILLION - discount_millionths  # of what such an exchange costs
        self.held_bytes = 0
        self.send = send

    def __repr__(self) -> str:
        return f"<Contents {self.held_bytes} bytes held>"

    def keep(self, exchange: InferenceExchange, caller: CallerConnection | KeptCaller, body: bytes) -> KeptCaller:
        """The caller to answer in place of `caller`: what is answered is kept beside `body`, the request."""
        return KeptCaller(self, exchange, caller, body)


class KeptCaller:
    """Stands between an exchange and its caller, passes everything on, and keeps what an answer's body is made of.

    Its last bytes tell it the end. Where the caller has left before them, the exchange does, by `end`.
    """

    __slots__ = ("_answer", "_caller", "_contents", "_exchange", "_held_bytes", "_request", "_truncated", "peer")

    def __init__(self, contents: Contents, exchange: InferenceExchange, caller: CallerConnection | KeptCaller, body: bytes) -> None:
        self.peer: str = caller.peer
        self._contents = contents
        self._exchange: InferenceExchange | None = exchange
        self._caller = caller
        self._held_bytes = 0
        self._truncated = False
        self._answer = bytearray()
        self._request = self._fitting(body)

    def __repr__(self) -> str:
        return f"<KeptCaller {self._held_bytes} bytes{', cut' if self._truncated else ''}>"

    # What an exchange asks of its caller.

    def begin_stream(self, status: int, headers: Iterable[tuple[str, str]], content_type: str | None = None) -> None:
        self._caller.begin_stream(status, headers, content_type)

    def stream(self, data: bytes) -> None:
        if data != KEEPALIVE:
            self._answer += self._fitting(data)
        self._caller.stream(data)

    def end_stream(self, data: bytes = b"") -> None:
        self._answer += self._fitting(data)
        self._caller.end_stream(data)
        self.end()

    def answer_stream(self, status: int, data: bytes, headers: Iterable[tuple[str, str]], content_type: str) -> None:
        self._answer += self._fitting(data)
        self._caller.answer_stream(status, data, headers, content_type)
        self.end()

    def answer(self, status: int, body: bytes, headers: Iterable[tuple[str, str]] = ()) -> None:
        self._answer += self._fitting(body)
        self._caller.answer(status, body, headers)
        self.end()

    def abort(self) -> None:
        self._caller.abort()

    # The end.

    def end(self) -> None:
        """The exchange is over, and on record unless it was refused before anything was asked of a provider."""
        exchange, self._exchange = self._exchange, None  # each knows the other
        self.forget()
        if exchange is None or exchange.bill is None or exchange.key is None:
            return
        self._contents.send(
            Content(
                generation_id=exchange.generation_id,
                account_id=exchange.key.account_id,
                created_at_ms=int(time.time() * 1000),
                request=self._request,
                answer=bytes(self._answer),
                truncated=self._truncated,
            )
        )

    def forget(self) -> None:
        """It takes no more room: it is on its way, or nobody will ask for it."""
        self._contents.held_bytes -= self._held_bytes
        self._held_bytes = 0

    def _fitting(self, data: bytes) -> bytes:
        """What of it may be kept. Nothing may that comes after a cut: an answer has no holes."""
        contents = self._contents
        room = min(contents.exchange_bytes_max - self._held_bytes, HELD_BYTES_MAX - contents.held_bytes) if not self._truncated else 0
        if len(data) > room:
            self._truncated = True
            data = data[: max(0, room)]
        self._held_bytes += len(data)
        contents.held_bytes += len(data)
        return data
