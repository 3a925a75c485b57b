"""One control process: the real store, desk and bookkeeper, put together as `gateway.control.app` does it; the link is modelled."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterable
from typing import Any

from gateway.control.bookkeeper import Bookkeeper
from gateway.control.expiry import Expiry
from gateway.control.leases import LeaseDesk
from gateway.control.store import CreditChange
from gateway.control.store.sqlite import SqliteStore
from gateway.domain import resources
from gateway.domain.catalog import Catalog
from gateway.domain.errors import BadRequest
from gateway.link.messages import (
    VERSION,
    Back,
    Committed,
    ControlMessage,
    EdgeMessage,
    Funded,
    Hello,
    Journaled,
    Standing,
    Want,
    Welcome,
)
from tests.simulation.link import Link
from tests.simulation.machine import Failed, Machine

CATALOG = Catalog(revision="1", providers={}, models={})
EXPIRE_DAYS = 365
WANTS_MAX = 40  # of one resource in a second: bursts of eight callers come to half of it


class SimControl:
    """`start()` as a task; a `Door` for its desk."""

    def __init__(self, machine: Machine, number: int) -> None:
        self.name = f"control{number}"
        self.alive = True
        self.ready = False
        self.disk = machine.renew_disk()
        self._machine = machine
        self._edges: dict[str, Link] = {}
        self._links: set[Link] = set()  # also of those that have not said who they are
        self._sessions = 0
        self.wants: Counter[tuple[str, int]] = Counter()
        self._tasks: list[asyncio.Task[Any]] = []

    def begin(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that dies with this process."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.append(task)
        return task

    async def start(self) -> None:
        machine = self._machine
        self.store = await SqliteStore.open(machine.database)
        self.desk = LeaseDesk(store=self.store, log=machine.trace)
        self.bookkeeper = Bookkeeper(
            store=self.store,
            folder=machine.journal,
            release=self.desk.release,
            is_joined=lambda incarnation: incarnation in self._edges,
            on_committed=self._committed,
            log=machine.trace,
        )
        self.expiry = Expiry(store=self.store, days=EXPIRE_DAYS, log=machine.trace, clock=machine.wall)
        await self.bookkeeper.load()
        self.desk.attach(self)
        self.begin(self.desk.run())
        self.begin(self.bookkeeper.run())
        self.ready = True

    def kill(self) -> None:
        self.alive = self.ready = False
        self.disk.die()
        for task in self._tasks:
            task.cancel()
        if hasattr(self, "store"):
            self.store._lock.release()  # as the kernel does
        for link in sorted(self._links, key=lambda link: link.edge.incarnation):
            link.close_by_control()

    def require_whole(self) -> None:
        """No task of this process has ended by a mistake."""
        for task in self._tasks:
            if task.done() and not task.cancelled() and task.exception() is not None:
                raise Failed(f"a task of {self.name} failed") from task.exception()
        self._tasks = [task for task in self._tasks if not task.done()]

    # What `Administration` does.

    async def change_credit(self, change: CreditChange) -> None:
        try:
            changed = await self.store.change_credit(change)
        except BadRequest:
            return  # a refund of more than was paid
        if not changed.exists:
            self.push_funded(resources.balance(change.account_id))

    # Told by links.

    def opened(self, link: Link) -> None:
        self._links.add(link)

    def received(self, link: Link, message: EdgeMessage) -> None:
        if not self.alive:
            return
        name = link.edge.incarnation
        self._machine.trace.note("up", name, message)
        if isinstance(message, Hello):
            self._greet(link)
        elif isinstance(message, Want):
            self._count(message)
            self.desk.want(name, message)
        elif isinstance(message, Back):
            self.desk.back(name, message)
        elif isinstance(message, Standing):
            self.desk.standing(name, message)
        elif isinstance(message, Journaled):
            self.bookkeeper.journaled(name)

    def _count(self, want: Want) -> None:
        """Edges that take something from each other for ever would be right at every instant, and of no use."""
        second = (want.resource, int(self._machine.loop.time()))
        self.wants[second] += 1
        if self.wants[second] > WANTS_MAX:
            raise Failed(f"{want.resource} was asked for {self.wants[second]} times within a second")

    def _greet(self, link: Link) -> None:
        name = link.edge.incarnation
        link.to_edge(Welcome(version=VERSION, catalog=CATALOG, control=self.name))
        self._sessions += 1
        link.session = self._sessions
        previous = self._edges.pop(name, None)
        self._edges[name] = link
        if previous is not None:
            previous.close_by_control()

    def closed(self, link: Link) -> None:
        name = link.edge.incarnation
        self._links.discard(link)
        if self.alive and self._edges.get(name) is link:
            del self._edges[name]
            self.desk.left(name)
            self.bookkeeper.wake()

    # What the desk asks of the link.

    @property
    def joined_edges(self) -> Iterable[str]:
        return self._edges.keys()

    def session(self, incarnation: str) -> int | None:
        link = self._edges.get(incarnation)
        return link.session if link is not None else None

    def send_to(self, incarnation: str, message: ControlMessage, *, session: int | None = None) -> bool:
        link = self._edges.get(incarnation)
        if not self.alive or link is None or (session is not None and link.session != session):
            return False
        link.to_edge(message)
        return True

    def push_funded(self, resource: str) -> None:
        for link in list(self._edges.values()):
            link.to_edge(Funded(resource))

    def drop(self, incarnation: str) -> None:
        link = self._edges.get(incarnation)
        if link is not None:
            link.close_by_control()
            self.closed(link)

    def _committed(self, incarnation: str, committed: Committed) -> None:
        self.send_to(incarnation, committed)
