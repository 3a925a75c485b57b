"""Content that was kept for long enough is deleted. Decides nothing but the time."""

from __future__ import annotations

import time
from collections.abc import Callable

from gateway.control.chores import DAY_MS
from gateway.control.content.store import ContentStore
from gateway.log import Log


class Retention:
    """`look()` is a chore. Content lives `days` days from its exchange's beginning. `clock` tells unix seconds."""

    def __init__(self, *, store: ContentStore, days: int, log: Log, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._days = days
        self._log = log
        self._clock = clock

    async def look(self) -> int:
        """Once; how many were deleted. Raises StoreUnavailable."""
        count = await self._store.expire(int(self._clock() * 1000) - self._days * DAY_MS)
        if count:
            self._log.info("content_expired", count=count)
        return count
