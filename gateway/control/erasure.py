"""Removes what is personal from the generations of deleted accounts, and what they had kept, a little at a time, also after a restart.

Their money stays in the books. Journals may bring an account's last exchanges after its end, so it is gone over again
when that can no longer be.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from gateway.control.store import Store
from gateway.domain.errors import StoreUnavailable
from gateway.log import Log

BATCH = 500
RETRY_S = 5.0
CONTENT_RETRY_S = 60.0


class Erasure:
    """`run()` until cancelled; `wake()` when an account was deleted. `now` is unix time.

    `erase_content(account_id)` may raise StoreUnavailable: what is in the ledger is erased all the same, the rest later.
    """

    def __init__(
        self, *, store: Store, erase_content: Callable[[str], Awaitable[int]], log: Log, now: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._erase_content = erase_content
        self._log = log
        self._now = now
        self._woken = asyncio.Event()

    def wake(self) -> None:
        self._woken.set()

    async def run(self) -> None:
        while True:
            self._woken.clear()
            try:
                wait_s = await self.work()
            except StoreUnavailable as error:
                self._log.warning("erasure_unavailable", reason=str(error)[:200])
                wait_s = RETRY_S
            try:
                async with asyncio.timeout(wait_s):
                    await self._woken.wait()
            except TimeoutError:
                pass

    async def work(self) -> float | None:
        """Go over every account once; seconds until it is worth it again, None: not before another is deleted."""
        began_s = self._now()
        due = await self._store.erasures()
        left: list[float] = []
        for account_id, until_s in due.items():
            if not await self._erase(account_id):
                left.append(self._now() + CONTENT_RETRY_S)
            elif until_s <= began_s:
                await self._store.finish_erasure(account_id)
                self._log.info("account_erased", account=account_id)
            else:
                left.append(until_s)
        return max(1.0, min(left) - self._now()) if left else None

    async def _erase(self, account_id: str) -> bool:
        """Whether everything could be erased."""
        after: str | None = ""
        while after is not None:
            after = await self._store.erase_generations(account_id, after, BATCH)
        try:
            await self._erase_content(account_id)
        except StoreUnavailable as error:
            self._log.warning("content_not_erased", account=account_id, reason=str(error.__cause__ or error)[:200])
            return False
        return True
