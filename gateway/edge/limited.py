"""What a caller is told whose account has made as many requests as it may: the contract's platform 429. Source: contract 3.0, 6.4."""

from __future__ import annotations

from gateway.domain import resources
from gateway.domain.errors import RateLimited
from gateway.domain.money import format_usd, parse_usd
from gateway.settings import Limits


def rate_limited(resource: str, limit: int, limits: Limits, now_s: float) -> RateLimited:
    """The refusal of one request more than `limit` in the window of this quota or rate; `now_s` is unix time.

    The headers in its metadata are also those of the answer.
    """
    end_s = resources.end_s(resource)
    headers = {"X-RateLimit-Limit": str(limit), "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(int(end_s * 1000))}
    return RateLimited(
        f"Rate limit exceeded: {_what(resource, limit, limits)}",
        retry_after_s=max(1.0, end_s - now_s),
        metadata={"headers": headers, "provider_name": None},
    )


def _what(resource: str, limit: int, limits: Limits) -> str:
    if not resources.is_quota(resource):
        return "free-models-per-min." if resource.startswith("free-") else f"{limit} requests per minute."
    most = limits.free_requests_per_day_credited
    if limit == most:
        return "free-models-per-day-high-balance."
    if most and most < limit:
        return "free-models-per-day."
    more = f"{most} free model requests per day" if most else "more free model requests"
    return f"free-models-per-day. Add {format_usd(parse_usd(limits.credited_usd))} credits to unlock {more}"
