"""Credit before service: holds the worst case of a request against leases, or says why not.

When the leases at hand suffice this is one synchronous step without I/O. A lease that ran dry is asked for once,
however many wait for it; a lease that runs low is renewed before anybody has to wait.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from gateway.domain import resources
from gateway.domain.errors import GatewayError, InsufficientCredit, KeyLimitExceeded, StoreUnavailable
from gateway.domain.keys import KeyRecord
from gateway.edge.snapshots import Choice
from gateway.ledger.book import Book, Hold, LeaseShort
from gateway.link.messages import Back, Grant, Journaled, Standing, Want
from gateway.wire.envelope import Envelope

RENEW_UNDER_HOLDS = 10
MESSAGE_TOKENS = 16  # what a chat template may add around each message
WAIT_S = 5.0  # how long control may take over a lease
REFUSAL_S = 1.0  # how long a refusal stands without asking again, unless control says that there is more
DEMAND_S = 10
AHEAD_HOLDS = 256  # asked for ahead where the demand is not known yet: callers do not notice a control that is being replaced
IDLE_S = 60.0  # a lease unused for so long goes back

Then = Callable[[Hold | None, GatewayError | None], None]
Send = Callable[[Want | Back | Standing | Journaled], None]


class Quote(msgspec.Struct, frozen=True):
    """The most that a request can cost, whichever of its endpoints serves it. Amounts in nanos."""

    nanos: int
    completion_tokens: int
    prompt_tokens: int  # one a byte, which no tokenizer exceeds
    dearest: Choice
    images: int


def quote(envelope: Envelope, choices: Sequence[Choice]) -> Quote:
    """What to hold for these choices.

    The prompt is held at a token per byte however large the balance: at an estimate, as many callers at once as a
    balance has holds for could spend four times of it.
    """
    prompt_tokens = envelope.prompt_bytes_max + MESSAGE_TOKENS * (envelope.messages or 1)
    most, dearest, completion = -1, choices[0], 0
    for choice in choices:
        tokens = completion_max(envelope, choice)
        nanos = choice.worst.nanos(prompt_tokens, tokens, envelope.images)
        if nanos > most:
            most, dearest, completion = nanos, choice, tokens
    return Quote(most, completion, prompt_tokens, dearest, envelope.images)


def worst_nanos(envelope: Envelope, choices: Sequence[Choice]) -> int:
    """The quote's amount alone."""
    prompt_tokens = envelope.prompt_bytes_max + MESSAGE_TOKENS * (envelope.messages or 1)
    images, most = envelope.images, 0
    for choice in choices:
        nanos = choice.worst.nanos(prompt_tokens, completion_max(envelope, choice), images)
        if nanos > most:
            most = nanos
    return most


def completion_max(envelope: Envelope, choice: Choice) -> int:
    """The most completion tokens this endpoint may make for this request."""
    asked, ceiling = envelope.max_tokens, choice.completion_tokens_max
    return ceiling if asked is None or asked > ceiling else asked


class _Waiter:
    __slots__ = ("has", "key", "quote", "since", "then")

    def __init__(self, key: KeyRecord, quote: Quote, then: Then, since: float) -> None:
        self.has: tuple[str, ...] = ()  # resources of which there was enough for it
        self.key = key
        self.quote = quote
        self.then = then
        self.since = since


class _Refused(msgspec.Struct, frozen=True):
    """Control's no: to `asked` nanos and more, and to all that is over what is left."""

    until: float
    asked: int
    free_nanos: int

    def covers(self, nanos: int) -> bool:
        # Nothing at all, asked for what is free, may be granted where any amount was refused: balance 0 is not negative.
        return nanos >= self.asked or nanos > self.free_nanos


class Admission:
    """Holds credit for exchanges; speaks of leases with control through `send`."""

    def __init__(self, *, book: Book, send: Send, now: Callable[[], float]) -> None:
        self._book = book
        self._send = send
        self._now = now
        self._joined = False
        self._waiting: dict[str, deque[_Waiter]] = {}
        self._asked: dict[str, int] = {}  # resource -> at least
        self._refused: dict[str, _Refused] = {}
        self._sated: dict[str, float] = {}  # resource -> until when there is no more to have
        self._spent: dict[str, int] = {}  # held since the last sweep, by resource: the demand
        self._demand: dict[str, int] = {}  # a second
        self._renew_under: dict[str, int] = {}  # half of what a lease should last for

    def hold_at_once(self, key: KeyRecord, nanos: int) -> Hold | None:
        """The common case: no limit but the balance, and more of it at hand than makes one think of the next lease."""
        if key.limit_nanos is not None:
            return None
        name = resources.balance(key.account_id)
        lease = self._book.lease(name)
        if lease is None:
            return None
        left = lease.granted - lease.spent - lease.held - nanos
        if left < RENEW_UNDER_HOLDS * nanos or left < self._renew_under.get(name, 0):
            return None
        self._spent[name] = self._spent.get(name, 0) + nanos
        lease.used_at = self._now()
        return Hold((name,), (lease,), nanos)

    def reserve(self, key: KeyRecord, quote: Quote, then: Then) -> None:
        """Calls `then(hold, None)` or `then(None, error)`: at once unless a lease ran dry."""
        self._try(_Waiter(key, quote, then, self._now()))

    # Told by the link.

    def on_welcome(self) -> None:
        """Control may be a new one: tell it what we were granted, then ask again for whoever waits."""
        self._joined = True
        self._send(Standing(granted=self._book.standing()))
        self._asked.clear()
        for resource in list(self._waiting):
            self._wake(resource)

    def on_lost(self) -> None:
        self._joined = False
        self._asked.clear()
        for resource in list(self._waiting):
            for waiter in self._waiting.pop(resource):
                waiter.then(None, _unavailable())

    def on_grant(self, grant: Grant) -> None:
        resource = grant.resource
        asked = self._asked.pop(resource, 0)
        if grant.unavailable:
            for waiter in self._waiting.pop(resource, ()):
                waiter.then(None, _unavailable())
            return
        if grant.refused:
            self._refused[resource] = _Refused(self._now() + REFUSAL_S, asked, grant.free_nanos)
        else:
            self._refused.pop(resource, None)
            self._book.granted(resource, grant.nanos, self._now())
            if not grant.nanos:
                self._sated[resource] = self._now() + REFUSAL_S
        self._wake(resource)

    def on_recall(self, resource: str) -> None:
        """Give back what is unused, but for what requests here need of it as soon as they have the rest.

        Else edges whose requests need two resources would take them from each other until all of them gave up. All requests ask
        in one order, so nobody keeps what somebody waits for who keeps what is waited for here.
        """
        kept = sum(waiter.quote.nanos for waiters in self._waiting.values() for waiter in waiters if resource in waiter.has)
        nanos = self._book.give_back(resource, kept)
        if self._asked.get(resource):
            self._asked[resource] += nanos  # as control counts it, too
        self._send(Back(resource=resource, nanos=nanos))

    def on_funded(self, resource: str) -> None:
        self._refused.pop(resource, None)
        self._sated.pop(resource, None)

    def sweep(self) -> None:
        """Once a second: measure demand, let nobody wait for a silent control, and return what lies idle."""
        self._give_up_waiting(self._now() - WAIT_S)
        for resource in self._demand.keys() | self._spent.keys():
            held = self._spent.get(resource, 0)
            # Rises at once, falls slowly: a lease too large comes back when it is recalled, one too small makes callers wait.
            self._demand[resource] = max(held, (self._demand.get(resource, 0) * 4 + held) // 5)
        self._demand = {resource: demand for resource, demand in self._demand.items() if demand}
        self._renew_under = {resource: demand * DEMAND_S // 2 for resource, demand in self._demand.items()}
        self._spent.clear()
        self._sated = {resource: until for resource, until in self._sated.items() if until > self._now()}
        self._refused = {resource: refusal for resource, refusal in self._refused.items() if refusal.until > self._now()}
        if self._joined:
            wall_s = time.time()
            for resource in self._book.idle(self._now() - IDLE_S):
                is_over = resources.is_over(resource, wall_s)
                unused = self._book.forget(resource) if is_over else self._book.give_back(resource)
                if unused:
                    self._send(Back(resource=resource, nanos=unused))

    def _give_up_waiting(self, before: float) -> None:
        for resource, waiters in list(self._waiting.items()):
            late = [waiter for waiter in waiters if waiter.since <= before]
            if late:
                self._waiting[resource] = deque(waiter for waiter in waiters if waiter.since > before)
                for waiter in late:
                    waiter.then(None, _unavailable())

    # The step itself.

    def _try(self, waiter: _Waiter) -> None:
        key, quote, book = waiter.key, waiter.quote, self._book
        names: tuple[str, ...] = (resources.balance(key.account_id),)
        available = book.available(names[0])
        if key.limit_nanos is not None:
            names = (*names, resources.key_limit(key.digest, key.limit_reset, time.time()))
            available = min(available, book.available(names[1]))
        nanos = quote.nanos
        try:
            hold = book.hold(names, nanos, self._now())
        except LeaseShort as short:
            waiter.has = names[: names.index(short.resource)]
            self._short(waiter, short)
            return
        low = available - nanos < max(RENEW_UNDER_HOLDS * nanos, self._renew_under.get(names[0], 0))
        for name in names:
            self._spent[name] = self._spent.get(name, 0) + nanos
            if low and name not in self._asked and name not in self._refused and name not in self._sated:
                self._ask(name, 0, nanos)
        waiter.then(hold, None)

    def _short(self, waiter: _Waiter, short: LeaseShort) -> None:
        refusal = self._refused.get(short.resource)
        if refusal is not None and refusal.until > self._now() and refusal.covers(short.missing_nanos):
            waiter.then(None, self._refusal(waiter, short, refusal.free_nanos))
        elif not self._joined:
            waiter.then(None, _unavailable())
        else:
            self._waiting.setdefault(short.resource, deque()).append(waiter)
            if short.resource not in self._asked:
                self._ask(short.resource, short.missing_nanos, waiter.quote.nanos)

    def _ask(self, resource: str, at_least: int, hold_nanos: int) -> None:
        self._asked[resource] = at_least
        waiting = sum(waiter.quote.nanos for waiter in self._waiting.get(resource, ()))
        ahead = max(self._demand.get(resource, 0) * DEMAND_S, AHEAD_HOLDS * hold_nanos)
        self._send(Want(resource=resource, at_least=at_least, demand=ahead + waiting))

    def _wake(self, resource: str) -> None:
        for waiter in self._waiting.pop(resource, ()):
            self._try(waiter)

    def _refusal(self, waiter: _Waiter, short: LeaseShort, free_nanos: int) -> GatewayError:
        quote = waiter.quote
        left = free_nanos + self._book.available(short.resource)
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
