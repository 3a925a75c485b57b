"""How endpoints stand with one edge, as figures for operators: whether their breakers let them be tried, and their part of the traffic."""

from __future__ import annotations

from typing import Any, Literal, get_args

from gateway.routing.plan import Seat
from gateway.routing.router import Router

State = Literal["closed", "held", "ejected"]
STATES: tuple[State, ...] = get_args(State)
Figures = dict[tuple[str, ...], float]


def endpoint_figures(router: Router[Any], now_s: float) -> tuple[Figures, Figures]:
    """Of the endpoints in service that were called since this edge started, by provider, model and state: how many are in it;
    and by provider and model: their part of the model's requests without wishes, 0-1, as last shared out.

    Two of one provider and model differ by their tags only, and are added up.
    """
    states: Figures = {}
    weights: Figures = {}
    for board in router.boards():
        called = [seat for seat in board.seats if seat.live.was_called]
        if not called:
            continue
        if board.all.leader() is None:
            board.all.rebuild(now_s)  # of a catalog that has just come; otherwise requests see to it
        shares = board.all.shares()
        for seat in called:
            plain, by_state = seat.labels or _labels(seat)
            weights[plain] = weights.get(plain, 0.0) + shares.get(seat.index, 0.0)
            is_in = seat.live.breaker.state(now_s)
            for state, labels in by_state:  # all of them, so that a graph has no gaps
                states[labels] = states.get(labels, 0.0) + (state == is_in)
    return states, weights


def _labels(seat: Seat[Any]) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...]]:
    endpoint = seat.choice.endpoint
    plain = endpoint.provider, endpoint.model_id
    seat.labels = plain, tuple((state, (*plain, state)) for state in STATES)
    return seat.labels
