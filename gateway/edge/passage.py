"""Everything that is not inference passes to control: bytes both ways, with the caller's address beside them."""

from __future__ import annotations

from collections.abc import Callable

from multidict import CIMultiDictProxy

from gateway.domain.errors import GatewayError, Overloaded, StoreUnavailable
from gateway.edge.caller import CallerConnection
from gateway.edge.heads import RequestHead
from gateway.edge.upstream import Call, CallListener, Pool
from gateway.wire.forwarded import CallerOrigin
from gateway.wire.framing import FramingError, content_length

CONNECT_S = 2.0
BODY_BYTES_MAX = 1 << 20  # what control takes: who is not asked for a key yet is not to fill our memory
# Of one connection only (RFC 9110 section 7.6.1), or ours to set.
_HOP_BY_HOP = frozenset(
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding upgrade expect "
    "content-length".split()
)
CALLER_HEADER = "X-Gateway-Caller"
SCHEME_HEADER = "X-Gateway-Scheme"
# Where a request comes from is told by these alone: what callers claim of it stays outside.
_CLAIMS = frozenset(("forwarded", "x-real-ip"))
_CLAIM_PREFIXES = ("x-gateway-", "x-forwarded-", "proxy")


class Passage(CallListener):
    """One relayed request. Control answers it; this only carries."""

    __slots__ = ("_begun", "_call", "_caller", "_control", "_head", "_length", "_on_answered", "_origin", "_status", "ends_with_eof")

    def __init__(
        self, control: Pool, caller: CallerConnection, head: RequestHead, origin: CallerOrigin, on_answered: Callable[[int], None]
    ) -> None:
        self._control = control
        self._caller: CallerConnection | None = caller
        self._head = head
        self._origin = origin
        self._on_answered = on_answered
        self._call: Call | None = None
        self._begun = False
        self._length = -1
        self._status = 0
        caller.body.limit(BODY_BYTES_MAX)
        self.ends_with_eof = False  # who only half-closed still gets the answer

    def on_body_awaited(self) -> None:
        pass

    def on_body(self, body: bytes) -> None:
        assert self._caller is not None
        try:
            self._call = self._control.call(
                _request(self._head, body, self._origin), self, connect_s=CONNECT_S, bodyless=self._head.method == "HEAD"
            )
        except Overloaded as error:
            self.on_failed(error)

    def on_body_refused(self, error: GatewayError) -> None:
        caller, self._caller = self._caller, None
        assert caller is not None
        self._on_answered(error.http_status)
        caller.answer_error(error)

    def on_caller_gone(self) -> None:
        self._caller = None
        if self._call is not None:
            self._call.cancel()
            self._call = None
        self._on_answered(499)

    def on_caller_slow(self) -> None:
        if self._call is not None:
            self._call.pause()

    def on_caller_ready(self) -> None:
        if self._call is not None:
            self._call.resume()

    def on_drain_end(self) -> None:
        if self._caller is not None:
            self._caller.abort()

    # CallListener

    def on_head(self, status: int, headers: CIMultiDictProxy[str]) -> None:
        if self._caller is None:
            return
        self._status = status
        self._begun = True
        dropped = _dropped(headers) | {"server"}
        passed = [(name, value) for name, value in headers.items() if name.lower() not in dropped]
        length = headers.get("Content-Length")
        try:
            self._length = 0 if status in (204, 304) else content_length(length) if length is not None else -1
        except FramingError:
            self._length = -1
        if length is not None and status not in (204, 304):
            passed.append(("Content-Length", length))
        if self._head.method == "HEAD":
            self._length = 0
        self._caller.begin_stream(status, passed, length=self._length)

    def on_data(self, data: bytes) -> None:
        if self._caller is not None:
            self._caller.stream(data)

    def on_end(self) -> None:
        self._call = None
        caller, self._caller = self._caller, None
        if caller is not None:
            self._on_answered(self._status)
            caller.end_stream()

    def on_failed(self, error: GatewayError) -> None:
        self._call = None
        caller, self._caller = self._caller, None
        if caller is None:
            return
        if self._begun:
            self._on_answered(502)
            caller.abort()  # cut: the caller must not take half an answer for a whole one
        else:
            self._on_answered(503)
            caller.answer_error(StoreUnavailable("this part of the service is restarting; try again", retry_after_s=1.0))


def _dropped(headers: CIMultiDictProxy[str]) -> frozenset[str]:
    """Hop-by-hop headers, and those that Connection names."""
    named = {name.strip().lower() for value in headers.getall("Connection", ()) for name in value.split(",")}
    return _HOP_BY_HOP | named if named else _HOP_BY_HOP


def _request(head: RequestHead, body: bytes, origin: CallerOrigin) -> bytes:
    dropped = _dropped(head.headers) | _CLAIMS
    lines = [f"{head.method} {head.target} HTTP/1.1"]
    for name, value in head.headers.items():
        lowered = name.lower()
        if lowered not in dropped and not lowered.startswith(_CLAIM_PREFIXES):
            lines.append(f"{name}: {value}")
    if "Host" not in head.headers:
        lines.append("Host: gateway")
    lines.append(f"{CALLER_HEADER}: {origin.address}")
    if origin.scheme:
        lines.append(f"{SCHEME_HEADER}: {origin.scheme}")
    if body or head.method in ("POST", "PUT", "PATCH"):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body
