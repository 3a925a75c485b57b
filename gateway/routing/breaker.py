"""Whether an endpoint may be tried at all. Errors eject it, slowness never does: that is for the scorer.

closed -> ejected for a while -> one live probe at a time -> closed again, or ejected for twice as long.
Apart from that, a provider that said Retry-After is held until then; of two deadlines the later one counts.
A caller's own fault and a caller who left are never told here.
"""

from __future__ import annotations

from typing import Literal

import msgspec

HOLD_S_MAX = 3600.0  # of a provider's Retry-After, which is untrusted input
REST_S = 1.0  # after a 429 that names no time; doubles while they go on
STEADY_S = 60.0  # closed for so long, and the next ejection is a first one again


class BreakerRules(msgspec.Struct, frozen=True, kw_only=True):
    """From `[routing]`: breaker_failures, breaker_error_share, breaker_attempts_min, breaker_open_s, breaker_open_s_max."""

    failures: int = 5
    error_share: float = 0.5
    attempts_min: int = 20
    open_s: float = 5.0
    open_s_max: float = 30.0


class Breaker:
    """The breaker of one endpoint on one edge."""

    __slots__ = (
        "_closed_at_s",
        "_rules",
        "_throttles",
        "_trips",
        "ejected",
        "ejected_until_s",
        "failures_in_a_row",
        "held_until_s",
        "probing",
        "resting_until_s",
        "successes_in_a_row",
    )

    def __init__(self, rules: BreakerRules) -> None:
        self._rules = rules
        self._trips = 0  # in a row, each doubling the ejection
        self._throttles = 0
        self._closed_at_s = 0.0
        self.failures_in_a_row = self.successes_in_a_row = 0
        self.ejected = False
        self.ejected_until_s = 0.0  # from then on a probe may go
        self.held_until_s = 0.0  # the provider's own word: nothing is sent before, whatever else fails
        self.resting_until_s = 0.0  # after a 429 that named no time
        self.probing = 0  # the attempt that is the probe; 0: none

    def __repr__(self) -> str:
        return f"<Breaker {'ejected' if self.ejected else 'closed'} {self.failures_in_a_row} in a row>"

    def admits(self, now_s: float) -> bool:
        """Whether the ordinary next request may go to the endpoint."""
        return not self.ejected and now_s >= self.held_until_s and now_s >= self.resting_until_s

    def admits_probe(self, now_s: float) -> bool:
        """Whether an ejected endpoint may be tried with one request."""
        return self.ejected and not self.probing and now_s >= self.ejected_until_s and now_s >= self.held_until_s

    def state(self, now_s: float) -> Literal["closed", "held", "ejected"]:
        """`held`: by a rate limit or the provider's own word. `ejected` lasts until a probe has healed it."""
        if self.ejected:
            return "ejected"
        return "closed" if self.admits(now_s) else "held"

    def next_change_s(self) -> float:
        """When time alone changes an answer above; 0: never."""
        return max(self.held_until_s, self.resting_until_s, self.ejected_until_s if self.ejected else 0.0)

    def began(self, attempt: int) -> None:
        """An attempt goes to an ejected endpoint: it is the probe."""
        if self.ejected and not self.probing:
            self.probing = attempt

    def succeeded(self, attempt: int, now_s: float) -> bool:
        """True when this heals the endpoint. Attempts that began before the ejection heal nothing."""
        self.failures_in_a_row = self._throttles = 0
        self.successes_in_a_row += 1
        if not self.ejected or attempt != self.probing:
            return False
        self.ejected = False
        self.probing = 0
        self._closed_at_s = now_s
        return True

    def failed(self, attempt: int, now_s: float, *, attempts: int, failed: int) -> bool:
        """True when this ejects the endpoint. `failed` of `attempts` is its record over the last `outage_s`."""
        self.failures_in_a_row += 1
        self.successes_in_a_row = 0
        if self.ejected:
            if attempt != self.probing:
                return False
            self.probing = 0
            if now_s < self.ejected_until_s:  # sent in panic, when all were ejected: that does not lengthen anything
                return False
            self._eject(now_s)
            return True
        rules = self._rules
        mostly = attempts >= rules.attempts_min and failed >= rules.error_share * attempts
        if self.failures_in_a_row < rules.failures and not mostly:
            return False
        if now_s - self._closed_at_s > STEADY_S:
            self._trips = 0
        self._eject(now_s)
        return True

    def throttled(self, attempt: int, now_s: float, retry_after_s: float | None) -> None:
        """A 429: left alone for as long as the provider said, or a little while if it did not."""
        self.told_nothing(attempt)
        if retry_after_s is None:
            self._throttles += 1
            rest_s = min(REST_S * 2 ** min(self._throttles - 1, 16), self._rules.open_s_max)
            self.resting_until_s = max(self.resting_until_s, now_s + rest_s)
        else:
            self.hold(now_s, retry_after_s)

    def hold(self, now_s: float, retry_after_s: float) -> None:
        self.held_until_s = max(self.held_until_s, now_s + min(max(retry_after_s, 0.0), HOLD_S_MAX))

    def told_nothing(self, attempt: int) -> None:
        """The attempt ended without a word on the endpoint's health."""
        if attempt == self.probing:
            self.probing = 0

    def _eject(self, now_s: float) -> None:
        self.ejected = True
        self.probing = 0
        self.ejected_until_s = max(
            self.ejected_until_s, now_s + min(self._rules.open_s * 2 ** min(self._trips, 16), self._rules.open_s_max)
        )
        self._trips += 1
