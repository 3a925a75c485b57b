"""One edge process: the real book, admission, journal and marks; what becomes of its exchanges is the scheduler's choice."""

from __future__ import annotations

import asyncio
import os
import random
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import msgspec

from gateway.domain.catalog import Endpoint, Model, Price
from gateway.domain.errors import GatewayError
from gateway.domain.generation import Generation
from gateway.domain.keys import KeyRecord
from gateway.edge.admission import Admission
from gateway.edge.journal import Journal
from gateway.edge.quotes import Quote
from gateway.edge.running import Running
from gateway.edge.snapshots import choices_of
from gateway.ledger.book import Book, Hold
from gateway.link.messages import VERSION, Committed, ControlMessage, Funded, Grant, Hello, Journaled, Recall, Telling, Welcome
from gateway.routing.router import Router
from gateway.settings import Limits, Routing
from gateway.wire import records
from tests.simulation.control import CATALOG
from tests.simulation.link import Link

if TYPE_CHECKING:
    from gateway.edge.exchange import InferenceExchange
    from gateway.edge.settlement import Settlement
    from tests.simulation.world import World

_ENDPOINT = Endpoint(
    id="a/b@n", model_id="a/b", provider="n", tag="n", upstream_model="b", context_length=1000,
    price=Price(prompt=10**6, completion=10**6),
)  # fmt: skip
_MODEL = Model(id="a/b", canonical_slug="a/b", name="b", context_length=1000, endpoints=(_ENDPOINT,))
# Rates are no money: they live in memory, and are let go while control is away.
UNLIMITED = Limits(free_requests_per_day=0, free_requests_per_minute=0, free_requests_per_day_credited=0, requests_per_minute_max=0)
_CHOICE = choices_of(msgspec.structs.replace(CATALOG, models={"a/b": _MODEL}), Router(Routing()), lambda _: True)["a/b"][0]
SWEEP_S = 1.0


class SimExchange:
    """One request: what it holds at most, and how it will go if nothing happens to its edge."""

    def __init__(self, generation_id: str, key: KeyRecord, nanos: int, cost: int, lasts_s: float, *, fails: bool = False) -> None:
        self.generation_id = generation_id
        self.key = key
        self.nanos = nanos
        self.cost = cost
        self.lasts_s = lasts_s
        self.fails = fails  # before any provider made something
        self.began_s = self.ended_wall_s = 0.0
        self.hold: Hold | None = None

    @property
    def is_streaming(self) -> bool:
        return not self.fails

    def record(self, nanos: int, error: str = "") -> bytes:
        assert self.hold is not None
        return records.encode(
            Generation(
                id=self.generation_id,
                account_id=self.key.account_id,
                key_digest=self.key.digest,
                created_at_ms=int(self.ended_wall_s * 1000),
                model="a/b",
                charged_nanos=nanos,
                settles=self.hold.resources,
                error=error,
            )
        )


class SimEdge:
    """An edge from its start to its death. `act` is how anything happens in it: not while it is stopped, never once it is dead."""

    def __init__(self, world: World, slot: int, number: int) -> None:
        self.incarnation = f"e{slot}n{number}"
        self.slot = slot
        self.alive = True
        self.stopped = False
        self.retiring = False
        self.exchanges: dict[str, SimExchange] = {}
        self.waiting: set[SimExchange] = set()
        self._backlog: deque[Callable[[], None]] = deque()
        self._world = world
        self._chance = random.Random(f"edge {world.seed} {self.incarnation}")
        self._loop = asyncio.get_running_loop()
        self._link: Link | None = None
        self.joined = False
        self._told_control = False
        self.book = Book()
        self.admission = Admission(book=self.book, send=self._send, limits=UNLIMITED, now=self._loop.time, wall=world.machine.wall)
        self.journal = Journal(
            world.machine.journal,
            slot=slot,
            incarnation=self.incarnation,
            fsync="never",  # what survives a process, not a machine
            fsync_s=0.02,
            bytes_max=1 << 20,
            on_appended=self._appended,
            log=world.machine.trace,
        )
        self.journal.open()
        self.running = Running(
            world.machine.journal,
            slot=slot,
            incarnation=self.incarnation,
            settlement=cast("Settlement", self),
            look_after=lambda _: None,
            streams=lambda: cast("list[InferenceExchange]", list(self.exchanges.values())),
            log=world.machine.trace,
        )
        self._loop.call_later(self._chance.random(), self.act, self._sweep)
        self._join()

    def act(self, what: Callable[[], None]) -> None:
        if self.alive and self.stopped:
            self._backlog.append(what)
        elif self.alive:
            what()

    def stop(self) -> None:
        self.stopped = True

    def resume(self) -> None:
        self.stopped = False
        while self._backlog and not self.stopped:
            self.act(self._backlog.popleft())

    def kill(self) -> bytes:
        """kill -9, maybe in the middle of a write; the marks that it leaves."""
        self.alive = False
        fd, self.journal._fd = self.journal._fd, -1
        if self.exchanges and self._chance.random() < 0.5:
            record = self._chance.choice(list(self.exchanges.values())).record(1)
            os.write(fd, record[: self._chance.randrange(1, len(record))])
        os.close(fd)
        if self._link is not None:
            self._link.close_by_edge()
        marks = self._world.machine.journal / records.running_name(self.slot, self.incarnation)
        return marks.read_bytes() if marks.exists() else b""

    def drop_link(self) -> None:
        if self._link is not None and self._link.edge_open:
            self._link.close_by_edge()
            self.lost(self._link)

    # Exchanges.

    def ask(self, exchange: SimExchange) -> None:
        try:
            self.journal.require_room()
        except GatewayError as error:
            self._world.refused(self, exchange, error)
            return
        hold = self.admission.hold_at_once(exchange.key, exchange.nanos, self._loop.time())
        if hold is not None:
            self._serve(exchange, hold)
            return
        self.waiting.add(exchange)
        quote = Quote(exchange.nanos, 1, 1, _CHOICE, 0, is_free=False)
        self.admission.reserve(exchange.key, quote, lambda hold, error: self._admitted(exchange, hold, error))

    def _admitted(self, exchange: SimExchange, hold: Hold | None, error: GatewayError | None) -> None:
        self.waiting.remove(exchange)
        if hold is not None:
            self._serve(exchange, hold)
        else:
            assert error is not None
            self._world.refused(self, exchange, error)

    def _serve(self, exchange: SimExchange, hold: Hold) -> None:
        exchange.hold, exchange.began_s = hold, self._loop.time()
        self.exchanges[exchange.generation_id] = exchange
        self._world.machine.trace.note("held", self.incarnation, exchange.generation_id, exchange.nanos)
        self._loop.call_later(exchange.lasts_s, self.act, lambda: self._finish(exchange))

    def _finish(self, exchange: SimExchange) -> None:
        """As `Settlement` does it: settle, append, tell the caller."""
        hold = exchange.hold
        assert hold is not None
        del self.exchanges[exchange.generation_id]
        if exchange.fails:
            hold.release()
            return
        exchange.ended_wall_s = self._world.machine.wall()
        record = exchange.record(exchange.cost)
        hold.settle(exchange.cost)
        self.journal.append([record], lambda: self._world.served(exchange))

    def mark(self, exchange: InferenceExchange) -> bytes:
        """The part of `Settlement` that `Running` asks for: what the exchange has cost so far."""
        one = cast(SimExchange, exchange)
        one.ended_wall_s = self._world.machine.wall()
        passed = min(1.0, (self._loop.time() - one.began_s) / max(one.lasts_s, 1e-9))
        return one.record(int(one.cost * passed), "edge_lost")

    # The link, as `LinkClient` and `gateway.edge.app` treat it.

    def _join(self) -> None:
        control = self._world.control
        if control.ready:
            number = self._world.next_number()
            chance = random.Random(f"link {self._world.seed} {number}")
            self._link = Link(self, control, chance, slowness=lambda: self._world.slow_links)
            control.opened(self._link)
            self._link.to_control(Hello(version=VERSION, slot=self.slot, incarnation=self.incarnation, pid=1))
        else:
            self._loop.call_later(self._chance.uniform(0.02, 0.5), self.act, self._join)

    def lost(self, link: Link) -> None:
        if self.joined:
            self.joined = False
            self.admission.on_lost()
        self._loop.call_later(self._chance.choice((0.01, 0.02, 0.5)), self.act, self._join)

    def received(self, link: Link, message: ControlMessage) -> None:
        self._world.machine.trace.note("down", self.incarnation, message)
        if isinstance(message, Welcome):
            self.joined = True
            self.admission.on_welcome()
            self._told_control = False
        elif isinstance(message, Grant):
            self.admission.on_grant(message)
        elif isinstance(message, Recall):
            self.admission.on_recall(message.resource)
        elif isinstance(message, Funded):
            self.admission.on_funded(message.resource)
        elif isinstance(message, Committed):
            self.journal.committed(message.file, message.offset)
            self._told_control = False
            if self.journal.pending_bytes:
                self._appended()

    def _send(self, message: Telling) -> None:
        if self.joined and self._link is not None:
            self._link.to_control(message)

    def _appended(self) -> None:
        if not self._told_control and self.joined:
            self._told_control = True
            self._send(Journaled())

    def _sweep(self) -> None:
        self.admission.sweep()
        self.journal.retry()
        self.running.sweep()
        self._loop.call_later(SWEEP_S, self.act, self._sweep)
