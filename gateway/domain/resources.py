"""Names of what is leased: an account's balance, and a key's limit within its window.

A key's window is part of the name, so a new day begins with a new resource and nothing has to be reset. What is leased of
a window that is over can be forgotten: its name is never used again.
"""

from __future__ import annotations

import datetime
from typing import Literal

LimitReset = Literal["daily", "weekly", "monthly"]
CLOCKS_S = 86_400.0  # how long after its end a window may still be meant, by a clock that was set back


def balance(account_id: str) -> str:
    return f"balance:{account_id}"


def key_limit(digest: str, reset: LimitReset | None, now_s: float) -> str:
    """The limit of a key in the window of `now_s` (unix time): `key:<digest>:<first day of the window>`, "" for all time."""
    return f"key:{digest}:{window_start(reset, now_s)}"


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
    end = datetime.datetime.combine(day, datetime.time(), datetime.UTC) + datetime.timedelta(days=days)
    return now_s >= end.timestamp() + CLOCKS_S
