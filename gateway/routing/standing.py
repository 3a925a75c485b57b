"""How endpoints stand with one edge, as figures for operators: whether their breakers let them be tried, and their part of the traffic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import msgspec

from gateway.routing.router import Router

State = Literal["closed", "held", "ejected"]
STATES: tuple[State, ...] = get_args(State)


class Standing(msgspec.Struct, frozen=True):
    """One endpoint that was called since this edge started."""

    provider: str  # slug
    model: str
    state: State
    share: float  # of the model's requests without wishes, as last shared out


def standings(router: Router[Any], now_s: float) -> Iterator[Standing]:
    """Of the endpoints in service."""
    for board in router.boards():
        if not any(seat.live.was_called for seat in board.seats):
            continue
        if board.all.leader() is None:
            board.all.rebuild(now_s)  # of a catalog that has just come; otherwise requests see to it
        for seat, _, share in board.all.scored():
            if seat.live.was_called:
                endpoint = seat.choice.endpoint
                yield Standing(endpoint.provider, endpoint.model_id, seat.live.breaker.state(now_s), share)


def endpoint_states(router: Router[Any], now_s: float) -> dict[tuple[str, ...], float]:
    """By provider, model and state: how many endpoints are in it. Two of one provider and model differ by their tags only."""
    found: dict[tuple[str, ...], float] = {}
    for each in standings(router, now_s):
        for state in STATES:  # all of them, so that a graph has no gaps
            labels = (each.provider, each.model, state)
            found[labels] = found.get(labels, 0.0) + (each.state == state)
    return found


def endpoint_weights(router: Router[Any], now_s: float) -> dict[tuple[str, ...], float]:
    """By provider and model: the part of the model's traffic, 0-1."""
    found: dict[tuple[str, ...], float] = {}
    for each in standings(router, now_s):
        labels = (each.provider, each.model)
        found[labels] = found.get(labels, 0.0) + each.share
    return found
