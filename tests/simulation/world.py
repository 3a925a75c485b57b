"""One seed: what happens when, what may go wrong, and the end when everything has to come out even.

Which faults a seed has, and how often, is its own choice (a seed with all of them at once finds less). A step is one
action and some virtual time; the promises are checked after each.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import itertools
import random
from collections.abc import Callable

from gateway.control.store import Account, CreditChange, Key
from gateway.domain import resources
from gateway.domain.errors import GatewayError, StoreUnavailable
from gateway.domain.generation import decode
from gateway.domain.keys import KeyRecord
from gateway.domain.resources import LimitReset
from gateway.edge.admission import REFUSAL_S, WAIT_S
from gateway.wire import records
from tests.simulation.control import SimControl
from tests.simulation.edge import SimEdge, SimExchange
from tests.simulation.machine import Failed, Machine
from tests.simulation.promises import Promises, holders

CREDIT = 1_000_000
STEPS = 60
EDGES_MAX = 4
DRAIN_S = 12.0
DAY_S = 86_400
ACCOUNTS = ("user_ann", "user_bob")
# Some seconds before the end of a day, of a day that ends a week, a month.
STARTS = tuple(
    datetime.datetime(2026, month, day, 23, 59, 56, tzinfo=datetime.UTC).timestamp() for month, day in ((1, 14), (1, 18), (1, 31), (2, 28))
)
FAULTS: dict[str, float] = {
    "kill_edge": 0.05,
    "kill_control": 0.03,
    "kill_all": 0.01,
    "stop_edge": 0.04,
    "drop_link": 0.06,
    "store_away": 0.03,
    "retire_edge": 0.02,
    "long_idle": 0.005,
}
CREDITS: dict[str, float] = {"buy": 0.05, "refund": 0.02, "expire": 0.02}


class World:
    """The supervisor, the callers and the operator."""

    def __init__(self, seed: int, machine: Machine, chance: random.Random) -> None:
        self.seed = seed
        self.machine = machine
        self.slow_links = chance.choice((0.0, 0.0, 0.1, 0.4))
        self.refusals = self.kills = 0
        self._chance = chance
        self._loop = machine.loop
        self._numbers = itertools.count(1)
        self._slots: list[SimEdge] = []
        self._to_reap: list[str] = []
        self._owed: dict[str, CreditChange] = {}  # changes of credit that nobody has confirmed
        self._confirmed: set[str] = set()
        self._quiet = False  # the end has begun: no more requests, no more faults
        faults = {name: weight for name, weight in FAULTS.items() if chance.random() < 0.6}
        self._actions = {"ask": 0.5, "ask_much": 0.06, "burst": 0.05, **faults, **CREDITS}
        self._keys: list[KeyRecord] = []

    def next_number(self) -> int:
        return next(self._numbers)

    async def run(self, steps: int) -> None:
        await self._open_shop()
        limits = {key.digest: key.limit_nanos for key in self._keys if key.limit_nanos is not None}
        with contextlib.closing(Promises(self.machine.database, limits)) as promises:
            self.promises = promises
            self._restart_control()
            for slot in range(self._chance.randint(1, EDGES_MAX)):
                self._slots.append(SimEdge(self, slot, self.next_number()))
            self._loop.call_later(0.1, self._supervise)
            for _ in range(steps):
                name = self._chance.choices(list(self._actions), list(self._actions.values()))[0]
                self.machine.trace.note("step", name)
                getattr(self, f"_{name}")()
                await self._pass(self._chance.choice((0.0, 0.001, 0.02, self._chance.expovariate(10.0), self._chance.expovariate(2.0))))
            await self._drain()
            await self._spend_to_the_last_nano()
            await self._close_shop()

    def end(self) -> None:
        """Of whatever is left."""
        for edge in self._slots:
            if edge.alive:
                edge.kill()
        self.control.kill()
        for task in (tasks := asyncio.all_tasks(self._loop)):
            task.cancel()
        self._loop.run_until_complete(asyncio.wait(tasks)) if tasks else None

    # Told by edges.

    def served(self, exchange: SimExchange) -> None:
        self.machine.trace.note("served", exchange.generation_id, exchange.cost)
        self.promises.expect(exchange, exchange.cost)

    def refused(self, edge: SimEdge, exchange: SimExchange, error: GatewayError) -> None:
        self.machine.trace.note("refused", edge.incarnation, exchange.generation_id, error.code)
        self.refusals += 1

    # Callers.

    def _ask(self) -> None:
        edge = self._chance.choice(self._slots)
        nanos = self._chance.choice((0, 1, self._chance.randint(1, CREDIT // 100), self._chance.randint(1, CREDIT // 10)))
        cost = self._chance.choice((0, nanos, self._chance.randint(0, nanos)))
        lasts_s = self._chance.choice((0.0, 0.0, self._chance.uniform(0.0, 0.3), self._chance.uniform(0.0, 4.0)))
        self._begin(edge, self._chance.choice(self._keys), nanos, cost, lasts_s, fails=self._chance.random() < 0.1)

    def _ask_much(self) -> None:
        nanos = self._chance.randint(CREDIT // 10, CREDIT)
        self._begin(self._chance.choice(self._slots), self._chance.choice(self._keys), nanos, self._chance.randint(0, nanos), 0.1)

    def _burst(self) -> None:
        key, nanos = self._chance.choice(self._keys), self._chance.randint(1, CREDIT // 5)
        for edge in self._slots * 2:
            self._begin(edge, key, nanos, nanos, self._chance.uniform(0.0, 1.0))

    def _begin(self, edge: SimEdge, key: KeyRecord, nanos: int, cost: int, lasts_s: float, *, fails: bool = False) -> SimExchange:
        exchange = SimExchange(f"gen-1770000000-{self.next_number():020}", key, nanos, cost, lasts_s, fails=fails)
        if not edge.retiring:
            edge.act(lambda: edge.ask(exchange))
        return exchange

    # The operator: each change of credit is repeated until it is confirmed, as a payment processor does it.

    def _buy(self) -> None:
        self._owe("topup", self._chance.randint(1, CREDIT // 2))

    def _refund(self) -> None:
        self._owe("refund", -self._chance.randint(1, CREDIT // 10))

    def _owe(self, kind: str, nanos: int) -> None:
        reference = f"{kind}:{self.next_number()}"
        account = self._chance.choice(ACCOUNTS)
        self._owed[reference] = CreditChange(account_id=account, kind=kind, nanos=nanos, reference=reference)  # type: ignore[arg-type]
        self._settle_debts()

    def _settle_debts(self) -> None:
        for change in self._owed.values():
            if self.control.ready:
                self.control.begin(self._change(self.control, change))

    async def _change(self, control: SimControl, change: CreditChange) -> None:
        try:
            await control.change_credit(change)
        except StoreUnavailable:
            return
        self._owed.pop(change.reference, None)
        self._confirmed.add(change.reference)

    def _expire(self) -> None:
        async def look(control: SimControl) -> None:
            with contextlib.suppress(StoreUnavailable):
                await control.expiry.look()

        if self.control.ready:
            self.control.begin(look(self.control))

    # Faults.

    def _kill_edge(self) -> None:
        self._kill(self._chance.choice(self._slots))

    def _kill(self, edge: SimEdge) -> None:
        """Of what died with it, control finds the marks; they count from now on."""
        if not edge.alive:
            return
        self.kills += 1
        marks = edge.kill()
        self.machine.trace.note("killed", edge.incarnation, len(marks))
        for record in records.split(marks, len(marks) + 1).records:
            mark = decode(record)
            exchange = edge.exchanges.get(mark.id)
            if exchange is not None:
                self.promises.expect(exchange, mark.charged_nanos)
        self._bury(edge)

    def _bury(self, edge: SimEdge) -> None:
        self._to_reap.append(edge.incarnation)
        self._loop.call_later(self._chance.uniform(0.05, 1.0), self._replace, edge)

    def _replace(self, edge: SimEdge) -> None:
        self._slots[self._slots.index(edge)] = SimEdge(self, edge.slot, self.next_number())

    def _kill_control(self) -> None:
        if self.control.alive:
            self.kills += 1
            self.machine.trace.note("killed", self.control.name)
            self.control.kill()
            self._loop.call_later(self._chance.choice((0.1, 0.5, 3.0)), self._restart_control)

    def _kill_all(self) -> None:
        for edge in list(self._slots):
            self._kill(edge)
        self._kill_control()

    def _stop_edge(self) -> None:
        """A long stop, of which control hears nothing; now and then the supervisor has enough of it."""
        edge = self._chance.choice(self._slots)
        edge.stop()
        if self._chance.random() < 0.2:
            self._loop.call_later(5.0, lambda: self._kill(edge) if edge.stopped else None)
        else:
            self._loop.call_later(self._chance.choice((0.1, 1.0, 4.0, 8.0)), edge.resume)

    def _drop_link(self) -> None:
        edge = self._chance.choice(self._slots)
        if self._chance.random() < 0.5:
            edge.act(edge.drop_link)
        elif self.control.ready:
            self.control.drop(edge.incarnation)

    def _store_away(self) -> None:
        disk = self.control.disk
        disk.away = True
        self._loop.call_later(self._chance.choice((0.1, 0.5, 2.0)), setattr, disk, "away", False)

    def _retire_edge(self) -> None:
        self._chance.choice(self._slots).retiring = True

    def _long_idle(self) -> None:
        """The clock goes on by days, so that windows are over for good and leases of them forgotten."""
        self.machine.wall_offset_s += 2 * DAY_S

    # The supervisor.

    def _supervise(self) -> None:
        if self.control.ready:
            while self._to_reap:
                self.control.bookkeeper.reaped(self._to_reap.pop())
            self._settle_debts()
        for edge in list(self._slots):
            if edge.retiring and edge.alive and not edge.stopped and not edge.exchanges and not edge.waiting:
                edge.kill()  # it has nothing left to lose
                self._bury(edge)
        self._loop.call_later(0.3, self._supervise)

    def _restart_control(self) -> None:
        self.control = SimControl(self.machine, self.next_number())
        self.control.begin(self._try_to_start(self.control))

    async def _try_to_start(self, control: SimControl) -> None:
        try:
            await control.start()
        except StoreUnavailable:
            self._loop.call_later(0.5, self._restart_control)
            control.kill()  # its process ends with that

    async def _pass(self, seconds: float) -> None:
        until = self._loop.time() + seconds
        while True:
            await asyncio.sleep(max(0.0, min(0.25, until - self._loop.time())))
            self._check()
            if self._loop.time() >= until:
                return

    def _check(self) -> None:
        self.control.require_whole()
        self.promises.check(edge for edge in self._slots if edge.alive)
        if self.machine.trace.broken:
            raise Failed(self.machine.trace.broken)

    # Beginning and end.

    async def _open_shop(self) -> None:
        """Accounts with credit from long ago and from today; keys with and without limits."""
        machine = self.machine
        self.control = control = SimControl(machine, self.next_number())
        await control.begin(control.start())
        machine.wall_offset_s -= 400 * DAY_S
        for account in ACCOUNTS:
            await control.store.create_account(
                Account(id=account, email=account, created_at_ms=1), self._make_keys(account), topup_nanos=CREDIT // 2
            )
        machine.wall_offset_s += 400 * DAY_S
        for account in ACCOUNTS:
            await control.store.change_credit(
                CreditChange(account_id=account, kind="grant", nanos=CREDIT // 2, reference=f"first:{account}:2")
            )
        control.kill()

    def _make_keys(self, account: str) -> list[Key]:
        limits: list[tuple[LimitReset | None, int | None]] = [
            (None, None), (None, CREDIT // 3), ("daily", CREDIT // 4), ("weekly", CREDIT // 4), ("monthly", CREDIT // 3)
        ]  # fmt: skip
        keys = [
            Key(
                digest=f"{account[5:]}{reset}{limit}", account_id=account, name="", label="", created_at_ms=1,
                limit_nanos=limit, limit_reset=reset,
            )
            for reset, limit in limits
        ]  # fmt: skip
        self._keys += [key.record() for key in keys]
        return keys

    async def _drain(self) -> None:
        """No more faults: within seconds every request is answered, every exchange charged, and nothing is held."""
        self.machine.trace.note("drain")
        self.slow_links = 0.0
        self.machine.heal()
        for edge in self._slots:
            edge.resume()
        await self._within(DRAIN_S, self._undrained)

    async def _within(self, seconds: float, wrong: Callable[[], str]) -> None:
        """Until nothing is wrong any more. Raises Failed with what still is after so long."""
        until = self._loop.time() + seconds
        while what := wrong():
            if self._loop.time() >= until:
                raise Failed(what)
            await self._pass(0.5)

    def _undrained(self) -> str:
        self.machine.heal()  # a fault may have been on its way
        if not self.control.ready or self._to_reap or not all(edge.alive and edge.joined and not edge.retiring for edge in self._slots):
            states = [f"{edge.incarnation} alive {edge.alive} joined {edge.joined} stopped {edge.stopped}" for edge in self._slots]
            return f"processes that did not come back: control {self.control.ready}, {self._to_reap} to be reaped, {states}"
        if self._owed:
            return f"changes of credit that never happened: {sorted(self._owed)}"
        if missing := {reference for reference in self._confirmed if reference.startswith("topup")} - self.promises.references():
            return f"purchases that were confirmed and forgotten: {sorted(missing)}"
        for edge in self._slots:
            if edge.waiting:
                return f"{edge.incarnation} has {len(edge.waiting)} requests that nobody answered"
            for resource in edge.book.standing():
                lease = edge.book.leases.get(resource)
                assert lease is not None
                if lease.holds or lease.held:
                    return f"{edge.incarnation} still holds {lease.held} of {resource}"
        uncharged: str = self.promises.uncharged()
        return uncharged

    async def _spend_to_the_last_nano(self) -> None:
        """All that is left can be had by any one edge: nothing is stuck in a lease."""
        await self._pass(REFUSAL_S)  # what was refused just now would be again
        for account, balance in self.promises.balances().items():
            if self.promises.has_debt(account):
                continue
            await self._must(account, balance, granted=True)
            await self._must(account, balance + 1, granted=False)
            key = self._chance.choice([each for each in self._keys if each.account_id == account and each.limit_nanos is not None])
            first_day = resources.window_start(key.limit_reset, self.machine.wall())
            left = (key.limit_nanos or 0) - self.promises.used_of_key(key.digest, first_day)
            if 0 < left <= balance:
                await self._must(account, left, granted=True, key=key)

    async def _must(self, account: str, nanos: int, *, granted: bool, key: KeyRecord | None = None) -> None:
        edge = self._chance.choice(self._slots)
        key = key or next(each for each in self._keys if each.account_id == account and each.limit_nanos is None)
        refusals = self.refusals
        exchange = self._begin(edge, key, nanos, 0, 0.0, fails=True)
        await self._within(WAIT_S + 1, lambda: "" if exchange.hold or self.refusals > refusals else "a request that nobody answered")
        if (exchange.hold is not None) != granted:
            raise Failed(f"{edge.incarnation} {'did not get' if granted else 'got'} {nanos} of {key.digest}")
        await self._pass(REFUSAL_S)

    async def _close_shop(self) -> None:
        for edge in self._slots:
            edge.kill()
            self._to_reap.append(edge.incarnation)
        await self._within(DRAIN_S, self._unburied)
        report = await self.control.store.verify_ledger()
        if not report.ok:
            raise Failed(f"ledger verify: {report.problems}")
        if uneven := self.promises.uneven():
            raise Failed(uneven)
        for account, balance in sorted(self.promises.balances().items()):
            self.machine.trace.note("balance", account, balance)

    def _unburied(self) -> str:
        if left := holders(self.promises.leases()):
            return f"leases of dead edges stay: {sorted(left)}"
        if files := [path.name for path in self.machine.journal.iterdir() if path.name != "corrupt"]:
            return f"files of dead edges stay: {sorted(files)}"
        return ""
