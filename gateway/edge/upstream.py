"""Connections to providers: pooled, bounded, one call at a time each; and the only place that names their failures.

A `Call` is one request and its answer, told to a listener by callbacks. It needs no task or future when an idle
connection is at hand. Heads are read by aiohttp's C parser, bodies by `wire.framing`. Redirects are answers like any
other: credentials and prompts go to the configured origin and nowhere else.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

from multidict import CIMultiDictProxy

from gateway.domain.errors import ConnectFailed, GatewayError, Overloaded, TlsFailed
from gateway.edge.connection import ProviderConnection
from gateway.edge.known_heads import KnownHeads
from gateway.edge.resolver import Resolver

IDLE_S_MAX = 55.0  # shorter than the 60 s at which common servers and load balancers close
RETRY_S = 1.0  # after which a call refused for want of a place may be tried again
DRAIN_S = 1.0  # how long a provider may take to end its framing after the end of its answer


class CallListener:
    """What a call tells. After `on_end` or `on_failed` nothing follows; after `cancel` nothing at all."""

    __slots__ = ()

    def on_head(self, status: int, headers: CIMultiDictProxy[str]) -> None: ...
    def on_data(self, data: bytes) -> None: ...
    def on_end(self) -> None: ...
    def on_failed(self, error: GatewayError) -> None: ...

    def on_whole(self, headers: CIMultiDictProxy[str], pieces: list[bytes]) -> None:
        """Instead of the first three: a 200 that came all at once; its body is in the chunks that the provider wrote."""
        self.on_head(200, headers)
        if data := b"".join(pieces):
            self.on_data(data)
        self.on_end()


class Origin:
    """Where a pool connects to: host and port, or a unix socket."""

    __slots__ = ("host", "port", "tls", "unix_path")

    def __init__(self, host: str = "", port: int = 0, *, tls: bool = False, unix_path: str = "") -> None:
        self.host = host
        self.port = port
        self.tls = tls
        self.unix_path = unix_path

    def __repr__(self) -> str:
        return f"<Origin {self.unix_path or f'{self.host}:{self.port}'}{' tls' if self.tls else ''}>"


class Pool:
    """Connections to one origin. At most `calls_max` calls at a time; idle connections are kept, newest first.

    `known_heads`: whether heads of answers that come again are known by their form; listeners are told only the
    headers that are acted on then.
    """

    def __init__(
        self,
        origin: Origin,
        *,
        resolver: Resolver,
        tls: ssl.SSLContext | None,
        calls_max: int,
        known_heads: bool = False,
        on_connected: Callable[[], None] = lambda: None,
    ) -> None:
        self.origin = origin
        self.calls = 0
        self.heads = KnownHeads() if known_heads else None
        self._calls_max = calls_max
        self._resolver = resolver
        self._tls = tls
        self._on_connected = on_connected
        self._idle: list[ProviderConnection] = []
        self._open: set[ProviderConnection] = set()
        self._draining: dict[Call, float] = {}
        self._connecting: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self.now = self._loop.time

    def __repr__(self) -> str:
        return f"<Pool {self.origin!r} calls {self.calls}/{self._calls_max} idle {len(self._idle)} open {len(self._open)}>"

    @property
    def in_use(self) -> bool:
        """Whether anything of this pool is still to end."""
        return bool(self.calls or self._open or self._connecting)

    def call(self, request: bytes, listener: CallListener, *, connect_s: float, bodyless: bool = False) -> Call:
        """Send `request` (head and body). Raises Overloaded when `calls_max` are under way."""
        if self.calls >= self._calls_max:
            raise Overloaded("too many calls to this provider under way", retry_after_s=RETRY_S)
        call = Call(self, request, listener, connect_s, bodyless)
        self.calls += 1
        idle = self._idle
        while idle:
            connection = idle.pop()
            if connection.begin(call, reused=True):
                return call
            connection.close()
        self._connect(call)
        return call

    def _connect(self, call: Call) -> None:
        task = self._loop.create_task(self._connect_for(call))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect_for(self, call: Call) -> None:
        try:
            async with asyncio.timeout(call.connect_s):
                connection = await self._open_connection()
        except TimeoutError:
            call.fail(ConnectFailed("Provider did not accept a connection in time"))
        except ssl.SSLError:
            call.fail(TlsFailed("Provider's certificate or TLS handshake was refused"))
        except OSError:
            call.fail(ConnectFailed("Provider refused the connection or could not be found"))
        except asyncio.CancelledError:
            call.fail(ConnectFailed("Provider connection was given up"))
            raise
        else:
            self._on_connected()
            if call.ended and connection.usable():
                self.keep(connection)
            elif call.ended:
                connection.close()
            elif not connection.begin(call, reused=False):
                call.fail(ConnectFailed("Provider closed the connection at once"))

    async def _open_connection(self) -> ProviderConnection:
        origin = self.origin
        if origin.unix_path:
            _, connection = await self._loop.create_unix_connection(lambda: ProviderConnection(self), origin.unix_path)
            return connection
        addresses = await self._resolver.resolve(origin.host, origin.port)
        failure: OSError = OSError("no address")
        for address in addresses:
            try:
                _, connection = await self._loop.create_connection(
                    lambda: ProviderConnection(self),
                    address,
                    origin.port,
                    ssl=self._tls if origin.tls else None,
                    server_hostname=origin.host if origin.tls else None,
                )
            except ssl.SSLError:
                raise
            except OSError as error:
                failure = error
            else:
                return connection
        raise failure

    def resend(self, call: Call) -> None:
        """The idle connection picked for `call` was already closed by the provider: once more, on a fresh one."""
        self._connect(call)

    def on_draining(self, call: Call) -> None:
        self._draining[call] = self._loop.time() + DRAIN_S

    def on_call_ended(self, call: Call) -> None:
        self.calls -= 1
        if self._draining:
            self._draining.pop(call, None)

    def on_opened(self, connection: ProviderConnection) -> None:
        self._open.add(connection)

    def on_closed(self, connection: ProviderConnection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def keep(self, connection: ProviderConnection) -> None:
        """A connection whose answer is complete waits for the next call."""
        connection.idle_since = self._loop.time()
        self._idle.append(connection)

    def sweep(self) -> None:
        """Close what was idle for too long, oldest first, and watch the origin's name. Called about once a second."""
        now = self._loop.time()
        for call in [call for call, until in self._draining.items() if until < now]:
            call.cancel()
        oldest = now - IDLE_S_MAX
        while self._idle and self._idle[0].idle_since < oldest:
            self._idle.pop(0).close()
        if self._open and not self.origin.unix_path:
            self._resolver.keep_fresh(self.origin.host, self.origin.port)

    def retire(self) -> None:
        """The origin's addresses changed: no connection to the old ones is to be used again, those in use included."""
        for connection in self._open:
            connection.retired = True
        while self._idle:
            self._idle.pop().close()

    async def close(self) -> None:
        for task in list(self._connecting):
            task.cancel()
        for connection in list(self._open):
            connection.close()
        if self._connecting:
            await asyncio.wait(self._connecting)


_NOBODY = CallListener()  # listens to the end of an answer that nobody needs


class Call:
    """One request on its way and its answer on the way back."""

    __slots__ = ("_connection", "_pool", "bodyless", "connect_s", "ended", "listener", "paused", "request", "sent_at")

    def __init__(self, pool: Pool, request: bytes, listener: CallListener, connect_s: float, bodyless: bool) -> None:
        self._pool = pool
        self.listener = listener
        self._connection: ProviderConnection | None = None
        self.request = request
        self.connect_s = connect_s
        self.bodyless = bodyless  # the answer to HEAD
        self.ended = False
        self.paused = False
        self.sent_at = 0.0  # by loop.time(); 0: still connecting

    def cancel(self) -> None:
        """Give up: the connection is closed, so that the provider stops working for nobody."""
        if not self.ended:
            connection = self._end()
            if connection is not None:
                connection.abort()

    def drain(self) -> None:
        """The listener has all it wants: let the provider end its framing, so that the connection can be used again."""
        self.listener = _NOBODY
        self._pool.on_draining(self)
        self.resume()

    def pause(self) -> None:
        """The reader is slow: stop reading from the provider."""
        self.paused = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        self.paused = False
        if self._connection is not None:
            self._connection.resume()

    # Told by the connection.

    def on_begun(self, connection: ProviderConnection) -> None:
        self._connection = connection
        self.sent_at = self._pool.now()
        if self.paused:
            connection.pause()

    def complete(self) -> None:
        self.ended = True
        self._connection = None
        self._pool.on_call_ended(self)
        self.listener.on_end()

    def complete_with(self, headers: CIMultiDictProxy[str], pieces: list[bytes]) -> None:
        self.ended = True
        self._connection = None
        self._pool.calls -= 1  # it is not draining: nobody has told its listener anything so far
        self.listener.on_whole(headers, pieces)

    def fail(self, error: GatewayError) -> None:
        if not self.ended:
            self._end()
            self.listener.on_failed(error)

    def resend(self) -> None:
        self._connection = None
        self.sent_at = 0.0
        self._pool.resend(self)

    def _end(self) -> ProviderConnection | None:
        self.ended = True
        self._pool.on_call_ended(self)
        connection, self._connection = self._connection, None
        return connection
