"""A window's name is used while the window lasts, whichever kind it is, and is over some time after."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.resources import CLOCKS_S, LimitReset, balance, is_over, key_limit

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
