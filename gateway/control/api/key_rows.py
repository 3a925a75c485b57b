"""A key as its owner sees it in lists."""

from __future__ import annotations

import msgspec

from gateway.control.api.http import iso_time
from gateway.control.api.key import spent_in_window
from gateway.control.api.workspace import workspace_of
from gateway.control.store import Key, KeyUsage
from gateway.domain.money import usd_number
from gateway.domain.resources import LimitReset


class KeyRow(msgspec.Struct, frozen=True, kw_only=True):
    """Amounts in USD, times in ISO 8601. Every key of the contract; null: none, or never."""

    hash: str
    name: str
    label: str
    disabled: bool
    limit: float | None
    limit_remaining: float | None
    limit_reset: LimitReset | None
    include_byok_in_limit: bool
    usage: float
    usage_daily: float
    usage_weekly: float
    usage_monthly: float
    byok_usage: float = 0
    byok_usage_daily: float = 0
    byok_usage_weekly: float = 0
    byok_usage_monthly: float = 0
    created_at: str
    updated_at: str | None
    expires_at: str | None
    last_used_at: str | None  # the UTC day, begun at midnight or with the key
    creator_user_id: str | None
    external_user: str | None = None
    workspace_id: str


def key_list_row(key: Key, usage: KeyUsage, last_day: str | None) -> KeyRow:
    """`last_day`: the UTC day on which it was used last."""
    limit = key.limit_nanos
    left = max(0, limit - spent_in_window(usage, key.limit_reset)) if limit is not None else None
    return KeyRow(
        hash=key.digest,
        name=key.name,
        label=key.label,
        disabled=key.disabled,
        limit=usd_number(limit) if limit is not None else None,
        limit_remaining=usd_number(left) if left is not None else None,
        limit_reset=key.limit_reset,
        include_byok_in_limit=key.include_byok_in_limit,
        usage=usd_number(usage.total_nanos),
        usage_daily=usd_number(usage.daily_nanos),
        usage_weekly=usd_number(usage.weekly_nanos),
        usage_monthly=usd_number(usage.monthly_nanos),
        created_at=iso_time(key.created_at_ms),
        updated_at=iso_time(key.updated_at_ms) if key.updated_at_ms is not None else None,
        expires_at=iso_time(key.expires_at_s * 1000) if key.expires_at_s is not None else None,
        last_used_at=max(f"{last_day}T00:00:00.000Z", iso_time(key.created_at_ms)) if last_day is not None else None,
        creator_user_id=key.account_id,
        workspace_id=workspace_of(key.account_id),
    )
