"""The edge's listener: accepts callers, routes their requests, counts them, and drains them.

Two routes are inference and answered here; every other path goes to control. A path matches exactly or not at all.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from gateway.domain.errors import GatewayError, MethodNotAllowed, Overloaded
from gateway.edge.bodies import bodies_of
from gateway.edge.caller import LINGER_S, CallerConnection
from gateway.edge.door import DRAIN_IDLE_S, Exchange
from gateway.edge.exchange import InferenceExchange
from gateway.edge.heads import RequestHead
from gateway.edge.hedging import HedgedExchange, Hedging
from gateway.edge.parts import Parts
from gateway.edge.passage import Passage
from gateway.edge.report import ROUTES
from gateway.edge.responses import PREFLIGHT
from gateway.edge.upstream import Pool
from gateway.log import Log
from gateway.settings import Server
from gateway.wire.envelope import Kind

INFERENCE_ROUTES: dict[str, Kind] = {
    "/api/v1/chat/completions": "chat",
    "/v1/chat/completions": "chat",
    "/api/v1/completions": "text",
    "/v1/completions": "text",
}
CONTROL_ROUTE = "control"
REFUSED_ROUTE = "refused"  # before a path was known
DESCRIPTORS_OWN = 64  # for everything that is neither a caller nor a call made for one
DESCRIPTORS_MAX = 1 << 20


class _Immediate:
    """An answer that is known from the head alone."""

    ends_with_eof = False

    def __init__(self, caller: CallerConnection, status: int, headers: Iterable[tuple[str, str]], error: GatewayError | None) -> None:
        self._caller = caller
        self._status = status
        self._headers = headers
        self._error = error

    def on_body_awaited(self) -> None:
        self.on_body(b"")

    def on_body(self, body: bytes) -> None:
        if self._error is not None:
            self._caller.answer_error(self._error, self._headers)
        else:
            self._caller.answer(self._status, b"", self._headers)

    def on_body_refused(self, error: GatewayError) -> None:
        self.on_body(b"")

    def on_caller_gone(self) -> None: ...
    def on_caller_slow(self) -> None: ...
    def on_caller_ready(self) -> None: ...
    def on_drain_end(self) -> None: ...


class EdgeServer:
    """Owns the listening socket and all caller connections."""

    def __init__(self, *, settings: Server, parts: Parts, control: Pool, log: Log, hedging: Hedging | None = None, edges: int = 1) -> None:
        self._settings = settings
        self._parts = parts
        self._open_inference: Callable[[CallerConnection, RequestHead, Kind], InferenceExchange] = (
            partial(InferenceExchange, parts) if hedging is None else partial(HedgedExchange, hedging, parts)
        )
        self._control = control
        self._log = log
        self.bodies = bodies_of(settings, edges)
        self._callers: set[CallerConnection] = set()
        self._server: asyncio.Server | None = None
        self._closed = asyncio.Event()
        self._full = False
        self.draining = False

    def __repr__(self) -> str:
        return f"<EdgeServer callers {len(self._callers)}{' draining' if self.draining else ''}>"

    @property
    def connections(self) -> int:
        return len(self._callers)

    @property
    def inflight(self) -> int:
        return sum(caller.exchange is not None for caller in self._callers)

    def exchanges(self) -> Iterator[InferenceExchange]:
        """Those for inference that are under way."""
        return (caller.exchange for caller in self._callers if isinstance(caller.exchange, InferenceExchange))

    @property
    def listening(self) -> bool:
        return self._server is not None and not self.draining

    async def start(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        raise_descriptor_limit()
        # Until its handshake is made a connection is none of ours: nothing else would end it, or one whose caller never says goodbye.
        handshake_s, goodbye_s = (None, None) if tls is None else (self._settings.request_head_s, LINGER_S)
        self._server = await asyncio.get_running_loop().create_server(
            lambda: CallerConnection(self, self._settings),
            sock=listener,
            ssl=tls,
            backlog=4096,
            ssl_handshake_timeout=handshake_s,
            ssl_shutdown_timeout=goodbye_s,
        )

    async def drain(self) -> None:
        """Accept what is queued, then nothing more; let exchanges finish within `drain_s`; end the rest in-band."""
        self.draining = True
        await self._accept_queued()
        if self._server is not None:
            self._server.close()
        # A kept connection is closed with its next answer; closing it under a request on its way would lose that.
        idle_s = min(DRAIN_IDLE_S, self._settings.drain_s)
        if await self._all_closed_within(idle_s):
            return
        for caller in list(self._callers):
            caller.close_if_idle()
        if await self._all_closed_within(self._settings.drain_s - idle_s):
            return
        self._log.warning("drain_over", connections=len(self._callers))
        for caller in list(self._callers):
            if caller.exchange is not None:
                caller.exchange.on_drain_end()  # its last event leaves, and closes the connection, once it is journalled
            else:
                caller.close()
        if not await self._all_closed_within(1.0):
            for caller in list(self._callers):
                caller.abort()

    async def _accept_queued(self) -> None:
        """The kernel's queue may hold callers who saw their connection established: one turn of the loop accepts a batch."""
        before = -1
        while before != len(self._callers):
            before = len(self._callers)
            await asyncio.sleep(0.01)  # a turn of the loop that includes polling for new connections

    async def _all_closed_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                while self._callers:
                    self._closed.clear()
                    await self._closed.wait()
        except TimeoutError:
            return False
        return True

    # Door

    def open_exchange(self, caller: CallerConnection, head: RequestHead) -> Exchange:
        kind = INFERENCE_ROUTES.get(head.path)
        if kind is None:
            origin = self._parts.site.caller(head.headers, caller.peer)
            return Passage(self._control, caller, head, origin, lambda status: self._parts.report.answered(CONTROL_ROUTE, status))
        if head.method == "POST":
            open_inference = self._open_inference
            return open_inference(caller, head, kind)
        if head.method == "OPTIONS":
            self._parts.report.answered(ROUTES[kind], 204)
            return _Immediate(caller, 204, PREFLIGHT, None)
        error = MethodNotAllowed("only POST is allowed here")
        self._parts.report.refused(ROUTES[kind], error)
        return _Immediate(caller, 405, (("Allow", "POST, OPTIONS"),), error)

    def on_opened(self, caller: CallerConnection) -> None:
        self._callers.add(caller)
        full = len(self._callers) > callers_max()
        if full:
            self._parts.report.answered(REFUSED_ROUTE, Overloaded.status)
            caller.turn_away(Overloaded("too many connections are open; try again", retry_after_s=1.0))
        if full and not self._full:
            self._log.warning("connections_full", connections=len(self._callers))
        self._full = full

    def on_closed(self, caller: CallerConnection) -> None:
        self._callers.discard(caller)
        self._closed.set()

    def on_refused(self, error: GatewayError) -> None:
        self._parts.report.refused(REFUSED_ROUTE, error)


def raise_descriptor_limit() -> None:
    """The soft limit is there for programs that use select(); this one may have all that it is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def callers_max() -> int:
    """Connections that can be served: each may need a second descriptor for its call. Asked anew, since `prlimit` changes it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (DESCRIPTORS_MAX if soft == resource.RLIM_INFINITY else max(DESCRIPTORS_OWN + 2, soft) - DESCRIPTORS_OWN) // 2
