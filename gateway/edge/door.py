"""What a caller's connection asks of those behind it: whoever decides about requests, and whatever answers one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from gateway.domain.errors import GatewayError
from gateway.edge.bodies import Bodies
from gateway.edge.heads import RequestHead

if TYPE_CHECKING:
    from gateway.edge.caller import CallerConnection

DRAIN_IDLE_S = 2.0  # at a drain: how long a connection that was promised to be kept may take to ask once more


class Exchange(Protocol):
    """What a connection asks of the thing that answers a request."""

    @property
    def ends_with_eof(self) -> bool: ...  # whether a caller who stops talking is taken to have left

    def on_body_awaited(self) -> None:
        """The head is here and the body is not: a request that must fail anyway may be refused now."""

    def on_body(self, body: bytes) -> None: ...
    def on_body_refused(self, error: GatewayError) -> None:
        """Instead of `on_body`: it broke its framing, a limit or its deadline. To be answered at once."""

    def on_caller_gone(self) -> None: ...
    def on_caller_slow(self) -> None: ...
    def on_caller_ready(self) -> None: ...
    def on_drain_end(self) -> None: ...


class Door(Protocol):
    """Who decides about requests: the edge's server."""

    def open_exchange(self, caller: CallerConnection, head: RequestHead) -> Exchange: ...
    def on_opened(self, caller: CallerConnection) -> None: ...
    def on_closed(self, caller: CallerConnection) -> None: ...
    def on_refused(self, error: GatewayError) -> None: ...
    @property
    def bodies(self) -> Bodies: ...
    @property
    def draining(self) -> bool: ...
