"""`GET /key` (and its old name `/auth/key`): what the calling key is, what it may spend, and what it spent.

Windows are of UTC: days from midnight, weeks from Monday, months from the first.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web

from gateway.control.allowances import free_requests_per_day, paid_requests_per_minute
from gateway.control.api.http import answer, iso_time
from gateway.control.api.route import Call, Nothing, Route
from gateway.control.api.workspace import workspace_of
from gateway.control.store import Credits, Key, KeyUsage, Store
from gateway.domain.money import usd_number
from gateway.domain.resources import LimitReset, window_start
from gateway.settings import Limits

Row = dict[str, Any]

RATE_NOTE = "Of the account, over all its keys; free models are limited apart."


class KeyApi:
    """Handler over the calling key and the store's sums for it. `now` is unix time."""

    def __init__(self, *, store: Store, limits: Limits, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._limits = limits
        self._now = now

    def routes(self) -> list[Route]:
        return [
            Route(method="GET", path=path, access="key", handler=self.get_current_key, summary=summary)
            for path, summary in (("/key", "What the calling key is, may spend and has spent"), ("/auth/key", "The old name of /key"))
        ]

    async def get_current_key(self, call: Call[Nothing, Nothing]) -> web.Response:
        key = call.caller.key
        assert key is not None
        now_s = self._now()
        usage = await self._store.key_usage(key.digest, now_s)
        credits = await self._store.credits(key.account_id)
        free_requests = await self._store.free_requests(key.account_id, now_s)
        quota = free_quota(credits, self._limits, free_requests)
        return answer({"data": key_row(key, usage, credits, quota, rate_limit(credits, self._limits), now_s)})


def key_row(key: Key, usage: KeyUsage, credits: Credits, quota: Row, rate: Row, now_s: float) -> Row:
    """Every key of the contract."""
    budget = _limit_budget(key, usage, now_s)
    return {
        "label": key.label,
        "limit": budget["limit_usd"] if budget else None,
        "limit_remaining": max(0.0, budget["remaining_usd"]) if budget else None,
        "limit_reset": key.limit_reset,
        "include_byok_in_limit": key.include_byok_in_limit,
        "usage": usd_number(usage.total_nanos),
        "usage_daily": usd_number(usage.daily_nanos),
        "usage_weekly": usd_number(usage.weekly_nanos),
        "usage_monthly": usd_number(usage.monthly_nanos),
        "byok_usage": 0,
        "byok_usage_daily": 0,
        "byok_usage_weekly": 0,
        "byok_usage_monthly": 0,
        "is_free_tier": credits.purchased_nanos <= 0,
        "is_management_key": key.management,
        "is_provisioning_key": key.management,
        "creator_user_id": key.account_id,
        "organization_id": None,
        "workspace_id": workspace_of(key.account_id),
        "rate_limit": rate,
        "expires_at": iso_time(key.expires_at_s * 1000) if key.expires_at_s is not None else None,
        "allowed_data_regions": ["global"],
        "free_model_daily_requests": quota,
        "budgets": [budget] if budget else [],
        "effective_budget": budget,
    }


def free_quota(credits: Credits, limits: Limits, used: int) -> Row:
    """The account's requests to free models of this UTC day: larger once it bought enough credit. -1: without limit."""
    limit = free_requests_per_day(limits, credits.purchased_nanos)
    return {"limit": limit or -1, "used": used, "remaining": max(0, limit - used) if limit else -1}


def rate_limit(credits: Credits, limits: Limits) -> Row:
    """The account's requests to models with a price, by its balance of now. Source: contract 3.5, where -1 is no limit."""
    requests = paid_requests_per_minute(limits, credits.total_nanos - credits.used_nanos) or -1
    return {"requests": requests, "interval": "1m", "note": RATE_NOTE}


def _limit_budget(key: Key, usage: KeyUsage, now_s: float) -> Row | None:
    """The key's own limit in its window of now; None without one."""
    if key.limit_nanos is None:
        return None
    spent_nanos = spent_in_window(usage, key.limit_reset)
    return {
        "scope": "key_limit",
        "limit_usd": usd_number(key.limit_nanos),
        "spend_usd": usd_number(spent_nanos),
        "remaining_usd": usd_number(key.limit_nanos - spent_nanos),
        "reset_interval": key.limit_reset,
        "resets_at": resets_at(key.limit_reset, now_s),
        "include_byok": key.include_byok_in_limit,
        "budget_id": None,
        "guardrail_id": None,
    }


def spent_in_window(usage: KeyUsage, reset: LimitReset | None) -> int:
    """Nanos that count against a limit with this reset."""
    windows = {"daily": usage.daily_nanos, "weekly": usage.weekly_nanos, "monthly": usage.monthly_nanos}
    return windows[reset] if reset is not None else usage.total_nanos


def resets_at(reset: LimitReset | None, now_s: float) -> str | None:
    """When the window of `now_s` (unix time) ends; None: never."""
    if reset is None:
        return None
    start = datetime.datetime.fromisoformat(window_start(reset, now_s)).replace(tzinfo=datetime.UTC)
    if reset == "monthly":
        end = (start + datetime.timedelta(days=31)).replace(day=1)
    else:
        end = start + datetime.timedelta(days=7 if reset == "weekly" else 1)
    return iso_time(int(end.timestamp()) * 1000)
