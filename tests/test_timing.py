"""A test that is untimely has three chances, the last two alone, and no other failure has more than one."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.conftest import eventually
from tests.timing import TRIES, Company, Untimely, again_if_untimely, in_time


@again_if_untimely
def late(seconds: Iterator[float]) -> None:
    in_time(next(seconds), 0.5, at_least=0.1)


@again_if_untimely
async def late_by_await(seconds: Iterator[float]) -> None:
    in_time(next(seconds), 0.5)


@pytest.mark.parametrize("timely", range(TRIES))
async def test_one_timely_run_of_three_is_enough(timely: int) -> None:
    took = [9.0] * timely + [0.2]
    late(iter(took))
    await late_by_await(iter(took))


async def test_three_untimely_runs_are_a_failure() -> None:
    with pytest.raises(Untimely, match=r"took 9\.000 s, not 0\.100 to 0\.500 s"):
        late(iter([9.0] * TRIES + [0.2]))
    with pytest.raises(Untimely, match=r"took 0\.000 s"):
        late(iter([0.0] * TRIES + [0.2]))
    with pytest.raises(Untimely):
        await late_by_await(iter([9.0] * TRIES + [0.2]))


def test_what_is_not_about_time_fails_at_once() -> None:
    runs = []

    @again_if_untimely
    def wrong() -> None:
        runs.append(1)
        raise AssertionError("wrong")

    with pytest.raises(AssertionError, match="wrong"):
        wrong()
    assert runs == [1]


async def test_who_is_run_again_waits_for_all_others_and_they_wait_for_him(tmp_path: Path) -> None:
    first, second, again = (Company() for _ in range(3))
    for company in (first, second, again):
        company.share(tmp_path)
        company.enter()
    alone = asyncio.create_task(asyncio.to_thread(again.be_alone))
    with (tmp_path / "gate").open() as gate:
        await eventually(lambda: is_locked(gate))
    first.leave()
    entered = asyncio.create_task(asyncio.to_thread(first.enter))
    await asyncio.wait((alone, entered), timeout=0.1)
    assert not alone.done()  # the second is still there
    assert not entered.done()  # not before him
    second.leave()
    await alone
    again.be_alone()  # he is
    assert not entered.done()
    again.leave()
    await entered


def is_locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False
