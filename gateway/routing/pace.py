"""Staying under a provider's rate limit after having met it once, instead of meeting it again and again.

The limit is the rate at which it accepted calls before its 429. From 85 % of it the pace grows along a cubic curve: fast
at first, flat near the limit, then beyond it, to find out whether it was raised. Source: CUBIC (RFC 9438), for rates.
"""

from __future__ import annotations

BACK_OFF = 0.15
PLATEAU_S = 50.0  # from the limit's 85 % back to all of it; one 429 costs as much as many calls elsewhere
RATE_MIN = 0.2  # calls per second: one that is limited to less is limited by its Retry-After
FREE_AT = 2.0  # times the limit: it is gone
AGAIN_S, AGAIN = 10.0, 0.8  # met again so soon: the rate was taken too high
BURST_S = 0.5


class Pace:
    """What one edge sends to one endpoint per second."""

    __slots__ = ("_limit", "_met_at_s", "_next_s")

    def __init__(self) -> None:
        self._limit = 0.0  # calls per second; 0: none is known
        self._met_at_s = 0.0
        self._next_s = 0.0  # when the next call would be due at an even pace

    def met_limit(self, now_s: float, accepted_per_s: float) -> None:
        """A 429 arrived. Several at once are one meeting."""
        if self._limit and now_s - self._met_at_s < 1.0:
            return
        if self._limit and now_s - self._met_at_s < AGAIN_S:
            accepted_per_s = min(accepted_per_s, AGAIN * self._limit)
        self._limit = max(accepted_per_s, RATE_MIN)
        self._met_at_s = now_s
        self._next_s = now_s

    def per_s(self, now_s: float) -> float:
        """Calls per second that may go; infinite while no limit is known."""
        if not self._limit:
            return float("inf")
        rate = self._limit * (1 + BACK_OFF * ((now_s - self._met_at_s) / PLATEAU_S - 1) ** 3)
        if rate > FREE_AT * self._limit:
            self._limit = 0.0
            return float("inf")
        return rate

    def take(self, now_s: float) -> bool:
        """Whether a call may go now; if so it is counted."""
        if not self._limit:
            return True
        rate = self.per_s(now_s)
        due = max(self._next_s, now_s - BURST_S)
        if due > now_s:
            return False
        self._next_s = due + 1 / rate if rate != float("inf") else now_s
        return True
