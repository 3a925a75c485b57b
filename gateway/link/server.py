"""Control's end of the link: who the edges are, what they ask, and what is pushed to all of them.

An edge that does not read is dropped once its buffer is full; it joins again and gets everything anew. Answers about
a key are never older than a push about the same key: a lookup that a change overtook is made again.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import cast

from gateway.domain.catalog import Catalog
from gateway.domain.errors import StoreUnavailable
from gateway.domain.keys import KeyRecord
from gateway.domain.metrics import Samples
from gateway.link.messages import (
    VERSION,
    Back,
    CatalogChanged,
    Content,
    ControlMessage,
    FindKey,
    FleetFigures,
    Frames,
    Funded,
    Hello,
    KeyChanged,
    KeyFound,
    LinkError,
    Observation,
    Report,
    Standing,
    Unwelcome,
    Want,
    Welcome,
    decode_from_edge,
    frame,
)
from gateway.log import Log, exception_fields
from gateway.routing.figures import Merged, Observed

HELLO_S = 5.0  # how long a connection may stay silent about who it is
BUFFER_BYTES_MAX = 16 * 1024 * 1024  # unread bytes after which an edge is dropped; one frame may come on top
FIGURES_BYTES_MAX = 1024 * 1024  # unread bytes after which an edge is spared figures: the next ones replace them
QUESTIONS_MAX = 20_000  # waiting for the store, over all edges; more are answered "unavailable" at once
QUESTIONS_PER_LOOKUP = 500
BACKLOG = 128

KeyLookup = Callable[[Iterable[str]], Awaitable[dict[str, KeyRecord]]]


class LinkServer:
    """Listens at `address` between `start()` and `stop()`. `find_keys` may raise StoreUnavailable.

    All callbacks but `on_content` carry an edge's incarnation; those about leases and the journal come in the order the edge sent them.
    """

    def __init__(
        self,
        *,
        address: str,
        incarnation: str,
        catalog: Catalog,
        find_keys: KeyLookup,
        on_joined: Callable[[str], None],
        on_left: Callable[[str], None],
        on_report: Callable[[str, Samples], None],
        on_want: Callable[[str, Want], None] = lambda incarnation, want: None,
        on_back: Callable[[str, Back], None] = lambda incarnation, back: None,
        on_standing: Callable[[str, Standing], None] = lambda incarnation, standing: None,
        on_journaled: Callable[[str], None] = lambda incarnation: None,
        on_observed: Callable[[str, Observed], None] = lambda incarnation, observed: None,
        on_content: Callable[[Content], None] = lambda content: None,
        log: Log,
    ) -> None:
        self.incarnation = incarnation
        self.catalog = catalog
        self.log = log
        self.on_joined = on_joined
        self.on_left = on_left
        self.on_report = on_report
        self.on_want = on_want
        self.on_back = on_back
        self.on_standing = on_standing
        self.on_journaled = on_journaled
        self.on_observed = on_observed
        self.on_content = on_content
        self._address = address
        self._find_keys = find_keys
        self._connections: set[_EdgeConnection] = set()
        self._edges: dict[str, _EdgeConnection] = {}
        self._sessions = 0
        self._questions: collections.deque[tuple[_EdgeConnection, FindKey]] = collections.deque()
        self._asked = asyncio.Event()
        self._changed: set[str] | None = None  # digests pushed while a lookup is under way
        self._server: asyncio.Server | None = None
        self._answering: asyncio.Task[None] | None = None

    @property
    def edges(self) -> int:
        """How many edges have joined."""
        return len(self._edges)

    @property
    def joined_edges(self) -> Iterable[str]:
        """Their incarnations."""
        return self._edges.keys()

    def session(self, incarnation: str) -> int | None:
        """Names the connection that an edge has now, among all that ever were; None: it has none."""
        edge = self._edges.get(incarnation)
        return edge.session if edge is not None else None

    async def start(self) -> None:
        """Listen; a socket file left by a dead control is replaced."""
        self._server = await asyncio.get_running_loop().create_unix_server(
            lambda: _EdgeConnection(self), sock=bound_socket(self._address), backlog=BACKLOG
        )
        self._answering = asyncio.create_task(self._answer(), name="link answers")

    async def stop(self) -> None:
        """Close the listener and every connection."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.close()
        if self._answering is not None:
            self._answering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._answering

    def push_key(self, digest: str, key: KeyRecord | None) -> None:
        """Tell every edge the new truth of a key, after it was committed."""
        if self._changed is not None:
            self._changed.add(digest)
        self._push(frame(KeyChanged(digest=digest, key=key)))

    def push_catalog(self, catalog: Catalog) -> None:
        """The catalog of every edge from now on."""
        self.catalog = catalog
        self._push(frame(CatalogChanged(catalog=catalog)))

    def push_funded(self, resource: str) -> None:
        """Tell every edge that there may be more of a resource."""
        self._push(frame(Funded(resource=resource)))

    def push_figures(self, merged: Merged) -> None:
        """Tell every edge that knows the message what all of them saw. One that reads slowly gets a later one instead."""
        data = frame(FleetFigures(merged))
        for edge in list(self._edges.values()):
            if edge.hello is not None and edge.hello.takes_figures and edge.unread_bytes() <= FIGURES_BYTES_MAX:
                edge.write(data)

    def send_to(self, incarnation: str, message: ControlMessage, *, session: int | None = None) -> bool:
        """Send to one edge, if it is joined (by this session, when one is named); whether it was."""
        edge = self._edges.get(incarnation)
        if edge is None or (session is not None and edge.session != session):
            return False
        edge.write(frame(message))
        return True

    def drop(self, incarnation: str) -> None:
        """End an edge's link; it will join again."""
        edge = self._edges.get(incarnation)
        if edge is not None:
            edge.close()

    def _push(self, data: bytes) -> None:
        for edge in list(self._edges.values()):
            edge.write(data)

    def opened(self, connection: _EdgeConnection) -> None:
        self._connections.add(connection)

    def joined(self, connection: _EdgeConnection, hello: Hello) -> None:
        """The first word of an edge. One that comes back before its old connection was seen to end replaces it."""
        self._sessions += 1
        connection.session = self._sessions
        previous = self._edges.pop(hello.incarnation, None)
        self._edges[hello.incarnation] = connection
        if previous is not None:
            previous.close()
        else:
            self.on_joined(hello.incarnation)
        self.log.info("edge_joined", slot=hello.slot, incarnation=hello.incarnation, edge_pid=hello.pid)

    def closed(self, connection: _EdgeConnection) -> None:
        self._connections.discard(connection)
        hello = connection.hello
        if hello is not None and self._edges.get(hello.incarnation) is connection:
            del self._edges[hello.incarnation]
            self.on_left(hello.incarnation)
            self.log.info("edge_left", slot=hello.slot, incarnation=hello.incarnation)

    def ask(self, connection: _EdgeConnection, question: FindKey) -> None:
        if len(self._questions) >= QUESTIONS_MAX:
            connection.write(frame(KeyFound(id=question.id, key=None, unavailable=True)))
            return
        self._questions.append((connection, question))
        self._asked.set()

    async def _answer(self) -> None:
        """Look questions up as they come, many per trip to the store when many came at once."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            while self._questions:
                batch = [self._questions.popleft() for _ in range(min(len(self._questions), QUESTIONS_PER_LOOKUP))]
                try:
                    found = await self._lookup({question.digest for _, question in batch})
                except StoreUnavailable as error:
                    self.log.warning("key_lookup_failed", questions=len(batch), code=error.code)
                    found = None
                except Exception as error:  # noqa: BLE001 - the task's outermost edge: one bad lookup must not end all others
                    self.log.error("key_lookup_failed", questions=len(batch), **exception_fields(error))
                    found = None
                for connection, question in batch:
                    key = found.get(question.digest) if found is not None else None
                    connection.write(frame(KeyFound(id=question.id, key=key, unavailable=found is None)))

    async def _lookup(self, digests: set[str]) -> dict[str, KeyRecord]:
        found: dict[str, KeyRecord] = {}
        try:
            while digests:
                changed: set[str] = set()
                self._changed = changed
                read = await self._find_keys(digests)
                for digest in digests:  # also those that are gone since the first reading
                    found.pop(digest, None)
                found.update(read)
                digests = digests & changed
        finally:
            self._changed = None
        return found


class _EdgeConnection(asyncio.Protocol):
    """One edge, from its Hello on."""

    def __init__(self, server: LinkServer) -> None:
        self.hello: Hello | None = None
        self.session = 0  # once joined
        self._server = server
        self._frames = Frames()
        self._transport: asyncio.Transport | None = None
        self._hello_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._hello_timer = asyncio.get_running_loop().call_later(HELLO_S, self.close)
        self._server.opened(self)

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._frames.feed(data):
                self._receive(payload)
        except LinkError as error:
            self._server.log.error("edge_broke_protocol", reason=str(error)[:200], incarnation=self.hello and self.hello.incarnation)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._hello_timer is not None:
            self._hello_timer.cancel()
        self._server.closed(self)

    def write(self, data: bytes) -> None:
        """Send a frame, or drop the edge when it has left too much unread."""
        if self._transport is None or self._transport.is_closing():
            return
        if self._transport.get_write_buffer_size() > BUFFER_BYTES_MAX:
            self._server.log.error("edge_dropped_unread", incarnation=self.hello and self.hello.incarnation)
            self.close()
            return
        self._transport.write(data)

    def unread_bytes(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _receive(self, payload: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        message = decode_from_edge(payload)
        if isinstance(message, Hello):
            self._greet(message)
        elif self.hello is None:
            raise LinkError("the first message was not a hello")
        elif isinstance(message, FindKey):
            self._server.ask(self, message)
        elif isinstance(message, Report):
            self._server.on_report(self.hello.incarnation, message.samples)
        elif isinstance(message, Observation):
            self._server.on_observed(self.hello.incarnation, message.observed)
        elif isinstance(message, Want):
            self._server.on_want(self.hello.incarnation, message)
        elif isinstance(message, Back):
            self._server.on_back(self.hello.incarnation, message)
        elif isinstance(message, Standing):
            self._server.on_standing(self.hello.incarnation, message)
        elif isinstance(message, Content):
            self._server.on_content(message)
        else:
            self._server.on_journaled(self.hello.incarnation)

    def _greet(self, hello: Hello) -> None:
        assert self._transport is not None
        if self.hello is not None:
            raise LinkError("a second hello")
        if self._hello_timer is not None:
            self._hello_timer.cancel()
        if hello.version != VERSION:
            reason = f"control speaks version {VERSION} of the link, this edge {hello.version}"
            self._server.log.error("edge_refused", slot=hello.slot, incarnation=hello.incarnation, reason=reason)
            self._transport.write(frame(Unwelcome(reason=reason)))
            self._transport.close()
            return
        self.hello = hello
        welcome = Welcome(
            version=VERSION,
            catalog=self._server.catalog,
            control=self._server.incarnation,
            takes_observations=True,
            takes_content=True,
            takes_changes=True,
        )
        self.write(frame(welcome))
        self._server.joined(self, hello)


def bound_socket(address: str) -> socket.socket:
    """A unix socket bound at `address`, mode 0600, in place of a file that an earlier process left.

    Two live processes never race for it: whoever binds holds the store's lock.
    """
    path = Path(address)
    path.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        bound.bind(address)
        path.chmod(0o600)  # nobody can connect before listen(), and the directory is 0700
    except BaseException:
        bound.close()
        raise
    return bound
