"""What edges tell was said, on its way to the file: taken at once, bounded, and written in batches by a task of its own.

Nobody waits for it. An account's rule is looked up again before anything is written, since an edge may not have heard yet.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Awaitable, Callable, Iterable

from gateway.control.content import ContentFull, DropReason
from gateway.control.content.store import ContentStore
from gateway.domain.errors import StoreUnavailable
from gateway.domain.rules import AccountRules
from gateway.link.messages import Content
from gateway.log import Log, exception_fields

QUEUE_BYTES_MAX = 64 * 1024 * 1024
BATCH_BYTES = 4 * 1024 * 1024  # written in one transaction; one exchange may come on top
RECORD_BYTES = 1024  # what one costs beside its texts


class ContentIntake:
    """`offer()` never waits and never raises; `run()` until cancelled. `rules` may raise StoreUnavailable.

    `on_stored()` and `on_dropped(reason)` are called as it happens, once for each exchange.
    """

    def __init__(
        self,
        *,
        store: ContentStore,
        rules: Callable[[str], Awaitable[AccountRules]],
        on_stored: Callable[[], None],
        on_dropped: Callable[[DropReason], None],
        log: Log,
    ) -> None:
        self._store = store
        self._rules = rules
        self._on_stored = on_stored
        self._on_dropped = on_dropped
        self._log = log
        self._waiting: collections.deque[Content] = collections.deque()
        self._waiting_bytes = 0
        self._arrived = asyncio.Event()
        self._trouble: set[DropReason] = set()  # told in the log already

    def offer(self, content: Content) -> None:
        if not self._store.has_key:
            self._drop((content,), "no_key", "an account has its prompts kept, and there is no key to encrypt them with")
        elif self._waiting_bytes + _size(content) > QUEUE_BYTES_MAX:
            self._drop((content,), "queue", "more comes than can be written")
        else:
            self._waiting.append(content)
            self._waiting_bytes += _size(content)
            self._arrived.set()

    async def run(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            await self.write_all()

    async def write_all(self) -> None:
        """What waits now, batch by batch."""
        while self._waiting:
            batch = self._batch()
            try:
                await self._write(batch)
            except ContentFull as error:
                self._drop(batch, "full", str(error))
            except StoreUnavailable as error:
                self._drop(batch, "failed", str(error.__cause__ or error))
            except Exception as error:  # noqa: BLE001 - the task's outermost edge: one bad batch must not end all others
                self._log.error("content_failed", **exception_fields(error))
                self._drop(batch, "failed", type(error).__name__)

    async def _write(self, batch: list[Content]) -> None:
        wanted: dict[str, bool] = {}
        for content in batch:
            if content.account_id not in wanted:
                wanted[content.account_id] = (await self._rules(content.account_id)).log_prompts
        self._drop([content for content in batch if not wanted[content.account_id]], "off")
        batch[:] = [content for content in batch if wanted[content.account_id]]
        if not batch:
            return
        added = await self._store.add(batch)
        for _ in range(added.stored):
            self._on_stored()
        for _ in range(added.deleted):
            self._on_dropped("deleted")
        self._trouble.clear()

    def _batch(self) -> list[Content]:
        batch, size = [], 0
        while self._waiting and size < BATCH_BYTES:
            content = self._waiting.popleft()
            size += _size(content)
            batch.append(content)
        self._waiting_bytes -= size
        return batch

    def _drop(self, contents: Iterable[Content], reason: DropReason, trouble: str = "") -> None:
        """`trouble` is told once, until something could be written again."""
        for _ in contents:
            self._on_dropped(reason)
        if trouble and reason not in self._trouble:
            self._trouble.add(reason)
            self._log.error("content_dropped", reason=reason, message=trouble[:200])


def _size(content: Content) -> int:
    return len(content.request) + len(content.answer) + RECORD_BYTES
