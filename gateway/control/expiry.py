"""Credit ends when its time is over: looked at when control starts and once an hour. Decides nothing but the time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from gateway.control.store import Store
from gateway.domain.errors import StoreUnavailable
from gateway.domain.money import format_usd
from gateway.log import Log, exception_fields

PERIOD_S = 3600.0
RETRY_S = 60.0
DAY_MS = 86_400_000


class Expiry:
    """`run()` until cancelled. Credit lives `days` days; 0: for ever. `clock` tells unix seconds."""

    def __init__(self, *, store: Store, days: int, log: Log, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._days = days
        self._log = log
        self._clock = clock

    async def run(self) -> None:
        while self._days:
            wait_s = PERIOD_S
            try:
                await self.look()
            except StoreUnavailable as error:
                self._log.warning("expiry_put_off", reason=str(error)[:200])
                wait_s = RETRY_S
            except Exception as error:  # noqa: BLE001 - the task's outermost edge: an hour later it is tried again
                self._log.error("expiry_failed", **exception_fields(error))
            await asyncio.sleep(wait_s)

    async def look(self) -> int:
        """Once; how many accounts lost credit. Raises StoreUnavailable."""
        now_ms = int(self._clock() * 1000)
        expired = await self._store.expire_credits(before_ms=max(0, now_ms - self._days * DAY_MS), now_ms=now_ms)
        for each in expired:
            self._log.info("credit_expired", account=each.account_id, usd=format_usd(each.nanos))
        return len(expired)
