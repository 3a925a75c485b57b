"""What was kept for long enough is deleted: looked at when control starts and once an hour. Decides nothing but the time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from gateway.control.content.store import ContentStore
from gateway.domain.errors import StoreUnavailable
from gateway.log import Log, exception_fields

PERIOD_S = 3600.0
RETRY_S = 60.0
DAY_MS = 86_400_000


class Retention:
    """`run()` until cancelled. Content lives `days` days from its exchange's beginning. `clock` tells unix seconds."""

    def __init__(self, *, store: ContentStore, days: int, log: Log, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._days = days
        self._log = log
        self._clock = clock

    async def run(self) -> None:
        while True:
            wait_s = PERIOD_S
            try:
                await self.look()
            except StoreUnavailable as error:
                self._log.warning("content_kept_too_long", reason=str(error.__cause__ or error)[:200])
                wait_s = RETRY_S
            except Exception as error:  # noqa: BLE001 - the task's outermost edge: an hour later it is tried again
                self._log.error("content_retention_failed", **exception_fields(error))
            await asyncio.sleep(wait_s)

    async def look(self) -> int:
        """Once; how many were deleted. Raises StoreUnavailable."""
        count = await self._store.expire(int(self._clock() * 1000) - self._days * DAY_MS)
        if count:
            self._log.info("content_expired", count=count)
        return count
