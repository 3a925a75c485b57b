"""Credit ends when its time is over. Decides nothing but the time."""

from __future__ import annotations

import time
from collections.abc import Callable

from gateway.control.chores import DAY_MS
from gateway.control.store import Store
from gateway.domain.money import format_usd
from gateway.log import Log


class Expiry:
    """`look()` is a chore. Credit lives `days` days; 0: for ever. `clock` tells unix seconds."""

    def __init__(self, *, store: Store, days: int, log: Log, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._days = days
        self._log = log
        self._clock = clock

    async def look(self) -> int:
        """Once; how many accounts lost credit. Raises StoreUnavailable."""
        if not self._days:
            return 0
        now_ms = int(self._clock() * 1000)
        expired = await self._store.expire_credits(before_ms=max(0, now_ms - self._days * DAY_MS), now_ms=now_ms)
        for each in expired:
            self._log.info("credit_expired", account=each.account_id, usd=format_usd(each.nanos))
        return len(expired)
