"""Journal files into the ledger, on real files and a real store."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import sqlite3
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.control import bookkeeper as bookkeeper_module
from gateway.control import journals
from gateway.control.bookkeeper import Bookkeeper
from gateway.control.leases import releaser
from gateway.control.store import Account, Credits, JournalSlice, Key, KeyUsage, LeaseRow
from gateway.control.store.sqlite import SqliteStore
from gateway.domain.errors import StoreUnavailable
from gateway.domain.generation import Generation
from gateway.domain.money import AMOUNT_NANOS_MAX
from gateway.link.messages import Committed
from gateway.log import Log
from gateway.wire import records
from tests.control.journaling import NOON_MS, Writer, generation, rows

USD = 1_000_000_000


class Books:
    """A store with two accounts, a folder of journals, and bookkeepers on them."""

    def __init__(self, folder: Path, store: SqliteStore) -> None:
        self.database = folder / "gateway.db"
        self.journal = folder / "journal"
        self.store = store
        self.joined: set[str] = set()
        self.committed: list[tuple[str, Committed]] = []
        self.refused: list[str] = []
        self.released: list[str] = []
        reader, self._log_fd = os.pipe()
        os.set_blocking(reader, False)
        self._log_reader = io.FileIO(reader)

    def keeper(self) -> Bookkeeper:
        """As a control that has just started."""
        give_back = releaser(self.store)

        async def release(incarnation: str) -> None:
            await give_back(incarnation)
            self.released.append(incarnation)

        return Bookkeeper(
            store=self.store,
            folder=self.journal,
            release=release,
            is_joined=self.joined.__contains__,
            on_committed=lambda incarnation, committed: self.committed.append((incarnation, committed)),
            on_refused=self.refused.append,
            log=Log("test", fd=self._log_fd),
        )

    def logged(self) -> list[dict[str, Any]]:
        """Log lines since the last look."""
        return [json.loads(line) for line in (self._log_reader.read(1 << 20) or b"").splitlines()]

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        return rows(self.database, sql)

    async def close(self) -> None:
        await self.store.close()
        self._log_reader.close()
        os.close(self._log_fd)


@pytest.fixture
async def books(tmp_path: Path) -> AsyncIterator[Books]:
    store = await SqliteStore.open(tmp_path / "gateway.db")
    for name in ("ann", "bob"):
        key = Key(digest=f"digest-{name[0]}", account_id=f"user_{name}", name=name, label="x", created_at_ms=1)
        await store.create_account(Account(id=f"user_{name}", email=name, created_at_ms=1), [key], topup_nanos=10 * USD)
    books = Books(tmp_path, store)
    yield books
    assert (await store.verify_ledger()).ok
    await books.close()


async def test_a_record_becomes_a_generation_entries_a_balance_and_roll_ups(books: Books) -> None:
    edge = Writer(books.journal, "a")
    books.joined.add("a")
    first, free = generation(nanos=USD), generation(nanos=0, model="acme/tiny:free", settles=("balance:user_ann",))
    edge.append(first, free)
    assert await books.keeper().read_all()
    assert await books.store.generation(first.id) == first
    assert await books.store.generation("gen-none") is None
    assert await books.store.balance("user_ann") == 9 * USD
    assert await books.store.revenue() == USD
    assert await books.store.credits("user_ann") == Credits(total_nanos=10 * USD, purchased_nanos=10 * USD, used_nanos=USD)
    assert books.rows("SELECT book, amount_nanos FROM entries WHERE transaction_id LIKE 'gen-%' ORDER BY 1") == [
        ("gateway:revenue", USD),
        ("user_ann", -USD),
    ]
    columns = "day, model, requests, served, prompt_tokens, completion_tokens, reasoning_tokens, cached_tokens, nanos"
    assert books.rows(f"SELECT {columns} FROM usage_daily ORDER BY model") == [
        ("2025-11-25", "acme/sage-1", 1, 1, 7, 5, 1, 2, USD),
        ("2025-11-25", "acme/tiny:free", 1, 1, 7, 5, 1, 2, 0),
    ]
    assert books.rows("SELECT resource, incarnation, granted_nanos, settled_nanos FROM leases") == [("balance:user_ann", "a", 0, USD)]
    assert books.committed == [("a", Committed(file=edge.name, offset=edge.path.stat().st_size))]
    report = await books.store.verify_ledger()
    assert (report.ok, report.generations) == (True, 2)


async def test_key_usage_is_of_utc_days_weeks_from_monday_and_months(books: Books) -> None:
    day = 86_400_000
    edge = Writer(books.journal, "a")
    ages = {0: 1, 1: 10, 2: 100, 20: 1000, 30: 10_000}  # days before Tuesday the 25th -> nanos
    edge.append(*(generation(nanos=nanos, created_at_ms=NOON_MS - days * day) for days, nanos in ages.items()))
    await books.keeper().read_all()
    usage = await books.store.key_usage("digest-a", NOON_MS / 1000)
    assert usage == KeyUsage(total_nanos=11_111, daily_nanos=1, weekly_nanos=11, monthly_nanos=1111)
    assert await books.store.key_usage("digest-none", NOON_MS / 1000) == KeyUsage()


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


async def test_a_slice_that_does_not_begin_where_the_file_was_left_is_refused(books: Books) -> None:
    piece = JournalSlice("edge-0-a.1", "a", 0, 100, (generation(),))
    assert (await books.store.apply_journal([piece])).generations == 1
    for start in (0, 50, 101):
        with pytest.raises(StoreUnavailable):
            await books.store.apply_journal([msgspec.structs.replace(piece, start=start, end=start + 100, generations=(generation(),))])
    assert books.rows("SELECT COUNT(*) FROM generations") == [(1,)]


@pytest.mark.parametrize("apart", [False, True])
async def test_led_05_a_generation_settled_again_charges_once_and_another_amount_is_refused(books: Books, apart: bool) -> None:
    first = generation(nanos=10)
    other = msgspec.structs.replace(first, charged_nanos=11)
    edges = [Writer(books.journal, name, slot) for slot, name in enumerate("abcd")]
    for edge in edges:
        edge.append(first, first)
        if apart:
            await books.keeper().read_all()
    edges[3].append(other, generation(nanos=1))
    await books.keeper().read_all()
    assert books.rows("SELECT amount_nanos FROM entries WHERE book = 'user_ann' AND amount_nanos < 0 ORDER BY 1") == [(-10,), (-1,)]
    assert books.refused == ["conflict"]
    assert books.rows("SELECT reason, generation_id FROM refused_records") == [("conflict", first.id)]
    assert await books.store.generation(first.id) == first
    assert sum(settled for (settled,) in books.rows("SELECT settled_nanos FROM leases")) == 11


async def test_a_bad_record_is_set_aside_and_keeps_nobody_back(books: Books) -> None:
    edge = Writer(books.journal, "a")
    damaged = bytearray(records.encode(generation()))
    damaged[-1] ^= 1
    misshapen = msgspec.msgpack.encode({"id": 5})
    bad = [
        generation(account="user_none"),
        generation(nanos=AMOUNT_NANOS_MAX + 1),
        generation(nanos=-1),
        generation(nanos=2**63),
        generation(created_at_ms=2**62),
        generation(usage=msgspec.structs.replace(_usage(), prompt_tokens=2**63)),
        generation(settles=("x",) * 100),
        generation(nanos=AMOUNT_NANOS_MAX),  # in range, and once more would not be
        generation(nanos=AMOUNT_NANOS_MAX),
    ]
    for each in bad:
        edge.append(generation(), each)
    edge.write(bytes(damaged))
    edge.write(records.HEADER.pack(len(misshapen), zlib.crc32(misshapen)) + misshapen)
    edge.append(generation())
    assert await books.keeper().read_all()
    reasons = [reason for (reason,) in books.rows("SELECT reason FROM refused_records ORDER BY id")]
    assert sorted(reasons) == sorted(["corrupt"] * 2 + ["unknown_account"] + ["out_of_range"] * 7)
    assert sorted(books.refused) == sorted(reasons)
    assert books.rows("SELECT COUNT(*) FROM generations WHERE charged_nanos = 10") == [(10,)]
    kept = books.rows("SELECT record FROM refused_records WHERE reason = 'unknown_account'")[0][0]
    assert msgspec.msgpack.decode(kept, type=Generation) == bad[0]
    assert sum(line["event"] == "record_refused" for line in books.logged()) == bookkeeper_module.REFUSED_LOGGED_MAX


def _usage() -> Any:
    return generation().usage


async def test_a_record_that_the_database_refuses_does_not_take_its_batch_along(books: Books) -> None:
    poison = generation(nanos=3)
    with contextlib.closing(sqlite3.connect(books.database)) as db:
        db.execute(
            f"CREATE TRIGGER poison BEFORE INSERT ON entries WHEN new.transaction_id = '{poison.id}' BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
        db.commit()
    edge = Writer(books.journal, "a")
    edge.append(*(generation() for _ in range(3)), poison, *(generation() for _ in range(3)))
    assert await books.keeper().read_all()
    assert books.rows("SELECT COUNT(*) FROM generations") == [(6,)]
    assert books.rows("SELECT reason, generation_id FROM refused_records") == [("invalid", poison.id)]
    assert books.rows("SELECT settled_nanos FROM leases") == [(60,)]


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
    sizes: list[list[int]] = []
    apply_journal = books.store.apply_journal

    async def watched(slices: Any) -> Any:
        sizes.append([len(piece.generations) for piece in slices])
        assert sum(piece.end - piece.start for piece in slices) <= bookkeeper_module.BATCH_BYTES + records.RECORD_BYTES_MAX
        return await apply_journal(slices)

    monkeypatch.setattr(books.store, "apply_journal", watched)
    busy, quiet = Writer(books.journal, "busy"), Writer(books.journal, "quiet")
    busy.append(*(generation() for _ in range(3000)))
    quiet.append(*(generation(account="user_bob") for _ in range(5)))
    big = generation(title="x" * 900_000)  # more than one edge's share of a batch
    quiet.append(big)
    keeper = books.keeper()
    assert await keeper.read_all()
    assert keeper.pending_records == 0
    assert books.rows("SELECT COUNT(*) FROM generations") == [(3006,)]
    assert all(sum(batch) <= bookkeeper_module.BATCH_RECORDS for batch in sizes)
    assert all(5 in batch or 500 in batch for batch in sizes[:1])


async def test_led_08_a_locked_database_delays_and_loses_nothing(books: Books) -> None:
    await books.store._writer.execute("PRAGMA busy_timeout = 50")
    edge = Writer(books.journal, "a")
    books.joined.add("a")
    keeper = books.keeper()
    await keeper.load()
    running = asyncio.create_task(keeper.run())
    loop = asyncio.get_running_loop()
    with contextlib.closing(sqlite3.connect(books.database, isolation_level=None)) as foreign:
        foreign.execute("BEGIN IMMEDIATE")
        locked_s = loop.time()
        while loop.time() - locked_s < 2:
            edge.append(*(generation() for _ in range(20)))
            keeper.journaled("a")
            await asyncio.sleep(0.05)
        assert not await keeper.drained(0.2)
        assert keeper.pending_records >= 400 and keeper.oldest_s > 1
        assert await books.store.balance("user_ann") == 10 * USD
        foreign.execute("ROLLBACK")
    released_s = loop.time()
    assert await keeper.drained(5)
    assert loop.time() - released_s < 2
    running.cancel()
    count, charged = books.rows("SELECT COUNT(*), SUM(charged_nanos) FROM generations")[0]
    assert charged == count * 10 == 10 * USD - await books.store.balance("user_ann") == keeper.revenue_nanos
    assert keeper.pending_records == 0 and keeper.oldest_s == 0
    assert edge.path.stat().st_size == books.committed[-1][1].offset
    failures = [line for line in books.logged() if line["event"] == "bookkeeping_failed"]
    assert len(failures) == 1  # one line an outage


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
    for _ in range(20):
        edge.append(*(generation() for _ in range(50)))
        assert await keeper.drained()
    assert books.rows("SELECT COUNT(*) FROM generations") == [(1000,)]
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


@pytest.mark.parametrize(
    ("tampering", "named"),
    [
        ("UPDATE generations SET charged_nanos = charged_nanos + 1", "user_ann"),
        ("DELETE FROM generations", "user_ann"),
        ("UPDATE credits SET used_nanos = used_nanos - 1", "user_ann"),
        ("UPDATE balances SET nanos = nanos + 1 WHERE book = 'gateway:revenue'", "gateway:revenue"),
    ],
)
async def test_led_13_tampering_with_what_was_charged_shows(books: Books, tampering: str, named: str) -> None:
    Writer(books.journal, "a").append(generation())
    await books.keeper().read_all()
    with contextlib.closing(sqlite3.connect(books.database)) as db:
        before = db.total_changes
        undo = list(db.iterdump())
        db.execute(tampering)
        db.commit()
        assert db.total_changes > before
    report = await books.store.verify_ledger()
    assert report.ok is False and report.difference_nanos > 0
    assert any(problem.startswith(named) for problem in report.problems)
    with contextlib.closing(sqlite3.connect(books.database)) as db:  # put right again
        for table in ("generations", "credits", "balances"):
            db.execute(f"DELETE FROM {table}")
            for line in undo:
                if line.startswith(f'INSERT INTO "{table}"'):
                    db.execute(line)
        db.commit()
