"""Requests a minute as control leases them: in memory only, for a minute is over before a disk would be worth it.

The edges' leases are the record: a control that was replaced learns them from those who are there. What an edge had that
died counts as used until its minute ends, whatever it did with it. A limit is fixed when an edge first asks for its minute,
for most up to 40 s before that begins, and only rises until it ends: with credit that comes, not with credit that is spent.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable

from gateway.control.allowances import UNLIMITED, paid_requests_per_minute
from gateway.control.leases import LeaseDesk
from gateway.control.store import LeaseBook, LeaseRow, Store
from gateway.domain import resources
from gateway.link.messages import Back, Standing, Want
from gateway.settings import Limits


class RateBook:
    """`LeaseBook` of all rates. `clock` tells unix time; an account's balance is the store's to say."""

    def __init__(self, *, store: Store, limits: Limits, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._limits = limits
        self._clock = clock
        self._totals: dict[str, int] = {}
        self._rows: dict[str, dict[str, LeaseRow]] = {}  # resource -> incarnation -> row
        self._swept_minute = 0

    def __repr__(self) -> str:
        return f"<RateBook windows {len(self._rows)}>"

    def __len__(self) -> int:
        return len(self._rows)

    @contextlib.asynccontextmanager
    async def leasing(self) -> AsyncIterator[LeaseBook]:
        """As a store's; there is nothing to roll back, since all is written at once at the end."""
        self._sweep()
        yield self

    async def totals(self, wanted: Iterable[str]) -> dict[str, int]:
        """The limits of these rates. Raises StoreUnavailable."""
        wanted = set(wanted)
        free = {name for name in wanted if name.startswith("free-")}
        accounts = {name: resources.account_of(name) for name in wanted if name not in free}
        balances = await self._store.balances(set(accounts.values())) if accounts else {}
        found = dict.fromkeys(free, self._limits.free_requests_per_minute or UNLIMITED)
        for name, account in accounts.items():
            found[name] = paid_requests_per_minute(self._limits, balances.get(account, 0)) or UNLIMITED
        for name, total in found.items():
            found[name] = self._totals[name] = max(total, self._totals.get(name, 0))
        return found

    async def rows(self, *, resources: Iterable[str], incarnations: Iterable[str]) -> list[LeaseRow]:
        named, whole = set(resources), set(incarnations)
        found = [row for name in named for row in self._rows.get(name, {}).values()]
        if whole:
            others = (rows.values() for name, rows in self._rows.items() if name not in named)
            found += [row for rows in others for row in rows if row.incarnation in whole]
        return [LeaseRow(row.resource, row.incarnation, row.granted_nanos) for row in found]  # copies: a decision may come to nothing

    async def write(self, rows: Iterable[LeaseRow]) -> None:
        now_s = self._clock()
        for row in rows:
            if not resources.is_over(row.resource, now_s):
                self._rows.setdefault(row.resource, {})[row.incarnation] = row

    async def delete(self, incarnation: str) -> None:
        """Nothing: what the dead had is used up."""

    def _sweep(self) -> None:
        """Once a minute: forget what is over."""
        now_s = self._clock()
        minute = int(now_s // resources.MINUTE_S)
        if minute != self._swept_minute:
            self._swept_minute = minute
            self._rows = {name: rows for name, rows in self._rows.items() if not resources.is_over(name, now_s)}
            self._totals = {name: total for name, total in self._totals.items() if not resources.is_over(name, now_s)}


class Desks:
    """Two desks for what edges ask for: what must be durable, and rates, which need not wait for a disk."""

    def __init__(self, durable: LeaseDesk, rates: LeaseDesk) -> None:
        self._durable = durable
        self._rates = rates

    def want(self, incarnation: str, message: Want) -> None:
        self._desk(message.resource).want(incarnation, message)

    def back(self, incarnation: str, message: Back) -> None:
        self._desk(message.resource).back(incarnation, message)

    def standing(self, incarnation: str, message: Standing) -> None:
        rates = {name: granted for name, granted in message.granted.items() if resources.is_rate(name)}
        self._rates.standing(incarnation, Standing(rates))
        self._durable.standing(incarnation, Standing({name: nanos for name, nanos in message.granted.items() if name not in rates}))

    def left(self, incarnation: str) -> None:
        self._durable.left(incarnation)
        self._rates.left(incarnation)

    def _desk(self, resource: str) -> LeaseDesk:
        return self._rates if resources.is_rate(resource) else self._durable
