"""A test that is untimely has three chances, and no other failure has more than one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.timing import TRIES, Untimely, again_if_untimely, in_time


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
