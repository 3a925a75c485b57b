"""How much may be tried again, how long to wait before, how long for a first token, and what may be spent on not waiting.

An outage must not multiply load: beyond its first attempt each call draws on one budget of the node. A call that comes
alone always finds enough in it to fall back.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.domain.money import NANOS_PER_USD, parse_usd
from gateway.routing.figures import Percentiles

FIRST_TOKEN_S_MIN = 3.0
FIRST_TOKEN_S_COLD = 15.0  # while nothing is known of the endpoint
FIRST_TOKEN_S_REASONING = 120.0  # a model that thinks says nothing for long, and is never cut under this
P99_TIMES = 2.0  # the slowest of a hundred is no outage; twice as slow may be one
BACKOFF_S, BACKOFF_S_MAX = 0.05, 1.0
EARNED_MAX = 100.0  # attempts that requests may save up for
HEDGE_S_MIN = 0.02  # below it, what was waited for may be this very process
HEDGE_TIMES = 1.5  # the median: where all take nearly the same time, one in twenty is late and none is slow
HEDGES_SAVED = 10  # that a quiet time may save up for


class RetryBudget:
    """An edge's part of the node's budget: a share of requests, plus so many per second.

    Over any stretch of time no more than `share` x requests + `per_s` x seconds are granted, idle seconds not saved up
    beyond one, or beyond what one call may need.
    """

    __slots__ = ("_at_s", "_capacity", "_earned", "_per_s", "_share", "_timed")

    def __init__(self, *, share: float, per_s: float, edges: int, attempts_max: int, now_s: float) -> None:
        self._share = share
        self._per_s = per_s / max(1, edges)
        self._capacity = max(self._per_s, float(attempts_max - 1)) if per_s else 0.0
        self._timed = self._capacity  # granted by time
        self._earned = 0.0  # granted by requests
        self._at_s = now_s + (self._capacity / self._per_s if self._per_s else 0.0)  # the first filling is drawn ahead

    def request(self) -> None:
        """A caller's request came: it earns its share."""
        if self._earned < EARNED_MAX:
            self._earned += self._share

    def take(self, now_s: float) -> bool:
        """Whether one more attempt may be made; if so it is counted."""
        if now_s > self._at_s:
            self._timed = min(self._capacity, self._timed + (now_s - self._at_s) * self._per_s)
            self._at_s = now_s
        if self._earned >= 1.0:
            self._earned -= 1.0
        elif self._timed >= 1.0:
            self._timed -= 1.0
        else:
            return False
        return True


class HedgeBudget:
    """What one edge may spend on second attempts: `percent` of what its requests brought in. In one unit, nanos or requests.

    Whoever begins one takes the most that it can cost, and gives back what it did not; so that at any moment no more is spent
    than was earned, whatever runs at the same time. Begins empty.
    """

    __slots__ = ("_percent", "_saved")

    def __init__(self, percent: str) -> None:
        self._percent = parse_usd(percent)
        self._saved = 0  # in units of 1 / _WHOLE: percentages of small amounts leave no rest

    def earn(self, amount: int, most: int) -> None:
        """A request brought in `amount`; a second attempt of its kind may take `most`: no more is saved than pays for ten of them."""
        saved, limit = self._saved + amount * self._percent, HEDGES_SAVED * most * _WHOLE
        self._saved = saved if saved <= limit else max(self._saved, limit)

    def take(self, amount: int) -> bool:
        """Whether there is so much; if so it is spent."""
        if amount * _WHOLE > self._saved:
            return False
        self._saved -= amount * _WHOLE
        return True

    def give_back(self, amount: int) -> None:
        """Of what was taken."""
        self._saved += amount * _WHOLE


_WHOLE = 100 * NANOS_PER_USD  # of a percentage with nine decimals


def backoff_s(retry: int, rng: Callable[[], float]) -> float:
    """Seconds before the same endpoint is tried again, `retry` counting from 0: full jitter, doubling."""
    return rng() * min(BACKOFF_S * float(2 ** min(retry, 16)), BACKOFF_S_MAX)


def first_token_limit_s(first_s: Percentiles | None, mean_prompt_tokens: float, *, prompt_tokens: int, reasoning: bool) -> float:
    """Seconds after which a silent stream is given up for the next endpoint.

    From the endpoint's own p99 over 5 minutes, longer in proportion for a prompt above the usual size there.
    """
    if first_s is None:
        limit = FIRST_TOKEN_S_COLD
    else:
        scale = max(1.0, prompt_tokens / mean_prompt_tokens) if mean_prompt_tokens > 0 else 1.0
        limit = max(FIRST_TOKEN_S_MIN, first_s.p99 * P99_TIMES * scale)
    return max(limit, FIRST_TOKEN_S_REASONING) if reasoning else limit


def hedge_after_s(first_s: Percentiles | None, mean_prompt_tokens: float, *, prompt_tokens: int) -> float:
    """Seconds after which a silent stream is slow for its endpoint, longer for a long prompt as above. 0.0: nobody knows.

    That is the p95, if it is far enough from the median. Two thirds of the way from p99 to p90 on a scale of logarithms is the
    p95, within 3 % where times are log-normal or exponential.
    """
    if first_s is None:
        return 0.0
    scale = max(1.0, prompt_tokens / mean_prompt_tokens) if mean_prompt_tokens > 0 else 1.0
    return slow_s(first_s.p50, float((first_s.p90 * first_s.p90 * first_s.p99) ** (1 / 3))) * scale


def slow_s(p50_s: float, p95_s: float) -> float:
    """When one is slow that has such company."""
    return max(HEDGE_S_MIN, p95_s, HEDGE_TIMES * p50_s)
