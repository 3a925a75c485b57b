"""What is kept, for control's loop: one thread of its own does all the work, in the order it was asked for.

A file that fails is closed, and opened anew for the next piece of work. Without keys and without a file there is nothing, and
none is made.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from gateway.control.content import Added, ContentUnreadable, Exchange, Rotated
from gateway.control.content.file import ContentFile
from gateway.control.content.sealing import Sealed, Sealer
from gateway.control.store.sqlite.database import translated
from gateway.domain.content_keys import ContentKey
from gateway.domain.errors import StoreUnavailable
from gateway.link.messages import Content

DELETED_S = 3600.0  # how long after its beginning an exchange may still come in: longer than any runs
ROTATED_AT_ONCE = 16  # records in one transaction: 16 MiB at most, while others wait

Result = TypeVar("Result")


class ContentStore:
    """To be closed by whoever made it. All methods raise StoreUnavailable; those that take long do it in steps that let others in.

    `now` is unix time.
    """

    def __init__(self, path: Path, keys: Sequence[ContentKey], *, total_bytes_max: int, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._now = now
        self._total_bytes_max = total_bytes_max
        self._sealer = Sealer(keys)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="content")
        self._open_file: ContentFile | None = None
        self._closed = False
        self._deleted_ms: dict[str, int] = {}  # account -> until when all of it was asked to be deleted

    @property
    def has_key(self) -> bool:
        """Whether anything can be kept."""
        return bool(self._sealer.key_id)

    async def add(self, contents: Sequence[Content]) -> Added:
        """Keep what is new; a generation that is there stays as it is. Raises ContentFull."""
        assert self.has_key
        # Nothing is awaited before the thread is asked: a deletion is either known here, or asked of the thread later.
        left = [content for content in contents if content.created_at_ms > self._deleted_ms.get(content.account_id, -1)]
        stored = await self._work(lambda file: file.add(map(self._sealed, left)), 0) if left else 0
        return Added(stored=stored, deleted=len(contents) - len(left))

    async def find(self, generation_id: str, account_id: str) -> Exchange | None:
        """Raises ContentUnreadable: it is there, but cannot be decrypted."""

        def opened(file: ContentFile) -> Exchange | None:
            sealed = file.find(generation_id, account_id)
            return self._sealer.open(sealed) if sealed is not None else None

        return await self._work(opened, None)

    async def delete(self, generation_id: str, account_id: str) -> bool:
        """Whether it was there."""
        if count := await self._work(lambda file: file.delete(generation_id, account_id), 0):
            await self._cut()
        return bool(count)

    async def delete_all(self, account_id: str) -> int:
        """Of an account, also what of it is still on its way; how many were there."""
        now_ms = int(self._now() * 1000)
        self._deleted_ms = {name: until_ms for name, until_ms in self._deleted_ms.items() if until_ms > now_ms - DELETED_S * 1000}
        self._deleted_ms[account_id] = now_ms
        if count := await self._delete(lambda file: file.delete_some_of(account_id)):
            await self._cut()
        return count

    async def expire(self, before_ms: int) -> int:
        """Delete what is from before this moment; how many.

        The log is cut in any case: a foreign read, or the end of a process, may have kept an earlier deletion from it.
        """
        count = await self._delete(lambda file: file.delete_some_before(before_ms))
        await self._cut()
        return count

    async def rotate(self, after: tuple[str, int]) -> Rotated:
        """Encrypt some records anew that are not under the newest key."""
        assert self.has_key
        rotated = await self._work(lambda file: self._rotate(file, after), Rotated(rotated=0, unreadable=0, after=None))
        if rotated.after is None:
            await self._cut()
        return rotated

    async def close(self) -> None:
        """After what was asked for before."""
        self._closed = True
        try:
            with translated():
                await asyncio.get_running_loop().run_in_executor(self._thread, self._drop_file)
        finally:
            self._thread.shutdown(wait=False)

    def _sealed(self, content: Content) -> Sealed:
        exchange = Exchange(content.request, content.answer, content.truncated)
        return self._sealer.seal(content.generation_id, content.account_id, content.created_at_ms, exchange)

    def _rotate(self, file: ContentFile, after: tuple[str, int]) -> Rotated:
        found = file.after(self._sealer.key_id, after, ROTATED_AT_ONCE)
        anew = []
        for _, sealed in found:
            try:
                anew.append(self._sealer.reseal(sealed))
            except ContentUnreadable:
                continue
        if anew:
            file.replace(anew)
        last = (found[-1][1].key_id, found[-1][0]) if len(found) == ROTATED_AT_ONCE else None
        return Rotated(rotated=len(anew), unreadable=len(found) - len(anew), after=last)

    async def _delete(self, some: Callable[[ContentFile], int]) -> int:
        count = 0
        while deleted := await self._work(some, 0):
            count += deleted
        return count

    async def _cut(self) -> None:
        await self._work(lambda file: file.cut_log(), False)

    async def _work(self, work: Callable[[ContentFile], Result], nothing: Result) -> Result:
        """What `work` comes to on the file; `nothing` where there is no file and no key to make one for."""
        if self._closed:
            raise StoreUnavailable("The store is closed")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._on_thread, work, nothing)

    def _on_thread(self, work: Callable[[ContentFile], Result], nothing: Result) -> Result:
        with translated():
            try:
                if self._open_file is None:
                    if not self.has_key and not self._path.exists():
                        return nothing
                    self._open_file = ContentFile.open(self._path, total_bytes_max=self._total_bytes_max)
                return work(self._open_file)
            except (sqlite3.Error, OSError):
                self._drop_file()
                raise

    def _drop_file(self) -> None:
        file, self._open_file = self._open_file, None
        if file is not None:
            file.close()
