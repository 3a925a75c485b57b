"""How many requests an account may make: by what it ever bought, and by its balance. Source: contract 6.4."""

from __future__ import annotations

from gateway.domain.money import NANOS_PER_USD, parse_usd
from gateway.settings import Limits

UNLIMITED = 2**40  # requests of one window, where a limit is 0


def free_requests_per_day(limits: Limits, purchased_nanos: int) -> int:
    """To free models; more for an account that bought enough credit. 0: no limit."""
    credited = purchased_nanos >= parse_usd(limits.credited_usd)
    return limits.free_requests_per_day_credited if credited else limits.free_requests_per_day


def paid_requests_per_minute(limits: Limits, balance_nanos: int) -> int:
    """To models with a price; by the balance, between the least and the most. 0: no limit."""
    if not limits.has_paid_rate:
        return 0
    earned = -(-max(0, balance_nanos) * limits.requests_per_minute_per_usd // NANOS_PER_USD)  # up: the first cent spent costs no request
    return min(max(earned, limits.requests_per_minute_min), limits.requests_per_minute_max)
