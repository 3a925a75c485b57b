"""How often a slot may start its process: pure arithmetic, on a made-up clock."""

from __future__ import annotations

import itertools

import pytest

from gateway.supervisor.slots import STARTS_PER_MIN, Pace


def starts_of(*, runs_s: float, was_ready: bool, until_s: float) -> list[float]:
    """When a process is started whose every run lasts `runs_s`."""
    pace, now_s, starts = Pace(0.0), 0.0, []
    while now_s < until_s:
        starts.append(now_s)
        pace.started(now_s)
        now_s += runs_s
        pace.ended(was_ready=was_ready)
        now_s += pace.wait_s(now_s)
    return starts


@pytest.mark.parametrize("was_ready", [True, False])
@pytest.mark.parametrize("runs_s", [0.0, 0.3, 2.0, 7.0])
def test_no_minute_sees_more_than_ten_starts(runs_s: float, was_ready: bool) -> None:
    starts = starts_of(runs_s=runs_s, was_ready=was_ready, until_s=600.0)
    for first in starts:
        assert sum(first <= start < first + 60 for start in starts) <= STARTS_PER_MIN


def test_the_first_death_is_replaced_at_once() -> None:
    for was_ready in (True, False):
        assert starts_of(runs_s=1.0, was_ready=was_ready, until_s=1.5)[:2] == [0.0, 1.0]


def test_a_process_that_never_gets_ready_waits_longer_each_time() -> None:
    starts = starts_of(runs_s=0.1, was_ready=False, until_s=200.0)
    waits = [round(later - earlier - 0.1, 6) for earlier, later in itertools.pairwise(starts)]
    assert waits == sorted(waits)
    assert waits[-1] == 30.0


def test_a_healthy_minute_earns_the_whole_burst_back() -> None:
    pace = Pace(0.0)
    for _ in range(5):
        pace.started(0.0)
        pace.ended(was_ready=True)
    assert pace.wait_s(0.0) > 0
    pace.wait_s(60.0)
    for _ in range(5):
        assert pace.wait_s(60.0) <= 0
        pace.started(60.0)
