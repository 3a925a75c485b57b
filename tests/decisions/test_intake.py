"""Who begins when a turn of the loop is full: one of each account in the round, and nobody after a long wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from gateway.edge.exchange import InferenceExchange
from gateway.edge.intake import TURN_S, TURNS_MIN, WAIT_S_MAX, Intake


class Turns:
    """A loop that is turned by hand, and a clock that stands still until moved."""

    def __init__(self) -> None:
        self.now = 100.0
        self._soon: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._soon.append(callback)

    def turn(self) -> None:
        soon, self._soon = self._soon, []
        for callback in soon:
            callback()

    @property
    def idle(self) -> bool:
        return not self._soon


class Request:
    """Takes `cost_s` to begin."""

    def __init__(self, turns: Turns, name: str, begun: list[str], cost_s: float = TURN_S * 0.26, breaks: bool = False) -> None:
        self._turns, self._name, self._begun, self._cost_s, self._breaks = turns, name, begun, cost_s, breaks
        self.waited_s = 0.0
        self.abandoned = self.crowded_out = False

    def crowd_out(self) -> None:
        self.crowded_out = True

    def begin_late(self, waited_s: float) -> None:
        self.waited_s = waited_s
        self._turns.now += self._cost_s
        if self._breaks:
            raise RuntimeError(self._name)
        self._begun.append(self._name)

    def abandon(self) -> None:
        self.abandoned = True


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    turns = Turns()
    monkeypatch.setattr("gateway.edge.intake.time.perf_counter", lambda: turns.now)
    return turns


def full(turns: Turns) -> Intake:
    """An intake in a turn that has run out of time."""
    intake = Intake(cast(asyncio.AbstractEventLoop, turns))
    assert intake.has_time(turns.now)
    turns.now += TURN_S
    assert not intake.has_time(turns.now)
    return intake


def waits(intake: Intake, request: Request, account: str, now: float) -> bool:
    return intake.wait(cast(InferenceExchange, cast(Any, request)), account, now)


def test_accounts_take_turns_and_each_keeps_its_order(turns: Turns) -> None:
    intake, begun = full(turns), list[str]()
    for name in ("a1", "a2", "a3", "a4", "a5", "b1", "c1", "b2"):
        assert waits(intake, Request(turns, name, begun), name[0], turns.now)
    assert intake.waiting == 8
    turns.turn()
    assert begun == ["a1", "b1", "c1", "a2"]
    assert not intake.has_time(turns.now)  # who comes now is not before those who wait
    turns.turn()
    assert begun[4:] == ["b2", "a3", "a4", "a5"]
    turns.turn()
    assert intake.waiting == 0 and turns.idle and intake.has_time(turns.now)


def test_a_turn_without_a_flood_lets_everybody_begin(turns: Turns) -> None:
    intake = Intake(cast(asyncio.AbstractEventLoop, turns))
    for _ in range(5):
        assert intake.has_time(turns.now) and intake.has_time(turns.now + TURN_S / 2)
        turns.turn()
        assert turns.idle
        turns.now += 1


def test_whose_requests_wait_too_long_is_refused_and_nobody_else(turns: Turns) -> None:
    intake, begun = full(turns), list[str]()
    cost_s = WAIT_S_MAX / TURNS_MIN * 1.01  # one a turn
    requests = [Request(turns, f"a{number}", begun, cost_s) for number in range(TURNS_MIN + 4)]
    for request in requests:
        assert waits(intake, request, "a", turns.now)
    for _ in range(TURNS_MIN):
        turns.turn()
    assert begun == [f"a{number}" for number in range(TURNS_MIN)]
    assert not waits(intake, Request(turns, "a-late", begun), "a", turns.now)
    assert waits(intake, Request(turns, "b1", begun), "b", turns.now)
    turns.turn()
    assert [request.crowded_out for request in requests] == [False] * TURNS_MIN + [True] * 4
    assert begun[-1] == "b1"


def test_when_the_machine_stood_still_nobody_is_refused(turns: Turns) -> None:
    intake, begun = full(turns), list[str]()
    requests = [Request(turns, f"a{number}", begun) for number in range(8)]
    for request in requests[:-1]:
        assert waits(intake, request, "a", turns.now)
    turns.now += WAIT_S_MAX * 5
    assert waits(intake, requests[-1], "a", turns.now)
    while not turns.idle:
        turns.turn()
    assert begun == [f"a{number}" for number in range(8)]
    assert requests[0].waited_s == pytest.approx(WAIT_S_MAX * 5)


def test_a_flood_makes_no_request_wait_for_longer_than_it_may(turns: Turns) -> None:
    """Ten times what can be served, of one account, for ten times the longest wait."""
    intake, begun, cost_s = full(turns), list[str](), TURN_S * 0.5
    requests: list[Request] = []
    until, came, asked = turns.now + WAIT_S_MAX * 10, turns.now, 0
    while turns.now < until:
        before = turns.now
        while came <= turns.now:
            asked += 1
            if waits(intake, request := Request(turns, "a", begun, cost_s), "a", turns.now):
                requests.append(request)
            came += cost_s / 10
        turns.turn()
        turns.now = max(turns.now, before + cost_s)
    served = [request for request in requests if request.waited_s]
    assert max(request.waited_s for request in served) <= WAIT_S_MAX
    assert len(served) >= 0.95 * WAIT_S_MAX * 10 / cost_s  # nothing is lost by refusing the rest
    assert asked > 9 * len(served)


def test_one_that_breaks_does_not_take_the_others_turn(turns: Turns) -> None:
    intake, begun = full(turns), list[str]()
    broken = Request(turns, "a1", begun, breaks=True)
    waits(intake, broken, "a", turns.now)
    waits(intake, Request(turns, "b1", begun), "b", turns.now)
    with pytest.raises(RuntimeError):
        turns.turn()
    turns.turn()
    assert broken.abandoned and begun == ["b1"]
