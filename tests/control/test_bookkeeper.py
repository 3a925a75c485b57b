"""Journal files into the ledger, on real files and a real store."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from typing import Any

import pytest

from gateway.control import bookkeeper as bookkeeper_module
from gateway.control import journals
from gateway.control.store import LeaseRow
from gateway.domain.errors import StoreUnavailable
from gateway.link.messages import Committed
from gateway.wire import records
from tests.control.books import USD, Books
from tests.control.journaling import Writer, generation


async def test_reading_again_posts_nothing_and_new_records_follow(books: Books) -> None:
    edge = Writer(books.journal, "a")
    edge.append(generation(), generation())
    keeper = books.keeper()
    await keeper.read_all()
    await keeper.read_all()
    edge.append(generation())
    await books.keeper().read_all()  # another control
    assert books.rows("SELECT COUNT(*), SUM(charged_nanos) FROM generations") == [(3, 30)]


async def test_a_batch_replayed_from_its_beginning_counts_once(books: Books) -> None:
    """Offsets lost, as after restoring an older journal folder: ids still tell."""
    edge = Writer(books.journal, "a")
    edge.append(*(generation() for _ in range(5)))
    await books.keeper().read_all()
    await books.store.forget_journals([edge.name])
    edge.append(generation())
    await books.keeper().read_all()
    assert books.rows("SELECT COUNT(*), SUM(charged_nanos) FROM generations") == [(6, 60)]
    assert books.rows("SELECT settled_nanos FROM leases") == [(60,)]
    assert books.rows("SELECT requests, nanos FROM usage_daily") == [(6, 60)]


async def test_a_torn_tail_is_cut_when_its_writer_is_dead_and_waited_for_before(books: Books) -> None:
    edge = Writer(books.journal, "a")
    whole = records.encode(generation())
    edge.append(generation())
    edge.write(whole[:50])
    assert not await books.keeper().read_all()
    assert books.rows("SELECT COUNT(*) FROM generations") == [(1,)]
    edge.write(whole[50:] + whole[:20])
    keeper = books.keeper()
    assert not await keeper.read_all()
    assert books.rows("SELECT COUNT(*) FROM generations") == [(2,)]
    name, size = edge.name, edge.path.stat().st_size
    books.joined.add("a")
    edge.die()
    assert not await keeper.read_all()  # its link says that it lives
    books.joined.clear()
    assert await keeper.read_all()
    [cut] = [line for line in books.logged() if line["event"] == "journal_cut"]
    assert (cut["bytes"], cut["unreadable"], cut["level"]) == (20, False, "warning")
    assert (books.journal / "corrupt" / f"{name}.{size - 20}").read_bytes() == whole[:20]
    assert [path.name for path in books.journal.iterdir()] == ["corrupt"]
    assert books.refused == []
    assert books.rows("SELECT * FROM journal_offsets") == []


@pytest.mark.parametrize("garbage", [b"\0" * 100, b"\xff" * 100, b"x" * 3_000_000])
async def test_an_unreadable_end_waits_for_its_writer_and_is_kept(books: Books, garbage: bytes) -> None:
    edge = Writer(books.journal, "a")
    edge.append(generation())
    start = edge.path.stat().st_size
    edge.write(garbage)
    keeper = books.keeper()
    assert not await keeper.read_all()
    edge.die()
    assert await keeper.read_all()
    assert books.rows("SELECT COUNT(*) FROM generations") == [(1,)]
    assert (books.journal / "corrupt" / f"{edge.name}.{start}").read_bytes() == garbage
    assert books.refused == ["unreadable"]
    assert not edge.path.exists()


async def test_files_are_removed_once_read_and_followed_and_the_last_with_its_writer(books: Books) -> None:
    edge = Writer(books.journal, "a")
    for _ in range(3):
        edge.append(generation(), generation())
        edge.rotate()
    assert len(list(books.journal.iterdir())) == 4
    keeper = books.keeper()
    assert await keeper.read_all()
    assert [path.name for path in books.journal.iterdir()] == [edge.name]  # its own, though empty
    assert books.rows("SELECT COUNT(*) FROM generations") == [(6,)]
    edge.append(generation())
    await keeper.read_all()
    edge.die()
    assert books.released == []
    await keeper.read_all()
    assert books.released == ["a"]
    assert books.rows("SELECT * FROM leases") == []
    assert list(books.journal.iterdir()) == []


async def test_a_dead_edge_is_read_to_its_end_before_its_leases_come_back(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bookkeeper_module, "BATCH_RECORDS", 10)
    edge = Writer(books.journal, "a")
    for _ in range(3):
        edge.append(*(generation() for _ in range(25)))
        edge.rotate()
    edge.append(*(generation() for _ in range(25)))
    edge.die()
    keeper = books.keeper()
    while await keeper._pass():
        assert books.released == []
        assert edge.path.exists()
    assert books.released == ["a"]
    assert books.rows("SELECT COUNT(*) FROM generations") == [(100,)]
    assert list(books.journal.iterdir()) == []


async def test_a_newborn_file_is_not_asked_for_its_lock(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    edge = Writer(books.journal, "a")
    edge.die()  # as if it had not come to lock it yet
    keeper = books.keeper()
    assert await keeper.read_all()
    assert edge.path.exists()
    monkeypatch.setattr(journals, "NEWBORN_S", 0.0)  # a second later nobody will
    assert await keeper.read_all()
    assert not edge.path.exists()


async def test_strange_files_are_left_alone(books: Books) -> None:
    books.journal.mkdir()
    for name in ("edge-0-a.1.bak", "edge-x-a.1", "notes", "edge-0-a"):
        (books.journal / name).write_bytes(b"mine")
    assert await books.keeper().read_all()
    assert len(list(books.journal.iterdir())) == 4


async def test_edges_take_turns_and_a_large_backlog_is_read_in_batches(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bookkeeper_module, "BATCH_BYTES", 1 << 20)
    sizes: list[list[int]] = []
    apply_journal = books.store.apply_journal

    async def watched(slices: Any) -> Any:
        sizes.append([len(piece.records) for piece in slices])
        assert sum(piece.end - piece.start for piece in slices) <= bookkeeper_module.BATCH_BYTES + records.RECORD_BYTES_MAX
        return await apply_journal(slices)

    monkeypatch.setattr(books.store, "apply_journal", watched)
    busy, quiet = Writer(books.journal, "busy"), Writer(books.journal, "quiet")
    busy.append(*(generation() for _ in range(6000)))
    quiet.append(*(generation(account="user_bob") for _ in range(5)))
    big = generation(title="x" * 900_000)  # more than one edge's share of a batch
    quiet.append(big)
    keeper = books.keeper()
    assert await keeper.read_all()
    assert keeper.pending_records == 0
    assert books.rows("SELECT COUNT(*) FROM generations") == [(6006,)]
    assert all(sum(batch) <= bookkeeper_module.BATCH_RECORDS for batch in sizes)
    assert sizes[0] in ([1000, 5], [5, 1000])  # an equal share, of which the quiet one needs little


async def test_led_08_a_locked_database_delays_and_loses_nothing(books: Books) -> None:
    await books.store._writer.execute("PRAGMA busy_timeout = 50")
    edge = Writer(books.journal, "a")
    books.joined.add("a")
    keeper = books.keeper()
    await keeper.load()
    running = asyncio.create_task(keeper.run())
    loop = asyncio.get_running_loop()
    outages, recovered_s = 0, 9.0
    with contextlib.closing(sqlite3.connect(books.database, isolation_level=None)) as foreign:
        while outages < 3 and recovered_s > 2:  # the machine may pause at the moment of the release
            balance = await books.store.balance("user_ann")
            foreign.execute("BEGIN IMMEDIATE")
            locked_s = loop.time()
            while loop.time() - locked_s < 2:
                edge.append(*(generation() for _ in range(20)))
                keeper.journaled("a")
                await asyncio.sleep(0.05)
            assert not await keeper.drained(0.2)
            assert keeper.pending_records >= 200 and keeper.oldest_s > 1
            assert await books.store.balance("user_ann") == balance
            foreign.execute("ROLLBACK")
            released_s = loop.time()
            assert await keeper.drained(20)
            outages, recovered_s = outages + 1, loop.time() - released_s
    assert recovered_s <= 2
    running.cancel()
    count, charged = books.rows("SELECT COUNT(*), SUM(charged_nanos) FROM generations")[0]
    assert charged == count * 10 == 10 * USD - await books.store.balance("user_ann") == keeper.revenue_nanos
    assert keeper.pending_records == 0 and keeper.oldest_s == 0
    assert edge.path.stat().st_size == books.committed[-1][1].offset
    failures = [line for line in books.logged() if line["event"] == "bookkeeping_failed"]
    assert len(failures) == outages
    assert all("(SQLITE_BUSY)" in line["reason"] for line in failures)


async def test_a_commit_that_only_seemed_to_fail_counts_once(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    apply_journal = books.store.apply_journal
    failures = 2

    async def unlucky(slices: Any) -> Any:
        nonlocal failures
        applied = await apply_journal(slices)
        if failures:
            failures -= 1
            raise StoreUnavailable("did it?")
        return applied

    monkeypatch.setattr(books.store, "apply_journal", unlucky)
    edge = Writer(books.journal, "a")
    edge.append(*(generation() for _ in range(10)))
    keeper = books.keeper()
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await keeper.read_all()
        edge.append(generation())
    assert await keeper.read_all()
    assert books.rows("SELECT COUNT(*), SUM(charged_nanos) FROM generations") == [(12, 120)]
    assert keeper.revenue_nanos == 120


async def test_whoever_asks_is_told_how_far_it_is_committed(books: Books) -> None:
    edge = Writer(books.journal, "a")
    books.joined.add("a")
    edge.append(generation())
    keeper = books.keeper()
    await keeper.read_all()
    books.committed.clear()
    keeper.journaled("a")
    await keeper.read_all()
    assert books.committed == [("a", Committed(file=edge.name, offset=edge.path.stat().st_size))]
    keeper.journaled("stranger")
    await keeper.read_all()
    assert len(books.committed) == 1


async def test_drained_waits_for_what_was_there_and_not_for_what_comes(books: Books) -> None:
    edge = Writer(books.journal, "a")
    keeper = books.keeper()
    running = asyncio.create_task(keeper.run())
    for _ in range(6):
        edge.append(*(generation() for _ in range(50)))
        assert await keeper.drained()
    assert books.rows("SELECT COUNT(*) FROM generations") == [(300,)]
    edge.write(b"\0\0")
    assert not await keeper.drained(0.3)
    edge.die()
    assert await keeper.drained()
    running.cancel()


async def test_leases_of_edges_that_died_without_a_file_come_back(books: Books) -> None:
    alive = Writer(books.journal, "alive")
    await _lease(books, "earlier", "alive")
    keeper = books.keeper()
    await keeper.read_all()
    assert books.released == ["earlier"]  # it died before this control came
    books.joined.add("young")
    await _lease(books, "young", "other")
    keeper.reaped("young")
    await keeper.read_all()
    assert books.released == ["earlier"]  # dead, but its last words are still being read
    books.joined.clear()
    await keeper.read_all()
    assert books.released == ["earlier", "young"]
    keeper.reaped("nobody")
    await keeper.read_all()
    assert {holder for (holder,) in books.rows("SELECT DISTINCT incarnation FROM leases")} == {"alive", "other"}
    alive.die()


async def _lease(books: Books, *incarnations: str) -> None:
    async with books.store.leasing() as book:
        await book.write(LeaseRow("balance:user_ann", incarnation, 5) for incarnation in incarnations)


async def test_a_folder_that_cannot_be_read_is_an_unavailable_store(books: Books) -> None:
    books.journal.write_bytes(b"a file")
    with pytest.raises(StoreUnavailable, match="journal"):
        await books.keeper().read_all()
    books.journal.unlink()
