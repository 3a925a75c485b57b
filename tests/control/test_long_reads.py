"""LED-09: somebody's long read of the database cannot make its log grow without bound, and loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3

import pytest

from gateway.control.store import sqlite as sqlite_module
from tests.control.books import Books
from tests.control.journaling import Writer, generation

PER_S = 200
KEPT_S = 10.0


async def _held(books: Books, *, records: int, pace_s: float, wal_bytes_max: int) -> None:
    """A reader holds a snapshot while `records` come, and lets go; the log stays below `wal_bytes_max` all the time."""
    wal = books.database.with_name(books.database.name + "-wal")
    loop = asyncio.get_running_loop()
    edge = Writer(books.journal, "a")
    books.joined.add("a")
    keeper = books.keeper()
    await keeper.load()
    running = asyncio.create_task(keeper.run())
    highest = 0
    with contextlib.closing(sqlite3.connect(books.database, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        before = reader.execute("SELECT SUM(nanos) FROM balances WHERE nanos > 0").fetchone()
        for _ in range(0, records, 10):
            edge.append(*(generation(title="x" * 200) for _ in range(10)))
            keeper.journaled("a")
            await asyncio.sleep(pace_s)
            highest = max(highest, wal.stat().st_size)
        assert reader.execute("SELECT SUM(nanos) FROM balances WHERE nanos > 0").fetchone() == before
        reader.execute("COMMIT")
    released_s = loop.time()
    assert await keeper.drained(KEPT_S)
    while wal.stat().st_size > sqlite_module.WAL_BYTES_KEPT:  # while work goes on
        assert loop.time() - released_s < KEPT_S
        edge.append(generation())
        keeper.journaled("a")
        records += 1
        await asyncio.sleep(0.05)
        highest = max(highest, wal.stat().st_size)
    assert await keeper.drained(KEPT_S)
    running.cancel()
    assert highest <= wal_bytes_max
    assert books.rows("SELECT COUNT(*), SUM(charged_nanos) FROM generations") == [(records, 10 * records)]


async def test_led_09_a_long_read_bounds_the_log_and_what_waits_is_posted_afterwards(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 1 << 20
    monkeypatch.setattr(sqlite_module, "WAL_BYTES_MAX", limit)
    await _held(books, records=5000, pace_s=0.005, wal_bytes_max=limit + (4 << 20))  # a batch may come on top
    [failure] = [line for line in books.logged() if line["event"] == "bookkeeping_failed"]
    assert "long read" in failure["reason"]


@pytest.mark.soak
async def test_led_09_a_read_of_a_minute_under_200_settlements_a_second(books: Books) -> None:
    await _held(books, records=60 * PER_S, pace_s=10 / PER_S, wal_bytes_max=64 << 20)
