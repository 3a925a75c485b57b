"""How the traffic of one model is shared out among endpoints, worked out ahead; and the choice for one request from it.

A Board has the endpoints of a model; a Plan is about those of them that some requests may use (most often: all). A plan is
rebuilt twice a second, and at once after a failure; a request then costs two draws and a comparison.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from heapq import heapify, heapreplace
from typing import Generic, Protocol, TypeVar

from gateway.domain.catalog import Endpoint, Model
from gateway.routing.live import PROBE_GAP_S, PROBE_GAP_S_MAX, Changes, Live
from gateway.routing.scorer import (
    PRICE_FLOOR,
    Estimate,
    Scored,
    Weights,
    estimate,
    quality_of,
    score,
    shares,
    shares_by_price,
)

REFRESH_S = 0.5
PLANS_MAX = 64  # per model: wishes differ, their outcomes seldom do
EXPLORATIONS_SAVED = 20.0  # what a model may spend at once on a newcomer, or on getting to know all at the start
STICKY_COST_TIMES = 2.0  # a cached prompt is worth so much; a sick endpoint costs more
UNRESOLVED_MAX = 2  # calls to an unknown endpoint that wait at a time: it may never answer

Rng = Callable[[], float]  # uniform in [0, 1), such as random.random


class Candidate(Protocol):
    """What is chosen. The edge's Choice is one."""

    @property
    def model(self) -> Model: ...
    @property
    def endpoint(self) -> Endpoint: ...


C = TypeVar("C", bound=Candidate)


def blended(endpoint: Endpoint) -> int:
    """One price for an endpoint: three prompt tokens to a completion token, nanos per million, discount applied."""
    price = endpoint.price
    return (3 * price.prompt + price.completion) * (1_000_000 - price.discount_millionths) // 4_000_000


class Seat(Generic[C]):
    """One endpoint of a board."""

    __slots__ = ("choice", "index", "labels", "live", "price")

    def __init__(self, index: int, choice: C, live: Live) -> None:
        self.index = index
        self.choice = choice
        self.live = live
        self.price = blended(choice.endpoint)
        self.labels: tuple[tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...]] | None = None  # in figures, once it has some


class Board(Generic[C]):
    """The endpoints of one model, and the plans for them."""

    def __init__(self, seats: Sequence[Seat[C]], changes: Changes, *, weights: Weights, exploration_share: float, ramp_s: float) -> None:
        self.seats = tuple(seats)
        self.changes = changes
        self.weights = weights
        self.exploration_share = exploration_share
        self.ramp_s = ramp_s
        self.explorations = EXPLORATIONS_SAVED  # that may be spent
        self.all = Plan(self, self.seats)
        self._plans: dict[int, Plan[C]] = {}
        self._estimates: dict[int, Estimate] = {}
        self._estimated_at = (float("-inf"), -1)

    def inherit(self, before: Board[C]) -> None:
        """Take over from the board of an earlier catalog: what was spent, and who had traffic."""
        self.explorations = before.explorations
        self.all._was_sharing = before.all._was_sharing

    def plan(self, mask: int) -> Plan[C]:
        """The plan for the endpoints whose bits are set, bit 0 for the first."""
        if mask == (1 << len(self.seats)) - 1:
            return self.all
        plan = self._plans.get(mask)
        if plan is None:
            if len(self._plans) >= PLANS_MAX:
                del self._plans[next(iter(self._plans))]
            plan = self._plans[mask] = Plan(self, tuple(seat for seat in self.seats if mask >> seat.index & 1))
        return plan

    def estimate(self, seat: Seat[C], now_s: float) -> Estimate:
        """Read from figures once per change, however many plans ask."""
        if self._estimated_at != (now_s, self.changes.count):
            self._estimates.clear()
            self._estimated_at = (now_s, self.changes.count)
        found = self._estimates.get(seat.index)
        if found is None:
            found = self._estimates[seat.index] = estimate(seat.live.figures(now_s))
            seat.live.expected_s = found.first_s or 0.0
        return found


class Sharer(Generic[C]):
    """A seat that gets a share of traffic, and once it was chosen the order that begins with it."""

    __slots__ = ("live", "order", "seat", "share")

    def __init__(self, seat: Seat[C], share: float, order: tuple[C, ...] | None = None) -> None:
        self.seat = seat
        self.live = seat.live
        self.share = share
        self.order = order


class Plan(Generic[C]):
    """Shares and orders for one set of endpoints."""

    __slots__ = (
        "_board",
        "_built_at_change",
        "_changes",
        "_cumulative",
        "_incumbent",
        "_probe_at_s",
        "_probes",
        "_scored",
        "_sharers",
        "_alone",
        "_aside",
        "_until_s",
        "_was_sharing",
        "built",
        "held_until_s",
        "seats",
    )

    def __init__(self, board: Board[C], seats: tuple[Seat[C], ...]) -> None:
        self._board = board
        self._changes = board.changes
        self.seats = seats
        self._alone = [Sharer(seats[0], 1.0, (seats[0].choice,))] if len(seats) == 1 else []
        self._until_s = float("-inf")
        self._built_at_change = -1
        self._incumbent: int | None = None
        self._sharers: list[Sharer[C]] = []
        self._was_sharing = False  # by merit: then whoever joins is a newcomer
        self._cumulative: list[float] = []
        self._probes: list[tuple[float, int, Seat[C]]] = []  # a heap of those worth trying, by when they are due
        self._probe_at_s = 0.0
        self.built: tuple[Seat[C], ...] = ()  # the best first, those that may be tried alone; another object each time it is built
        self._aside: list[Seat[C]] = []  # the others
        self._scored: dict[int, Scored] = {}
        self.held_until_s = 0.0  # when the first one may be tried again, where none may be now; else 0

    def choose(self, now_s: float, rng: Rng, preferred: Live | None = None) -> tuple[C, ...]:
        """The endpoints to try, in this order. Empty: all are held by their providers until `held_until_s`.

        `preferred` is the one that has the prompt in its cache; it goes first unless it is sick.
        """
        if now_s >= self._until_s or self._built_at_change != self._changes.count:
            self.rebuild(now_s)
        if preferred is not None and (order := self._with_preferred(preferred)) is not None:
            return order
        if self._probes:
            board = self._board
            board.explorations = min(board.explorations + board.exploration_share, EXPLORATIONS_SAVED)
            if now_s >= self._probe_at_s and (order := self._explore(now_s)) is not None:
                return order
        sharers = self._sharers
        if not sharers:
            return ()
        if len(sharers) == 1:
            sharer = sharers[0]
        else:
            sharer = sharers[bisect(self._cumulative, rng())]
            other = sharers[bisect(self._cumulative, rng())]
            # Power of two choices, on calls under way relative to what each should have.
            if other.live.inflight * sharer.share < sharer.live.inflight * other.share:
                sharer = other
        if not sharer.live.pace.take(now_s):
            return self._without_haste(sharer, now_s)
        return sharer.order or self._order_of(sharer)

    def ranked(self, now_s: float) -> tuple[Seat[C], ...]:
        """The seats that may be tried, the best first, then those whose breaker admits a probe; for orders of other kinds.

        Without such ones this is `built`, the very object: whoever keeps what he made of it sees by that whether it still holds.
        """
        if now_s >= self._until_s or self._built_at_change != self._changes.count:
            self.rebuild(now_s)
        probes = [seat for seat in self._aside if seat.live.breaker.admits_probe(now_s)] if self._aside else None
        return (*self.built, *probes) if probes else self.built

    def estimate(self, seat: Seat[C], now_s: float) -> Estimate:
        """What was known of a seat when this was built."""
        scored = self._scored.get(seat.index)
        return scored.estimate if scored is not None else self._board.estimate(seat, now_s)

    def scored(self) -> list[tuple[Seat[C], Scored | None, float]]:
        """Every seat with its score (None: it may not be tried now) and its share, for whoever wants an explanation."""
        shares = self.shares()
        return [(seat, self._scored.get(seat.index), shares.get(seat.index, 0.0)) for seat in self.seats]

    def shares(self) -> dict[int, float]:
        """By index of seat, of those that have a share."""
        return {sharer.seat.index: sharer.share for sharer in self._sharers}

    def leader(self) -> Seat[C] | None:
        """Who gets the largest share."""
        return max(self._sharers, key=lambda sharer: sharer.share).seat if self._sharers else None

    # Rebuilding.

    def rebuild(self, now_s: float, *, explain: bool = False) -> None:
        """Share the traffic out anew from the figures of this moment."""
        board = self._board
        usable = self._usable(now_s)
        if len(self.seats) == 1 and usable and not explain:  # nothing to compare: a request for the only one there is stays cheap
            self._scored, self.built, self._aside = {}, self.seats, []
            self._sharers = self._alone
            self._built_at_change = self._changes.count
            return
        estimates = [board.estimate(seat, now_s) for seat in usable]
        if usable:
            scored = score([seat.price for seat in usable], estimates, board.weights)
            self._scored = {seat.index: each for seat, each in zip(usable, scored, strict=True)}
            self.built = tuple(sorted(usable, key=lambda seat: self._scored[seat.index].cost))
        else:
            self._scored, self.built = {}, ()
        self._aside = [seat for seat in self.seats if seat.index not in self._scored] if len(usable) < len(self.seats) else []
        self._share_out(now_s)
        self._plan_probes()
        self._built_at_change = self._changes.count  # after the estimates, which may change nothing but expectations

    def _usable(self, now_s: float) -> list[Seat[C]]:
        """Closed ones; if there is none (panic), ejected ones too; never one whose provider said when to come back."""
        self._until_s = now_s + REFRESH_S
        self.held_until_s = 0.0
        usable = []
        for seat in self.seats:
            breaker = seat.live.breaker
            if breaker.admits(now_s):
                usable.append(seat)
            elif now_s < (change_s := breaker.next_change_s()) < self._until_s:
                self._until_s = change_s
        if usable:
            return usable
        usable = [seat for seat in self.seats if now_s >= seat.live.breaker.held_until_s]
        if not usable and self.seats:
            self.held_until_s = min(seat.live.breaker.held_until_s for seat in self.seats)
        return usable

    def _share_out(self, now_s: float) -> None:
        ranked = self.built
        sharing = [seat for seat in ranked if self._scored[seat.index].estimate.known]
        if sharing:
            costs = [self._scored[seat.index].cost for seat in sharing]
            incumbent = next((i for i, seat in enumerate(sharing) if seat.index == self._incumbent), None)
            for seat in sharing:
                if not seat.live.introduced:
                    seat.live.introduced = True
                    if self._was_sharing:
                        seat.live.ramp_from_s = now_s
            found = shares(costs, [self._ramp(seat, now_s) for seat in sharing], incumbent)
        else:
            sharing = list(ranked)
            failures = [self._scored[seat.index].estimate.failure for seat in sharing]
            found = shares_by_price([seat.price for seat in sharing], failures) if sharing else []
        orders = [Sharer(seat, share) for seat, share in zip(sharing, found, strict=True) if share]
        self._sharers = orders
        self._was_sharing = bool(orders) and orders[0].seat.live.introduced
        self._cumulative = []
        total = 0.0
        for sharer in orders[:-1]:  # the last one takes what is left, rounding included
            total += sharer.share
            self._cumulative.append(total)
        if (leader := self.leader()) is not None:
            self._incumbent = leader.index

    def _ramp(self, seat: Seat[C], now_s: float) -> float:
        ramp_s = self._board.ramp_s
        return 1.0 if not ramp_s else min(1.0, (now_s - seat.live.ramp_from_s) / ramp_s)

    # Finding out.

    def _plan_probes(self) -> None:
        """Who is worth trying though it has no share: ejected ones, unknown ones, and those whose best case would win."""
        sharing = {sharer.seat.index for sharer in self._sharers}
        best = min((each.cost for each in self._scored.values() if each.estimate.known), default=None)
        cheapest = min((seat.price for seat in self.built), default=0) + PRICE_FLOOR
        found = []
        for seat in self.seats:
            if seat.index in sharing:
                continue
            if seat.index not in self._scored:
                found.append(seat)  # half-open, as soon as its breaker says so
            elif best is not None:
                best_case = quality_of((seat.price + PRICE_FLOOR) / cheapest, 1.0, 1.0, self._board.weights)
                if best_case < best:
                    found.append(seat)
        self._probes = [(self._due_s(seat), seat.index, seat) for seat in found]
        heapify(self._probes)
        self._probe_at_s = self._probes[0][0] if found else float("inf")

    @staticmethod
    def _due_s(seat: Seat[C]) -> float:
        return max(seat.live.probe_at_s, seat.live.breaker.next_change_s())

    def _explore(self, now_s: float) -> tuple[C, ...] | None:
        """An order that begins with an endpoint to find out about, if one is due and there is something left to spend."""
        seat = self._next_due()
        live = seat.live
        order = None
        if not live.breaker.admits(now_s):
            if live.breaker.admits_probe(now_s):
                order = self._beginning_with(seat)
            live.probe_at_s = now_s + PROBE_GAP_S
        elif self._board.explorations >= 1.0 and live.inflight < UNRESOLVED_MAX:
            self._board.explorations -= 1.0
            order = self._beginning_with(seat)
            live.probe_at_s = now_s + live.probe_gap_s
            scored = self._scored.get(seat.index)
            if scored is not None and scored.estimate.known:
                live.probe_gap_s = min(live.probe_gap_s * 2, PROBE_GAP_S_MAX)
        else:
            live.probe_at_s = now_s + 0.1
        self._next_due()
        return order

    def _next_due(self) -> Seat[C]:
        """Who is due first. Without the plan being built anew a time can only move away: another plan may have tried it."""
        probes = self._probes
        while (due_s := self._due_s(probes[0][2])) > probes[0][0]:
            heapreplace(probes, (due_s, *probes[0][1:]))
        self._probe_at_s = probes[0][0]
        return probes[0][2]

    def _beginning_with(self, seat: Seat[C]) -> tuple[C, ...]:
        return (seat.choice, *[other.choice for other in self.built if other is not seat])

    def _with_preferred(self, preferred: Live) -> tuple[C, ...] | None:
        if len(self.built) == 1:
            return (self.built[0].choice,)
        for seat in self.built:
            if seat.live is preferred:
                best = self._scored[self.built[0].index].cost
                return self._beginning_with(seat) if self._scored[seat.index].cost <= STICKY_COST_TIMES * best else None
        return None

    def _without_haste(self, sharer: Sharer[C], now_s: float) -> tuple[C, ...]:
        """The endpoint is at its rate limit: the next best one that is not goes first."""
        for seat in self.built:
            if seat is not sharer.seat and seat.live.pace.take(now_s):
                return self._beginning_with(seat)
        return sharer.order or self._order_of(sharer)

    def _order_of(self, sharer: Sharer[C]) -> tuple[C, ...]:
        """Made when it is asked for: each names all endpoints, so to make all of them takes a thousand endpoints a tenth of a second."""
        sharer.order = order = self._beginning_with(sharer.seat)
        return order
