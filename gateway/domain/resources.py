"""Names of what is leased: an account's balance, a key's limit, and how many requests an account may make.

A window is part of the name, so a new day begins with a new resource and nothing has to be reset. What is leased of
a window that is over can be forgotten: its name is never used again. Balances and limits are leased in nanos, requests
in units: of a quota (free requests a day) what is used is booked, of a rate (requests a minute) nothing outlives the minute.
"""

from __future__ import annotations

import datetime
from typing import Literal

LimitReset = Literal["daily", "weekly", "monthly"]
CLOCKS_S = 86_400.0  # how long after its end a window may still be meant, by a clock that was set back
MINUTE_S = 60
_RATE_CLOCKS_S = 60.0  # the same for a minute, of which nothing is lost but its own limit
_FREE_DAY = "free-day:"
_RATES = ("paid-minute:", "free-minute:")
BALANCE = "balance:"


def balance(account_id: str) -> str:
    return BALANCE + account_id


def key_limit(digest: str, reset: LimitReset | None, now_s: float) -> str:
    """The limit of a key in the window of `now_s` (unix time): `key:<digest>:<first day of the window>`, "" for all time."""
    return f"key:{digest}:{window_start(reset, now_s)}"


def free_day(account_id: str, now_s: float) -> str:
    """The account's requests to free models on the UTC day of `now_s`: `free-day:<account>:<day>`."""
    return f"{_FREE_DAY}{account_id}:{window_start('daily', now_s)}"


def paid_minute(account_id: str, minute: int) -> str:
    """The account's requests to models with a price in this minute (unix time / 60): `paid-minute:<account>:<minute>`."""
    return f"paid-minute:{account_id}:{minute}"


def free_minute(account_id: str, minute: int) -> str:
    """The account's requests to free models in this minute: `free-minute:<account>:<minute>`."""
    return f"free-minute:{account_id}:{minute}"


def is_quota(resource: str) -> bool:
    """Whether it is counted in requests, and what is used of it is booked."""
    return resource.startswith(_FREE_DAY)


def is_rate(resource: str) -> bool:
    """Whether it is counted in requests, and forgotten when its minute is over."""
    return resource.startswith(_RATES)


def account_of(resource: str) -> str:
    """Whose balance, quota or rate it is."""
    return resource.split(":", 2)[1]


def end_s(resource: str) -> float:
    """When the window of a quota or a rate ends, in unix time."""
    window = resource.rpartition(":")[2]
    return (int(window) + 1) * MINUTE_S if is_rate(resource) else _midnight(datetime.date.fromisoformat(window)) + 86_400.0


def window_start(reset: LimitReset | None, now_s: float) -> str:
    """The first UTC day of a window as YYYY-MM-DD; weeks begin on Monday. "" when there is no reset."""
    if reset is None:
        return ""
    day = datetime.datetime.fromtimestamp(now_s, datetime.UTC).date()
    if reset == "weekly":
        day -= datetime.timedelta(days=day.weekday())
    elif reset == "monthly":
        day = day.replace(day=1)
    return day.isoformat()


def is_over(resource: str, now_s: float) -> bool:
    """Whether the window in this name has ended for good, whichever kind of window it is. Never for a name without one."""
    if is_rate(resource):
        return now_s >= end_s(resource) + _RATE_CLOCKS_S
    if is_quota(resource):
        return now_s >= end_s(resource) + CLOCKS_S
    first = resource.rpartition(":")[2]
    if not first or not resource.startswith("key:"):
        return False
    day = datetime.date.fromisoformat(first)
    if day.day == 1:
        days = 31
    elif day.weekday() == 0:
        days = 7
    else:
        days = 1
    return now_s >= _midnight(day) + days * 86_400.0 + CLOCKS_S


def _midnight(day: datetime.date) -> float:
    return datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp()
