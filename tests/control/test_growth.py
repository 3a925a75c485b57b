"""What control does again and again costs the same however long the books are, and verifying them grows no faster than they do.

Counted in instructions of SQLite, which do not depend on the machine.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest

from gateway.control.chores import DAY_MS
from gateway.control.store import JournalSlice
from gateway.control.store.sqlite import SqliteStore, verification
from tests.control.books import USD, Books
from tests.control.journaling import NOON_MS, generation, move_back
from tests.control.test_removal import now_ms

BATCHES = 150


class Steps:
    """Counts what the store's connections do within `counted()`."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self.tens = 0

    def _count(self) -> None:
        self.tens += 1

    @contextlib.asynccontextmanager
    async def counted(self) -> AsyncIterator[None]:
        self.tens = 0
        for db in (self._store._writer, self._store._reader):
            await db.set_progress_handler(self._count, 10)
        yield
        for db in (self._store._writer, self._store._reader):
            await db.set_progress_handler(lambda: None, 0)


async def _post(books: Books, batches: int) -> None:
    """So many transactions of eight generations of two accounts."""
    offsets = await books.store.journal_offsets()
    begin = offsets.get("edge-0-a.1", 0)
    for number in range(begin, begin + batches):
        records = [msgspec.msgpack.encode(generation(f"user_{'ann' if place % 2 else 'bob'}")) for place in range(8)]
        await books.store.apply_journal([JournalSlice("edge-0-a.1", "a", number, number + 1, records)])


async def _expire(books: Books) -> None:
    """With something to take away, each time."""
    await books.store.add_credits("user_ann", USD, note="")
    move_back(books.database, 400 * DAY_MS, "reference LIKE 'operator:%' AND created_at_ms > 1700000000000")
    assert len(await books.store.expire_credits(before_ms=now_ms() - 365 * DAY_MS, now_ms=now_ms())) >= 1


async def _read(books: Books) -> None:
    for account in ("user_ann", "user_bob"):
        await books.store.credits(account)
        await books.store.daily_usage(account, "2025-11-01", "2025-11-30", None)
    await books.store.key_usage("digest-a", NOON_MS / 1000)
    await books.store.usage_of_keys(["digest-a", "digest-b"], NOON_MS / 1000)
    [(oldest,)] = books.rows("SELECT id FROM generations ORDER BY number LIMIT 1")
    assert await books.store.generation(oldest) is not None


async def _remove(books: Books) -> None:
    assert await books.store.remove_generations(before_ms=now_ms() - 390 * DAY_MS, limit=100) == 100


async def _erase(books: Books) -> None:
    """The next of an account, with a good part of its generations removed."""
    assert await books.store.erase_generations("user_ann", "", 10)


@pytest.mark.parametrize("work", [_expire, _read, _remove, _erase])
async def test_it_costs_the_same_however_long_the_books_are(books: Books, work: Callable[[Books], Awaitable[None]]) -> None:
    steps = Steps(books.store)
    counts = []
    for _ in range(3):
        await _post(books, BATCHES)
        move_back(books.database, 400 * DAY_MS, f"kind = 'usage' AND created_at_ms > {now_ms() - DAY_MS}")
        if work is _erase:
            while await books.store.remove_generations(before_ms=now_ms() - 390 * DAY_MS, limit=100):
                pass
            await _post(books, 10)
        async with steps.counted():
            await work(books)
        counts.append(steps.tens)
    assert counts[-1] <= 1.3 * counts[0] + 20, counts


async def test_verifying_grows_no_faster_than_the_books(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "RANGE", 40)
    tens = 0

    def count() -> None:
        nonlocal tens
        tens += 1

    counts = []
    for batches in (BATCHES, 2 * BATCHES):
        await _post(books, batches)
        tens = 0
        with contextlib.closing(sqlite3.connect(books.database, isolation_level=None)) as db:
            db.set_progress_handler(count, 10)
            assert verification.verify(db).ok
        counts.append(tens)
    assert counts[1] <= 3.2 * counts[0], counts
