"""The order of endpoints where callers wish one: sorted, in an order of their own, or by speeds they prefer.

Made from a plan as it was last built, so from figures as fresh as those that share out traffic, and kept until it is built anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Generic, NamedTuple

from gateway.routing.entry import Entry
from gateway.routing.filters import Traits
from gateway.routing.known_wishes import Kept, Wished
from gateway.routing.live import Live
from gateway.routing.plan import C, Plan, Seat
from gateway.routing.scorer import Estimate, Weights, score
from gateway.routing.wishes import SortBy, Wishes, is_slow, is_weak


class _Arranged(NamedTuple, Generic[C]):
    built: tuple[tuple[Seat[C], ...], ...]  # the ranked seats of the plans that this is made from, those very objects
    seats: tuple[Seat[C], ...]
    order: tuple[C, ...]
    good: int  # so many, the first ones, miss no speed that is preferred


class _Missing(NamedTuple, Generic[C]):
    built: tuple[Seat[C], ...]
    choices: frozenset[int]  # ids of the objects that miss a preferred speed


class Arrangements(Generic[C]):
    """Kept by wishes and plan: a plan that was built anew, or lets an ejected endpoint be tried, has other ranked seats."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._arranged: Kept[tuple[object, ...], _Arranged[C]] = Kept()
        self._missing: Kept[tuple[int, int], _Missing[C]] = Kept()

    def __len__(self) -> int:
        return len(self._arranged) + len(self._missing)

    def clear(self) -> None:
        """For a new catalog."""
        self._arranged.clear()
        self._missing.clear()

    def order(
        self, entry: Entry[C], plan: Plan[C], wished: Wished, sort: SortBy | None, preferred: Live | None, now_s: float
    ) -> tuple[C, ...]:
        """As sorted, or in the caller's own order. `preferred` goes first where it misses no speed."""
        ranked = plan.ranked(now_s)
        key = (wished.number, id(plan), sort)
        found = self._arranged.get(key)
        if found is None or found.built[0] is not ranked:
            found = _arranged((ranked,), _sorted(plan, ranked, sort, now_s), wished, entry.traits, now_s)
            if wished.number:
                self._arranged.keep(key, found)
        return found.order if preferred is None else _with_preferred(found, preferred)

    def demoted(self, plan: Plan[C], wished: Wished, order: tuple[C, ...], now_s: float) -> tuple[C, ...]:
        """An order that was just chosen from the plan, but those that miss a preferred speed at its end; none is removed."""
        key = (wished.number, id(plan))
        found = self._missing.get(key)
        if found is None or found.built is not plan.built:
            missing = frozenset(id(seat.choice) for seat in plan.seats if _misses(seat, wished.wishes, now_s))
            found = _Missing(plan.built, missing)
            if wished.number:
                self._missing.keep(key, found)
        missing = found.choices
        if not missing:
            return order
        return (*[each for each in order if id(each) not in missing], *[each for each in order if id(each) in missing])

    def pooled(self, plans: Sequence[Plan[C]], wished: Wished, now_s: float) -> tuple[C, ...]:
        """The endpoints of all models in one order."""
        built = tuple([plan.ranked(now_s) for plan in plans])
        key = (wished.number, *map(id, plans))
        found = self._arranged.get(key)
        if found is None or not all(map(is_, found.built, built)):
            seats = self._sorted_together(plans, built, wished.sort, now_s)
            found = _arranged(built, seats, wished, None, now_s)
            if wished.number:
                self._arranged.keep(key, found)
        return found.order

    def _sorted_together(
        self, plans: Sequence[Plan[C]], built: Sequence[tuple[Seat[C], ...]], sort: SortBy | None, now_s: float
    ) -> list[Seat[C]]:
        seats = list(chain.from_iterable(built))
        estimates = [plan.estimate(seat, now_s) for plan, ranked in zip(plans, built, strict=True) for seat in ranked]
        if not seats:
            return seats
        if sort is not None:
            keys = [_sort_key(sort, seat.price, estimate) for seat, estimate in zip(seats, estimates, strict=True)]
        else:
            keys = [scored.cost for scored in score([seat.price for seat in seats], estimates, self._weights)]
        return [seats[i] for i in sorted(range(len(seats)), key=keys.__getitem__)]


def _arranged(
    built: tuple[tuple[Seat[C], ...], ...], seats: Sequence[Seat[C]], wished: Wished, traits: Sequence[Traits] | None, now_s: float
) -> _Arranged[C]:
    """`traits` of one model, whose endpoints may be in an order of the caller's own."""
    good = len(seats)
    if wished.has_thresholds:
        misses = [_misses(seat, wished.wishes, now_s) for seat in seats]
        good = misses.count(False)
        seats = [seats[i] for i in sorted(range(len(seats)), key=misses.__getitem__)]
    if traits is not None and wished.order:
        seats = _in_wished_order(seats, traits, wished.order)
    return _Arranged(built, tuple(seats), tuple([seat.choice for seat in seats]), good)


def _with_preferred(arranged: _Arranged[C], preferred: Live) -> tuple[C, ...]:
    order = arranged.order
    for i, seat in enumerate(arranged.seats):
        if seat.live is preferred:
            first = 0 if i < arranged.good else arranged.good
            return (*order[:first], order[i], *order[first:i], *order[i + 1 :])
    return order


def _sorted(plan: Plan[C], seats: Sequence[Seat[C]], by: SortBy | None, now_s: float) -> Sequence[Seat[C]]:
    return seats if by is None else sorted(seats, key=lambda seat: _sort_key(by, seat.price, plan.estimate(seat, now_s)))


def _sort_key(by: SortBy, price: int, estimate: Estimate) -> float:
    """Ascending; what nobody knows goes last, in the order in which it came: the best first."""
    unknown = float("inf")
    if by == "price":
        return float(price)
    if by == "latency":
        return unknown if estimate.first_s is None else estimate.first_s
    if by == "throughput":
        return unknown if estimate.token_s is None else estimate.token_s
    return round(estimate.failure, 2)  # exacto: who answers most reliably


def _misses(seat: Seat[C], wishes: Wishes, now_s: float) -> bool:
    first_s, rate = seat.live.percentiles(now_s)
    return is_slow(first_s, wishes.preferred_max_latency) or is_weak(rate, wishes.preferred_min_throughput)


def _in_wished_order(seats: Sequence[Seat[C]], traits: Sequence[Traits], order: Sequence[str]) -> list[Seat[C]]:
    """`order` in folded case."""

    def place(seat: Seat[C]) -> int:
        names = traits[seat.index].names
        return next((i for i, slug in enumerate(order) if slug in names), len(order))

    return sorted(seats, key=place)
