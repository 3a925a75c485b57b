"""How much may be tried again, how long to wait before, and how long for a first token.

An outage must not multiply load: beyond its first attempt each call draws on one budget of the node. A call that comes
alone always finds enough in it to fall back.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.routing.figures import Percentiles

FIRST_TOKEN_S_MIN = 3.0
FIRST_TOKEN_S_COLD = 15.0  # while nothing is known of the endpoint
FIRST_TOKEN_S_REASONING = 120.0  # a model that thinks says nothing for long, and is never cut under this
P99_TIMES = 2.0  # the slowest of a hundred is no outage; twice as slow may be one
BACKOFF_S, BACKOFF_S_MAX = 0.05, 1.0


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
        self._earned = min(self._earned + self._share, 100.0)

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
