"""Edges, a link on which anything can be lost, and control's half of the money path, in one process on real files."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from gateway.control.bookkeeper import Bookkeeper
from gateway.control.leases import LeaseDesk
from gateway.control.store.sqlite import SqliteStore
from gateway.ledger.book import Book, Hold, LeaseShort
from gateway.link.messages import Back, Grant, Recall, Standing, Want
from gateway.log import Log
from tests.control.journaling import Writer, generation, rows

ANN = "balance:user_ann"
CREDIT = 1_000_000
LOG = Log("test", fd=-1)


class Edge:
    """An edge with its book and its journal; what control says waits in `inbox` until it is listened to."""

    def __init__(self, network: Network, name: str) -> None:
        self.network = network
        self.name = name
        self.book = Book()
        self.journal = Writer(network.folder, name)
        self.inbox: deque[Grant | Recall] = deque()
        self.holds: list[Hold] = []
        self.asked = False
        self.spent = 0

    def says(self, message: Want | Back | Standing) -> None:
        desk = self.network.desk
        if isinstance(message, Want):
            desk.want(self.name, message)
        elif isinstance(message, Back):
            desk.back(self.name, message)
        else:
            desk.standing(self.name, message)

    def listen(self) -> None:
        message = self.inbox.popleft()
        if isinstance(message, Recall):
            self.says(Back(message.resource, self.book.give_back(message.resource)))
        else:
            self.asked = False
            if not message.refused and not message.unavailable:
                self.book.granted(message.resource, message.nanos, 0.0)

    def hold(self, nanos: int) -> None:
        try:
            self.holds.append(self.book.hold((ANN,), nanos, 0.0))
        except LeaseShort as short:
            if not self.asked:
                self.asked = True
                self.says(Want(ANN, short.missing_nanos, nanos * 3))

    def settle(self, chance: random.Random) -> None:
        hold = self.holds.pop(chance.randrange(len(self.holds)))
        nanos = chance.choice((0, hold.nanos, chance.randint(0, hold.nanos)))
        self.journal.append(generation(nanos=nanos))
        hold.settle(nanos)
        self.spent += nanos

    @property
    def may_spend(self) -> int:
        return self.book.available(ANN) + sum(hold.nanos for hold in self.holds)


class Network:
    """The link, as the desk sees it, with everything that can go wrong on it."""

    def __init__(self, folder: Path, desk: LeaseDesk) -> None:
        self.folder = folder
        self.desk = desk
        self.edges: dict[str, Edge] = {}
        self.sessions: dict[str, int] = {}
        self.funded: list[str] = []
        self.dropped: list[str] = []
        self.spent_by_the_dead = 0
        self._count = 0

    @property
    def joined_edges(self) -> Iterable[str]:
        return self.sessions.keys()

    def session(self, incarnation: str) -> int | None:
        return self.sessions.get(incarnation)

    def send_to(self, incarnation: str, message: Grant | Recall, *, session: int | None = None) -> bool:
        if self.sessions.get(incarnation) is None or session not in (None, self.sessions[incarnation]):
            return False
        self.edges[incarnation].inbox.append(message)
        return True

    def push_funded(self, resource: str) -> None:
        self.funded.append(resource)

    def drop(self, incarnation: str) -> None:
        self.dropped.append(incarnation)
        self.rejoin(self.edges[incarnation])

    def join(self) -> Edge:
        self._count += 1
        edge = self.edges[f"edge{self._count}"] = Edge(self, f"edge{self._count}")
        self._connect(edge)
        return edge

    def rejoin(self, edge: Edge) -> None:
        """The link is lost with all that is on it, and made again."""
        del self.sessions[edge.name]
        self.desk.left(edge.name)
        edge.inbox.clear()
        edge.asked = False
        self._connect(edge)

    def kill(self, edge: Edge) -> None:
        edge.journal.die()
        del self.sessions[edge.name], self.edges[edge.name]
        self.desk.left(edge.name)
        self.spent_by_the_dead += edge.spent

    def _connect(self, edge: Edge) -> None:
        self._count += 1
        self.sessions[edge.name] = self._count
        edge.says(Standing(edge.book.standing()))

    @property
    def spent(self) -> int:
        return self.spent_by_the_dead + sum(edge.spent for edge in self.edges.values())


class World:
    """Desk, bookkeeper and store, and edges that use them."""

    def __init__(self, folder: Path, store: SqliteStore) -> None:
        self.database = folder / "gateway.db"
        self.store = store
        self.desk = LeaseDesk(store=store, log=LOG, recall_s=0.02)
        self.network = Network(folder / "journal", self.desk)
        self.desk.attach(self.network)
        self.keeper = Bookkeeper(
            store=store,
            folder=folder / "journal",
            release=self.desk.release,
            is_joined=self.network.sessions.__contains__,
            log=LOG,
        )
        self.running = asyncio.create_task(self.desk.run())

    async def settled(self) -> None:
        """Until the desk has done everything that was asked so far."""
        await self.desk.release("nobody")

    async def answer(self, edge: Edge, others: Iterable[Edge] = ()) -> Grant:
        """The next Grant of this edge, while others listen."""
        async with asyncio.timeout(5):
            while True:
                for other in others:
                    while other.inbox:
                        other.listen()
                for message in edge.inbox:
                    if isinstance(message, Grant):
                        edge.inbox.remove(message)
                        if not message.refused and not message.unavailable:
                            edge.book.granted(message.resource, message.nanos, 0.0)
                        return message
                await asyncio.sleep(0.001)

    def leases(self) -> dict[str, int]:
        """Open nanos by edge."""
        return {row[0]: row[1] for row in rows(self.database, "SELECT incarnation, granted_nanos - settled_nanos FROM leases")}
