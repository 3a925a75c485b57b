"""Credit before service: holds the worst case of a request against leases, or says why not.

When the leases at hand suffice this is one synchronous step without I/O. A lease that ran dry is asked for once,
however many wait for it; a lease that runs low is renewed before anybody has to wait. What limits an account's requests
(a rate; for free models also the day's quota) is leased alike, and looked at before its money.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import msgspec

from gateway.domain import resources
from gateway.domain.errors import GatewayError, InsufficientCredit, KeyLimitExceeded, StoreUnavailable
from gateway.domain.keys import KeyRecord
from gateway.edge.limited import rate_limited
from gateway.edge.quotes import Quote
from gateway.edge.rates import Rate, Rates
from gateway.ledger.book import Book, Hold, LeaseShort
from gateway.link.messages import Back, Grant, Journaled, Standing, Want
from gateway.settings import Limits

RENEW_UNDER_HOLDS = 10
WAIT_S = 5.0  # how long control may take over a lease
RATE_WAIT_S = 2.0  # the same for a rate; then nobody is held up by rates until control speaks of one again
REFUSAL_S = 1.0  # how long a refusal stands without asking again, unless control says that there is more
DEMAND_S = 10
AHEAD_HOLDS = 256  # asked for ahead where the demand is not known yet: callers do not notice a control that is being replaced
IDLE_S = 60.0  # a lease unused for so long goes back

Then = Callable[[Hold | None, GatewayError | None], None]
Send = Callable[[Want | Back | Standing | Journaled], None]


class _Waiter:
    __slots__ = ("grows", "has", "key", "quote", "since", "then")

    def __init__(self, key: KeyRecord, quote: Quote, then: Then, since: float, grows: bool) -> None:
        self.has: tuple[str, ...] = ()  # resources of which there was enough for it
        self.key = key
        self.quote = quote
        self.then = then
        self.since = since
        self.grows = grows  # a hold of a request that was counted when it was admitted

    def amount(self, resource: str) -> int:
        """How much of it this request needs: one, or its quote."""
        return 1 if resources.is_rate(resource) or resources.is_quota(resource) else self.quote.nanos


class _Asked(msgspec.Struct, frozen=True):
    at_least: int
    since: float


class _Refused(msgspec.Struct, frozen=True):
    """Control's no: to `asked` nanos and more, and to all that is over what is left. `limit`: of a quota or a rate, the whole of it."""

    until: float
    asked: int
    free_nanos: int
    limit: int

    def covers(self, nanos: int) -> bool:
        # Nothing at all, asked for what is free, may be granted where any amount was refused: balance 0 is not negative.
        return nanos >= self.asked or nanos > self.free_nanos


class Admission:
    """Holds credit for exchanges; speaks of leases with control through `send`. `now` is the loop's clock, `wall` unix time."""

    def __init__(self, *, book: Book, send: Send, limits: Limits, now: Callable[[], float], wall: Callable[[], float] = time.time) -> None:
        self._book = book
        self._leases = book.leases
        self._send = send
        self._limits = limits
        self._now = now
        self._wall = wall
        self._joined = False
        self._silent = False  # control does not answer about rates
        self._waiting: dict[str, deque[_Waiter]] = {}
        self._asked: dict[str, _Asked] = {}  # by resource
        self._refused: dict[str, _Refused] = {}
        self._sated: dict[str, float] = {}  # resource -> until when there is no more to have
        self._spent: dict[str, int] = {}  # held since the last sweep, by resource: the demand
        self._demand: dict[str, int] = {}  # a second
        self._renew_under: dict[str, int] = {}  # half of what a lease should last for
        self._paid = Rates(resources.paid_minute, book=book, now=now, wall=wall) if limits.has_paid_rate else None
        self._free = Rates(resources.free_minute, book=book, now=now, wall=wall) if limits.free_requests_per_minute else None
        self._counts = limits.has_paid_rate or limits.has_free_quota or self._free is not None
        self._counts_free = limits.has_free_quota or self._free is not None

    def hold_at_once(self, key: KeyRecord, nanos: int, now: float) -> Hold | None:
        """The common case: no limit but the balance and the rate, and more at hand than makes one think of the next lease."""
        if key.limit_nanos is not None or (not nanos and self._counts):
            return None
        name = resources.BALANCE + key.account_id
        lease = self._leases.get(name)
        if lease is None:
            return None
        left = lease.granted - lease.spent - lease.held - nanos
        if left < RENEW_UNDER_HOLDS * nanos or left < self._renew_under.get(name, 0):
            return None
        if self._paid is not None:
            rate = self._paid.rates.get(key.account_id)
            if rate is None or rate.until <= now:
                return None
            units = rate.lease
            if units.granted - units.spent <= rate.renew_under:
                return None
            units.spent += 1
        self._spent[name] = self._spent.get(name, 0) + nanos
        lease.used_at = now
        return Hold((name,), (lease,), nanos)

    def reserve(self, key: KeyRecord, quote: Quote, then: Then, *, grows: bool = False) -> None:
        """Calls `then(hold, None)` or `then(None, error)`: at once unless a lease ran dry. `grows`: for a request that was counted."""
        self._try(_Waiter(key, quote, then, self._now(), grows))

    # Told by the link.

    def on_welcome(self) -> None:
        """Control may be a new one: tell it what we were granted, then ask again for whoever waits."""
        self._joined = True
        self._silent = False
        self._send(Standing(granted=self._book.standing()))
        self._asked.clear()
        for resource in list(self._waiting):
            self._wake(resource)

    def on_lost(self) -> None:
        self._joined = False
        self._asked.clear()
        self._let_rates_go()
        for resource in list(self._waiting):
            for waiter in self._waiting.pop(resource):
                waiter.then(None, _unavailable())

    def on_grant(self, grant: Grant) -> None:
        resource = grant.resource
        asked = self._asked.pop(resource, None)
        if resources.is_rate(resource):
            self._silent = grant.unavailable
            if grant.unavailable:
                self._let_rates_go()
                return
        elif grant.unavailable:
            for waiter in self._waiting.pop(resource, ()):
                waiter.then(None, _unavailable())
            return
        if grant.refused:
            at_least = asked.at_least if asked is not None else 0
            self._refused[resource] = _Refused(self._now() + REFUSAL_S, at_least, grant.free_nanos, grant.limit)
        else:
            self._refused.pop(resource, None)
            self._book.granted(resource, grant.nanos, self._now())
            if not grant.nanos:
                self._sated[resource] = self._now() + REFUSAL_S
        self._rate_answered(resource, grant)
        self._wake(resource)

    def on_recall(self, resource: str) -> None:
        """Give back what is unused, but for what requests here need of it as soon as they have the rest.

        Else edges whose requests need two resources would take them from each other until all of them gave up. All requests ask
        in one order, so nobody keeps what somebody waits for who keeps what is waited for here.
        """
        kept = sum(waiter.amount(resource) for waiters in self._waiting.values() for waiter in waiters if resource in waiter.has)
        nanos = self._book.give_back(resource, kept)
        if (asked := self._asked.get(resource)) is not None and asked.at_least:
            self._asked[resource] = _Asked(asked.at_least + nanos, asked.since)  # as control counts it, too
        self._send(Back(resource=resource, nanos=nanos))

    def on_funded(self, resource: str) -> None:
        """There may be more of it. Credit that came also raises what else the account may have."""
        for name in (resource, *self._counted(resource)):
            self._refused.pop(name, None)
            self._sated.pop(name, None)

    def leave(self) -> None:
        """This edge ends in good order: what is left of its rates goes back, which no death would give."""
        for resource in filter(resources.is_rate, self._book.standing()):
            if not resources.is_over(resource, self._wall()) and (unused := self._book.give_back(resource)):
                self._send(Back(resource=resource, nanos=unused))

    def sweep(self) -> None:
        """Once a second: measure demand, let nobody wait for a silent control, and return what lies idle."""
        self._give_up_waiting(self._now() - WAIT_S)
        self._measure()
        self._sated = {resource: until for resource, until in self._sated.items() if until > self._now()}
        self._refused = {resource: refusal for resource, refusal in self._refused.items() if refusal.until > self._now()}
        if self._joined:
            self._sweep_rates()
            wall_s = self._wall()
            for resource in self._book.idle(self._now() - IDLE_S):
                is_over, is_rate = resources.is_over(resource, wall_s), resources.is_rate(resource)
                if is_rate and not is_over:
                    continue  # it may be of the minute to come, and is void soon
                unused = self._book.forget(resource) if is_over else self._book.give_back(resource)
                if unused and not is_rate:
                    self._send(Back(resource=resource, nanos=unused))

    def _measure(self) -> None:
        for resource in self._demand.keys() | self._spent.keys():
            held = self._spent.get(resource, 0)
            # Rises at once, falls slowly: a lease too large comes back when it is recalled, one too small makes callers wait.
            self._demand[resource] = max(held, (self._demand.get(resource, 0) * 4 + held) // 5)
        self._demand = {resource: demand for resource, demand in self._demand.items() if demand}
        self._renew_under = {resource: demand * DEMAND_S // 2 for resource, demand in self._demand.items()}
        self._spent.clear()

    def _give_up_waiting(self, before: float) -> None:
        for resource, waiters in list(self._waiting.items()):
            late = [waiter for waiter in waiters if waiter.since <= before]
            if late:
                self._waiting[resource] = deque(waiter for waiter in waiters if waiter.since > before)
                for waiter in late:
                    waiter.then(None, _unavailable())

    # The step itself.

    def _try(self, waiter: _Waiter) -> None:
        quote, now = waiter.quote, self._now()
        rates = None if waiter.grows else self._free if quote.is_free else self._paid
        rate = rates.current(waiter.key.account_id) if rates is not None else None
        if rate is not None and rate.lease.available < 1:
            if self._joined and not self._silent:
                self._short(waiter, LeaseShort(rate.name, 1))
                return
            rate = None
        try:
            hold = self._hold(waiter, rate, now)
        except LeaseShort as short:
            names = (rate.name, *self._names(waiter.key)) if rate is not None else self._names(waiter.key)
            waiter.has = names[: names.index(short.resource)] if short.resource in names else names
            self._short(waiter, short)
            return
        if rate is not None:
            if not quote.is_free:
                rate.lease.spent += 1
            if rate.lease.available <= rate.renew_under and self._may_ask(rate.name):
                self._ask(rate.name, 0, 0)
        waiter.then(hold, None)

    def _hold(self, waiter: _Waiter, rate: Rate | None, now: float) -> Hold:
        """Credit, and of what is free the quota; leases that run low are asked for. Raises LeaseShort."""
        key, nanos, book = waiter.key, waiter.quote.nanos, self._book
        names = self._names(key)
        available = min(map(book.available, names))
        hold: Hold
        if waiter.quote.is_free and self._counts_free:
            quota = resources.free_day(key.account_id, self._wall()) if self._limits.has_free_quota else None
            hold = book.hold_free(names, quota, rate.lease if rate is not None else None, now)
            if quota is not None and book.available(quota) < RENEW_UNDER_HOLDS and self._may_ask(quota):
                self._ask(quota, 0, 1)
        else:
            hold = book.hold(names, nanos, now)
        low = available - nanos < max(RENEW_UNDER_HOLDS * nanos, self._renew_under.get(names[0], 0))
        for name in names:
            self._spent[name] = self._spent.get(name, 0) + nanos
            if low and self._may_ask(name):
                self._ask(name, 0, nanos)
        return hold

    def _names(self, key: KeyRecord) -> tuple[str, ...]:
        """What is held of: the account's balance, and the key's limit if it has one."""
        balance = resources.balance(key.account_id)
        return (balance,) if key.limit_nanos is None else (balance, resources.key_limit(key.digest, key.limit_reset, self._wall()))

    def _short(self, waiter: _Waiter, short: LeaseShort) -> None:
        refusal = self._refused.get(short.resource)
        if refusal is not None and refusal.until > self._now() and refusal.covers(short.missing_nanos):
            waiter.then(None, self._refusal(waiter, short, refusal))
        elif not self._joined:
            waiter.then(None, _unavailable())
        else:
            self._waiting.setdefault(short.resource, deque()).append(waiter)
            if short.resource not in self._asked:
                self._ask(short.resource, short.missing_nanos, waiter.amount(short.resource))

    def _may_ask(self, resource: str) -> bool:
        """Whether it is of use to ask for more ahead of need."""
        return resource not in self._asked and resource not in self._refused and resource not in self._sated

    def _ask(self, resource: str, at_least: int, amount: int) -> None:
        """For a rate, `amount` is left to what its account asks for."""
        waiting = sum(waiter.amount(resource) for waiter in self._waiting.get(resource, ()))
        if resources.is_rate(resource):
            rate = self._rate(resource)
            ahead = rate.demand if rate is not None else amount
        else:
            ahead = max(self._demand.get(resource, 0) * DEMAND_S, AHEAD_HOLDS * amount)
        self._asked[resource] = _Asked(at_least, self._now())
        self._send(Want(resource=resource, at_least=at_least, demand=ahead + waiting))

    def _wake(self, resource: str) -> None:
        for waiter in self._waiting.pop(resource, ()):
            self._try(waiter)

    # Rates.

    def _rate(self, resource: str) -> Rate | None:
        """The rate of this very minute that is leased under this name."""
        rates = self._free if resource.startswith("free-") else self._paid
        rate = rates.rates.get(resources.account_of(resource)) if rates is not None else None
        return rate if rate is not None and rate.name == resource else None

    def _rate_answered(self, resource: str, grant: Grant) -> None:
        rate = self._rate(resource) if resources.is_rate(resource) else None
        if rate is not None and grant.nanos:
            rate.granted()
        elif rate is not None:
            rate.sated()

    def _sweep_rates(self) -> None:
        oldest = self._now() - RATE_WAIT_S
        if not self._silent and any(resources.is_rate(name) and asked.since <= oldest for name, asked in self._asked.items()):
            self._silent = True
            self._let_rates_go()
        for rates in (self._paid, self._free):
            for name, demand in rates.sweep() if rates is not None else ():
                if self._may_ask(name):
                    self._ask(name, 0, demand)

    def _let_rates_go(self) -> None:
        """Whoever waits for a rate waits no longer: control does not answer."""
        for resource in [name for name in self._waiting if resources.is_rate(name)]:
            self._wake(resource)

    def _counted(self, resource: str) -> tuple[str, ...]:
        """Of a balance: what limits its account's requests now."""
        if not resource.startswith("balance:"):
            return ()
        account_id, wall_s = resources.account_of(resource), self._wall()
        minute = int(wall_s // resources.MINUTE_S)
        return (
            resources.free_day(account_id, wall_s), resources.free_minute(account_id, minute), resources.paid_minute(account_id, minute),
        )  # fmt: skip

    # What a refusal says.

    def _refusal(self, waiter: _Waiter, short: LeaseShort, refusal: _Refused) -> GatewayError:
        quote = waiter.quote
        if resources.is_rate(short.resource) or resources.is_quota(short.resource):
            return rate_limited(short.resource, refusal.limit, self._limits, self._wall())
        left = refusal.free_nanos + self._book.available(short.resource)
        if short.resource.startswith("key:") and left <= 0:
            window = waiter.key.limit_reset or "total"
            return KeyLimitExceeded(f"Key limit exceeded ({window} limit). Manage it using /settings/keys")
        if left <= 0:
            return InsufficientCredit("Insufficient credits. Add more using /credits")
        affordable = quote.dearest.worst.affordable_tokens(prompt_tokens=quote.prompt_tokens, images=quote.images, nanos=left)
        return InsufficientCredit(
            f"This request requires more credits, or fewer max_tokens. You requested up to {quote.completion_tokens} tokens, "
            f"but can only afford {affordable}. To increase, visit /settings/credits and add more credits"
        )


def _unavailable() -> StoreUnavailable:
    return StoreUnavailable("credit cannot be checked now; try again", retry_after_s=1.0)
