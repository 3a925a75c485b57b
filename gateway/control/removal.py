"""Generations that were kept for long enough are removed, some at a time, so that nobody who charges or asks for a lease waits noticeably.

What they came to stays in the books and in the daily sums. A removed generation's id is forgotten, so a record of it that came again
could not be told from a new one: records of that age are refused from then on, and nothing is removed while any wait in a journal.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from gateway.control.chores import DAY_MS
from gateway.control.store import Store
from gateway.domain.errors import StoreUnavailable
from gateway.log import Log

CHUNK = 500  # generations in one transaction
REST = 4.0  # times as long as a chunk took, before the next one
REST_S_MIN = 0.05


class Removal:
    """`look()` is a chore. Generations live `days` days from when they were posted; 0: for ever. `clock` tells unix seconds.

    `drained()` says whether all that waits in journals is posted by now. `on_removed(count)` is told of each chunk.
    """

    def __init__(
        self,
        *,
        store: Store,
        days: int,
        drained: Callable[[], Awaitable[bool]],
        log: Log,
        on_removed: Callable[[int], None] = lambda count: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._days = days
        self._drained = drained
        self._log = log
        self._on_removed = on_removed
        self._clock = clock

    async def look(self) -> int:
        """Once, until none is old enough; how many went. Raises StoreUnavailable."""
        if not self._days:
            return 0
        before_ms = int(self._clock() * 1000) - self._days * DAY_MS
        if not await self._drained():
            raise StoreUnavailable("finished exchanges wait in a journal")
        removed = 0
        try:
            while count := await self._remove(before_ms):
                removed += count
        finally:
            if removed:
                self._log.info("generations_removed", count=removed)
        return removed

    async def _remove(self, before_ms: int) -> int:
        began_s = time.monotonic()
        count = await self._store.remove_generations(before_ms=before_ms, limit=CHUNK)
        if count:
            self._on_removed(count)
            await asyncio.sleep(max(REST_S_MIN, REST * (time.monotonic() - began_s)))
        return count
