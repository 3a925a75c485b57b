"""What journal records come to in the books: once each, whole, and without those at fault."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import zlib
from typing import Any

import msgspec
import pytest

from gateway.control import bookkeeper as bookkeeper_module
from gateway.control.store import Credits, JournalSlice, KeyUsage
from gateway.domain.errors import StoreUnavailable
from gateway.domain.generation import decode
from gateway.domain.money import AMOUNT_NANOS_MAX
from gateway.link.messages import Committed
from gateway.wire import records
from tests.control.books import USD, Books
from tests.control.journaling import NOON_MS, Writer, generation

USAGE_ENTRIES = "FROM entries e JOIN transactions t ON t.number = e.transaction_number WHERE t.kind = 'usage'"


def encoded() -> bytes:
    return msgspec.msgpack.encode(generation())


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
    assert books.rows(f"SELECT e.book, e.amount_nanos {USAGE_ENTRIES} ORDER BY 1") == [
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


async def test_a_slice_that_does_not_begin_where_the_file_was_left_is_refused(books: Books) -> None:
    piece = JournalSlice("edge-0-a.1", "a", 0, 100, (encoded(),))
    assert (await books.store.apply_journal([piece])).generations == 1
    for start in (0, 50, 101):
        with pytest.raises(StoreUnavailable):
            await books.store.apply_journal([msgspec.structs.replace(piece, start=start, end=start + 100, records=(encoded(),))])
    assert books.rows("SELECT COUNT(*) FROM generations") == [(1,)]


async def test_each_entry_charges_its_own_generations(books: Books) -> None:
    """What one entry took too much is not made up for by what another took too little."""
    edge = Writer(books.journal, "a")
    for _ in range(2):
        edge.append(generation(nanos=10), generation(nanos=0))
        await books.keeper().read_all()
    swap = "UPDATE generations SET charged_nanos = CASE charged_nanos WHEN 10 THEN {} ELSE charged_nanos END WHERE number >> 12 = {}"
    (first,), (second,) = books.rows("SELECT DISTINCT number >> 12 FROM generations ORDER BY 1")
    with contextlib.closing(sqlite3.connect(books.database)) as db:
        db.execute(swap.format(7, first))
        db.execute(swap.format(13, second))
        db.commit()
        report = await books.store.verify_ledger()
        assert (report.ok, report.difference_nanos) == (False, 6)
        assert [problem.partition(":")[0] for problem in report.problems] == ["user_ann", "user_ann"]
        db.execute("UPDATE generations SET charged_nanos = 10 WHERE charged_nanos > 0")
        db.commit()


async def test_a_batch_of_any_size_and_of_free_generations_alone_is_posted(books: Books) -> None:
    whole = [msgspec.msgpack.encode(generation(nanos=n % 3)) for n in range(10_000)]
    free = [msgspec.msgpack.encode(generation(account="user_bob", nanos=0)) for _ in range(3)]
    applied = await books.store.apply_journal([JournalSlice("edge-0-a.1", "a", 0, 1, whole + free)])
    assert (applied.generations, applied.charged_nanos) == (10_003, 9999)
    assert books.rows(f"SELECT COUNT(*), SUM(e.amount_nanos) {USAGE_ENTRIES} AND e.book = 'user_ann'") == [(3, -9999)]
    applied = await books.store.apply_journal([JournalSlice("edge-0-a.1", "a", 1, 2, free)])
    assert (applied.generations, applied.exists) == (0, 3)
    assert books.rows("SELECT COUNT(*) FROM entries WHERE book = 'user_bob' AND amount_nanos = 0") == [(1,)]


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
    assert books.rows("SELECT charged_nanos FROM generations ORDER BY 1") == [(1,), (10,)]
    assert books.rows(f"SELECT SUM(e.amount_nanos) {USAGE_ENTRIES} AND e.book = 'user_ann'") == [(-11,)]
    assert books.refused == ["conflict"]
    assert books.rows("SELECT reason, generation_id FROM refused_records") == [("conflict", first.id)]
    assert await books.store.generation(first.id) == first
    assert sum(settled for (settled,) in books.rows("SELECT settled_nanos FROM leases")) == 11


async def test_a_cancelled_batch_is_whole_or_absent(books: Books) -> None:
    posted = 0
    for turns in range(20):  # cancelled at ever later steps
        piece = JournalSlice(f"edge-0-{turns}.1", str(turns), 0, 100, [encoded() for _ in range(50)])
        posting = asyncio.create_task(books.store.apply_journal([piece]))
        for _ in range(turns):
            await asyncio.sleep(0)
        posting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await posting
        whole = piece.file in await books.store.journal_offsets()
        if not whole:  # not yet, or never: the store alone knows, and says so to whoever tries again
            with contextlib.suppress(StoreUnavailable):
                assert (await books.store.apply_journal([piece])).generations == 50
        posted += 50
    assert books.rows("SELECT COUNT(*), SUM(charged_nanos) FROM generations") == [(posted, 10 * posted)]


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
    assert decode(kept) == bad[0]
    assert sum(line["event"] == "record_refused" for line in books.logged()) == bookkeeper_module.REFUSED_LOGGED_MAX


def _usage() -> Any:
    return generation().usage


async def test_a_record_that_the_database_refuses_does_not_take_its_batch_along(books: Books) -> None:
    poison = generation(nanos=3)
    with contextlib.closing(sqlite3.connect(books.database)) as db:
        db.execute(f"CREATE TRIGGER poison BEFORE INSERT ON generations WHEN new.id = '{poison.id}' BEGIN SELECT RAISE(ABORT, 'no'); END")
        db.commit()
    edge = Writer(books.journal, "a")
    edge.append(*(generation() for _ in range(3)), poison, *(generation() for _ in range(3)))
    assert await books.keeper().read_all()
    assert books.rows("SELECT COUNT(*) FROM generations") == [(6,)]
    assert books.rows("SELECT reason, generation_id FROM refused_records") == [("invalid", poison.id)]
    assert books.rows("SELECT settled_nanos FROM leases") == [(60,)]


@pytest.mark.parametrize(
    ("tampering", "named"),
    [
        ("UPDATE generations SET charged_nanos = charged_nanos + 1", "user_ann"),
        ("DELETE FROM generations", "user_ann"),
        ("UPDATE generations SET number = number + (1 << 20)", "user_ann"),
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
