"""How often something may be tried: passwords of one account, sign-ups and sign-ins from one address, keys made for one account.

Kept in memory, bounded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from gateway.domain.errors import RateLimited

NAMES_MAX = 100_000


class Attempts:
    """At most `most` attempts under one name within `window_s` of the first. `now` is monotonic seconds."""

    def __init__(self, *, most: int, window_s: float, now: Callable[[], float]) -> None:
        self._most = most
        self._window_s = window_s
        self._now = now
        self._counts: OrderedDict[str, tuple[int, float]] = OrderedDict()  # name -> attempts, until when they count; oldest first

    def take(self, name: str) -> None:
        """Count one attempt, before it is made. Raises RateLimited."""
        now = self._now()
        count, until = self._counts.get(name, (0, 0.0))
        if until <= now:
            count, until = 0, now + self._window_s
            self._counts.pop(name, None)
            self._make_room(now)
        if count >= self._most:
            raise RateLimited("Too many attempts; try again later", retry_after_s=until - now)
        self._counts[name] = (count + 1, until)

    def forget(self, name: str) -> None:
        """After a success: none did count."""
        self._counts.pop(name, None)

    def give_back(self, name: str) -> None:
        """One attempt did not count after all."""
        count, until = self._counts.get(name, (0, 0.0))
        if count:
            self._counts[name] = (count - 1, until)

    def _make_room(self, now: float) -> None:
        while self._counts:
            name, (_, until) = next(iter(self._counts.items()))
            if until > now and len(self._counts) < NAMES_MAX:
                return
            del self._counts[name]
