"""Requests a minute: this edge's part of each account's rate, taken a unit a request in the step that holds the credit.

A window is a minute of the wall clock. Who asks in one minute is given the next one's lease before it begins, at a moment
that is the account's own, so that a thousand busy accounts do not all ask at its first second. A rate protects, and is
not money: while control does not answer nobody is refused by it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

from gateway.domain.resources import MINUTE_S
from gateway.ledger.book import Book, Lease

RENEW_UNDER = 8  # requests, or half of what was granted last
DEMAND_S = 10
DEMAND_MIN = 32
AHEAD_FROM_S = 20  # into a minute the next one is asked for,
AHEAD_OVER_S = 25  # over so many seconds


class Rate:
    """One account's requests in one minute, as this edge may serve them."""

    __slots__ = ("asked_ahead", "before", "lease", "name", "per_s", "renew_under", "until")

    def __init__(self, name: str, lease: Lease, until: float, per_s: int) -> None:
        self.name = name
        self.lease = lease
        self.until = until  # by the loop's clock
        self.per_s = per_s
        self.renew_under = max(RENEW_UNDER, per_s * DEMAND_S // 2)
        self.before = 0
        self.asked_ahead = False

    def __repr__(self) -> str:
        return f"<Rate {self.name} {self.lease.available} left>"

    @property
    def demand(self) -> int:
        """Requests to ask for ahead of need."""
        return max(DEMAND_MIN, self.per_s * DEMAND_S)

    def granted(self) -> None:
        """Control has answered: renew when half of what there is now is used, or what a few seconds need is left."""
        self.renew_under = min(self.lease.available // 2, max(RENEW_UNDER, self.per_s * DEMAND_S // 2))

    def sated(self) -> None:
        """There is no more to have: what is left is used up without asking."""
        self.renew_under = 0

    def measure(self) -> None:
        """Once a second."""
        used = self.lease.spent + self.lease.held
        self.per_s = max(used - self.before, (self.per_s * 4 + used - self.before) // 5)
        self.before = used


class Rates:
    """The rates of one kind. `named(account, minute)` names them; `wall` tells unix time, `now` the loop's."""

    def __init__(self, named: Callable[[str, int], str], *, book: Book, now: Callable[[], float], wall: Callable[[], float]) -> None:
        self._named = named
        self._book = book
        self._now = now
        self._wall = wall
        self.rates: dict[str, Rate] = {}  # by account: of this minute or of an earlier one

    def __len__(self) -> int:
        return len(self.rates)

    def current(self, account_id: str) -> Rate:
        """The account's rate in this minute."""
        rate = self.rates.get(account_id)
        now = self._now()
        if rate is None or rate.until <= now:
            wall_s = self._wall()
            minute = int(wall_s // MINUTE_S)
            name = self._named(account_id, minute)
            until = now + (minute + 1) * MINUTE_S - wall_s
            before = rate
            rate = self.rates[account_id] = Rate(name, self._book.open(name, now), until, before.per_s if before is not None else 0)
            if rate.lease.granted:
                rate.granted()
        return rate

    def sweep(self) -> Iterator[tuple[str, int]]:
        """Once a second: measures, forgets whom nobody asked for, and tells which of the next minute's to ask for, and how many."""
        now, wall_s = self._now(), self._wall()
        second, following = wall_s % MINUTE_S, int(wall_s // MINUTE_S) + 1
        for account_id, rate in list(self.rates.items()):
            if rate.until <= now:
                if rate.until + MINUTE_S <= now:
                    del self.rates[account_id]
                continue
            rate.measure()
            if not rate.asked_ahead and second >= AHEAD_FROM_S + zlib.crc32(account_id.encode()) % AHEAD_OVER_S and rate.before:
                rate.asked_ahead = True
                yield self._named(account_id, following), rate.demand
