"""A window's name is used while the window lasts, whichever kind it is, and is over some time after."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.resources import (
    CLOCKS_S,
    LimitReset,
    account_of,
    balance,
    end_s,
    free_day,
    free_minute,
    is_over,
    is_quota,
    is_rate,
    key_limit,
    paid_minute,
)  # fmt: skip

MOMENTS = st.datetimes(datetime.datetime(2020, 1, 1), datetime.datetime(2040, 1, 1), timezones=st.just(datetime.UTC))


@given(moment=MOMENTS, reset=st.sampled_from(["daily", "weekly", "monthly"]))
def test_a_window_is_not_over_while_it_lasts_nor_soon_after(moment: datetime.datetime, reset: LimitReset) -> None:
    now_s = moment.timestamp()
    name = key_limit("abc", reset, now_s)
    assert not is_over(name, now_s) and not is_over(name, now_s + CLOCKS_S - 1)
    assert is_over(name, now_s + 31 * 86_400 + CLOCKS_S)


@pytest.mark.parametrize(("first", "days"), [("2026-11-25", 1), ("2026-11-23", 7), ("2026-11-01", 31), ("2026-06-01", 31)])
def test_a_first_day_lasts_as_long_as_the_longest_window_that_begins_on_it(first: str, days: int) -> None:
    end_s = datetime.datetime.fromisoformat(f"{first}T00:00:00+00:00").timestamp() + days * 86_400 + CLOCKS_S
    assert not is_over(f"key:abc:{first}", end_s - 1) and is_over(f"key:abc:{first}", end_s)


@pytest.mark.parametrize("name", [balance("user_ann"), balance("2020-01-01"), key_limit("abc", None, 0.0)])
def test_what_has_no_window_is_never_over(name: str) -> None:
    assert not is_over(name, 4e9)


@given(moment=MOMENTS)
def test_requests_are_limited_in_windows_that_end_where_the_next_begins(moment: datetime.datetime) -> None:
    now_s = moment.timestamp()
    day, minute = free_day("user_ann", now_s), int(now_s // 60)
    assert is_quota(day) and not is_rate(day) and now_s < end_s(day) <= now_s + 86_400
    assert free_day("user_ann", end_s(day) - 0.001) == day != free_day("user_ann", end_s(day))
    assert not is_over(day, end_s(day) + CLOCKS_S - 1) and is_over(day, end_s(day) + CLOCKS_S)
    for name in (paid_minute("user_ann", minute), free_minute("user_ann", minute)):
        assert is_rate(name) and not is_quota(name) and account_of(name) == account_of(day) == "user_ann"
        assert end_s(name) == (minute + 1) * 60 > now_s
        assert not is_over(name, end_s(name)) and is_over(name, end_s(name) + 60)
