"""Generations go when their time is over, and neither the money nor what people are shown of it changes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.control import removal as removal_module
from gateway.control.chores import DAY_MS
from gateway.control.erasure import Erasure
from gateway.control.removal import Removal
from gateway.control.store.sqlite import verification
from gateway.domain.errors import StoreUnavailable
from gateway.domain.generation import Generation
from gateway.log import Log
from tests.control.api.premises import DAY, NOW, Premises, spent
from tests.control.api.premises import opened as opened_premises
from tests.control.books import Books
from tests.control.journaling import Writer, generation, move_back, rows

DAYS = 30
_edges = itertools.count()
COUNT = "SELECT COUNT(*) FROM generations"
GONE = "SELECT generations, nanos FROM retention"
SUMS = (
    "SELECT * FROM balances ORDER BY 1", "SELECT * FROM credits ORDER BY 1", "SELECT * FROM usage_daily ORDER BY 1, 2, 3, 4",
    "SELECT * FROM activity_daily ORDER BY 1, 2, 3", "SELECT * FROM key_totals ORDER BY 1", "SELECT * FROM entries ORDER BY 1",
)  # fmt: skip


async def _yes() -> bool:
    return True


def _removal(books: Books, days: int = DAYS, drained: Callable[[], Awaitable[bool]] = _yes, **more: Any) -> Removal:
    return Removal(store=books.store, days=days, drained=drained, log=Log("test", fd=books.log_fd), **more)


def now_ms() -> int:
    return int(time.time() * 1000)


async def _posted(books: Books, days_ago: float, *generations: Generation) -> Writer:
    """So long ago, in a file of their own."""
    (last,) = books.rows("SELECT MAX(number) FROM transactions")[0]
    edge = Writer(books.journal, f"e{next(_edges)}")
    edge.append(*generations)
    await books.keeper().read_all()
    edge.die()
    move_back(books.database, int(days_ago * DAY_MS), f"number > {last}")
    return edge


def _then(days_ago: float, nanos: int = 10, account: str = "user_ann", **more: Any) -> Generation:
    return generation(account, nanos, created_at_ms=now_ms() - int(days_ago * DAY_MS), **more)


async def test_what_is_old_enough_goes_and_no_balance_and_no_sum_changes(books: Books) -> None:
    old = [_then(31, 7), _then(31, 0), _then(32, 5, account="user_bob")]
    await _posted(books, 31, *old)
    await _posted(books, 29, young := _then(29, 3))
    before = {sql: books.rows(sql) for sql in SUMS}
    told: list[int] = []
    assert await _removal(books, days=0).look() == 0  # 0: for ever
    assert await _removal(books, on_removed=told.append).look() == 3
    assert await _removal(books, on_removed=told.append).look() == 0
    assert sum(told) == 3
    assert [await books.store.generation(each.id) for each in (*old, young)] == [None, None, None, young]
    assert {sql: books.rows(sql) for sql in SUMS} == before
    report = await books.store.verify_ledger()
    assert (report.ok, report.generations, report.removed, report.difference_nanos) == (True, 1, 3, 0)
    assert [line["count"] for line in books.logged() if line["event"] == "generations_removed"] == [3]


async def test_time_counts_from_when_a_generation_was_posted(books: Books) -> None:
    await _posted(books, 1, _then(40))  # of an edge whose journal was read late
    assert await _removal(books).look() == 0
    await _posted(books, 31, _then(31))
    assert await _removal(books).look() == 0  # the young one comes first
    later = time.time() + (DAYS - 1) * 86_400 - 60
    assert await _removal(books, clock=lambda: later).look() == 0
    later += 120
    assert await _removal(books, clock=lambda: later).look() == 2


async def test_the_ledger_agrees_after_every_chunk_wherever_it_ends(books: Books) -> None:
    for batch in range(3):
        accounts = ("user_ann", "user_bob", "user_ann", "user_ann", "user_bob")
        await _posted(books, 40, *(_then(40, 10 + place, account=account) for place, account in enumerate(accounts)))
        if batch == 1:
            await books.store.add_credits("user_ann", 5, note="between")
    left = 15
    for limit in (1, 2, 4, 1, 3, 100):
        removed = await books.store.remove_generations(before_ms=now_ms() - DAYS * DAY_MS, limit=limit)
        left -= removed
        report = await books.store.verify_ledger()
        assert (removed, report.ok, report.generations, report.removed) == (min(limit, left + removed), True, left, 15 - left)
    assert left == 0
    assert books.rows(GONE) == [(15, 3 * (10 + 11 + 12 + 13 + 14))]


@pytest.mark.parametrize(
    ("tampering", "named"),
    [
        ("UPDATE retention SET nanos = nanos - 1", "usage entries"),
        ("UPDATE retention SET entry_nanos = entry_nanos + 1", "user_ann"),
        ("UPDATE retention SET number = number + 1", "user_ann"),
        ("DELETE FROM generations", "user_ann"),
        ("UPDATE generations SET charged_nanos = 9", "user_ann"),
        ("INSERT INTO generations SELECT number - 1, 'again', 1, record FROM generations LIMIT 1", "user_ann"),
        ("UPDATE usage_daily SET nanos = nanos - 1 WHERE account_id = 'user_bob'", "user_bob"),
        ("UPDATE activity_daily SET nanos = nanos - 1 WHERE account_id = 'user_bob'", "user_bob"),
        ("UPDATE key_totals SET nanos = nanos - 1", "key digest-a"),
        ("UPDATE credits SET used_nanos = used_nanos - 1, total_nanos = total_nanos - 1 WHERE account_id = 'user_bob'", "user_bob"),
    ],
)
async def test_tampering_shows_also_in_what_is_left_of_removed_generations(books: Books, tampering: str, named: str) -> None:
    await _posted(books, 40, _then(40, 5, account="user_bob"))
    await _posted(books, 40, _then(40, 7), _then(40, 8))
    assert await books.store.remove_generations(before_ms=now_ms() - DAYS * DAY_MS, limit=2) == 2
    assert (await books.store.verify_ledger()).ok
    copy = books.database.with_name("copy.db")
    with contextlib.closing(sqlite3.connect(books.database)) as db, contextlib.closing(sqlite3.connect(copy)) as other:
        db.backup(other)
    with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as db:
        assert verification.verify(db).ok
        assert db.execute(tampering).rowcount > 0
        report = verification.verify(db)
    assert report.ok is False and report.difference_nanos > 0
    assert any(problem.startswith(named) for problem in report.problems), report.problems


async def test_a_removed_generation_that_comes_again_is_set_aside_and_not_charged_twice(books: Books) -> None:
    edge = await _posted(books, 31, _then(31.5, 7), _then(31.5, 8))
    folder = books.journal.with_name("restored")
    shutil.copytree(books.journal, folder)
    young = await _posted(books, 2, _then(2, 9))
    assert await _removal(books).look() == 2
    balances = books.rows("SELECT * FROM balances ORDER BY 1")
    await books.store.forget_journals([edge.name])
    await books.keeper().read_all()  # the files are read, and gone
    assert not list(books.journal.iterdir())
    shutil.copytree(folder, books.journal, dirs_exist_ok=True)  # an operator brings an old journal back
    late = _then(3, 11)  # and an edge, late, what nobody has posted yet
    Writer(books.journal, "c").append(late)
    await books.store.forget_journals([young.name])
    assert await books.keeper().read_all()
    assert sorted(books.rows("SELECT reason, COUNT(*) FROM refused_records GROUP BY 1")) == [("too_old", 2)]
    assert books.refused == ["too_old", "too_old"]
    assert books.rows(COUNT) == [(2,)]
    assert [book for book, nanos in books.rows("SELECT * FROM balances ORDER BY 1") if (book, nanos) not in balances] == [
        "gateway:revenue",
        "user_ann",
    ]
    assert books.rows("SELECT used_nanos FROM credits WHERE account_id = 'user_ann'") == [(7 + 8 + 9 + 11,)]


async def test_a_clock_that_was_a_year_ahead_costs_old_records_and_no_charge(books: Books) -> None:
    await _posted(books, 0, _then(0))
    ahead = time.time() + 365 * 86_400
    assert await _removal(books, clock=lambda: ahead).look() == 1
    await _posted(books, 0, later := _then(0, 4))
    assert await books.store.generation(later.id) == later
    assert books.rows("SELECT COUNT(*) FROM refused_records") == [(0,)]


async def test_nothing_is_removed_while_a_journal_holds_what_is_not_posted(books: Books) -> None:
    await _posted(books, 40, _then(40))
    waiting = Writer(books.journal, "late")
    waiting.append(_then(35, 4))  # control was away for as long as that
    keeper = books.keeper()
    await keeper.load()
    removal = _removal(books, drained=lambda: keeper.drained(0.05))
    with pytest.raises(StoreUnavailable, match="journal"):
        await removal.look()
    assert books.rows(COUNT) == [(1,)]
    running = asyncio.create_task(keeper.run())
    try:
        removal = _removal(books, drained=keeper.drained)
        assert await removal.look() == 1
    finally:
        running.cancel()
    assert books.rows("SELECT charged_nanos FROM generations") == [(4,)]  # posted, and posted lately
    assert books.refused == []


async def test_what_is_removed_makes_room_for_what_comes(books: Books) -> None:
    async def post() -> None:
        await _posted(books, 40, *(_then(1, title="x" * 300) for _ in range(4000)))

    def pages(name: str) -> int:
        return int(books.rows(f"PRAGMA {name}")[0][0])

    await post()
    full = pages("page_count")
    for _ in range(3):
        assert await _removal(books).look() == 4000
        assert pages("freelist_count") > full // 2
        await post()
        assert pages("page_count") < full * 1.1


async def test_charges_are_posted_while_others_are_removed(books: Books) -> None:
    await _posted(books, 40, *(_then(40) for _ in range(5000)))
    edge = Writer(books.journal, "b")
    keeper = books.keeper()
    await keeper.load()
    posted: list[int] = []

    def on_removed(count: int) -> None:
        edge.append(_then(0, 3))
        keeper.wake()
        posted.append(books.rows(f"{COUNT} WHERE charged_nanos = 3")[0][0])

    running = asyncio.create_task(keeper.run())
    try:
        assert await _removal(books, on_removed=on_removed, drained=keeper.drained).look() == 5000
        assert await keeper.drained()
    finally:
        running.cancel()
    assert posted[-1] > 0  # before the last of them was gone
    assert books.rows("SELECT COUNT(*), SUM(charged_nanos) FROM generations") == [(len(posted), 3 * len(posted))]


async def test_a_removal_that_is_stopped_goes_on_where_it_was(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal_module, "CHUNK", 100)
    await _posted(books, 40, *(_then(40) for _ in range(1000)))
    begun = asyncio.Event()
    looking = asyncio.create_task(_removal(books, on_removed=lambda count: begun.set()).look())
    await begun.wait()
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking
    [(gone, _)] = books.rows(GONE)
    assert 0 < gone < 1000
    assert books.rows(COUNT) == [(1000 - gone,)]
    assert (await books.store.verify_ledger()).ok
    assert await _removal(books).look() == 1000 - gone


async def test_a_deleted_account_is_erased_past_what_was_removed(books: Books) -> None:
    await _posted(books, 40, *(_then(40, external_user="hush") for _ in range(6)))
    await _posted(books, 1, *(_then(1, external_user="hush") for _ in range(6)))
    await books.store.delete_account("user_ann", now_s=0, erase_until_s=0)
    after = await books.store.erase_generations("user_ann", "", 2)
    assert after
    assert await _removal(books).look() == 6  # the one that it had come to is among them
    assert await books.store.erase_generations("user_ann", after, 4)

    async def nothing(account_id: str) -> int:
        return 0

    assert await Erasure(store=books.store, erase_content=nothing, log=Log("test", fd=books.log_fd)).work() is None
    with contextlib.closing(sqlite3.connect(books.database)) as db:
        assert b"hush".hex().upper() not in "\n".join(db.iterdump())


async def test_callers_see_the_same_sums_and_no_record(tmp_path: Path) -> None:
    async with opened_premises(tmp_path) as premises:
        await _check_api(premises, tmp_path / "gateway.db")


async def _check_api(premises: Premises, database: Path) -> None:
    await premises.journal(*(spent(premises.ada, number, NOW - number * DAY) for number in range(9)))
    asked = (
        ("/api/v1/activity", premises.ada_management), ("/api/v1/credits", premises.ada), ("/api/v1/key", premises.ada),
        ("/api/v1/keys", premises.ada_management), ("/api/v1/activity?date=2026-11-20", premises.ada_management),
    )  # fmt: skip
    before = [await premises.ask("GET", path, secret) for path, secret in asked]
    ids = [f"gen-1764031697-{number:020}" for number in range(9)]
    for each in ids:
        await premises.ask("GET", f"/api/v1/generation?id={each}", premises.ada)
    move_back(database, 31 * DAY_MS)
    removal = Removal(store=premises.store, days=DAYS, drained=_yes, log=Log("test", fd=-1))
    assert await removal.look() == 9
    unknown = await premises.ask("GET", "/api/v1/generation?id=gen-0-x", premises.ada, 404)
    for each in ids:
        assert await premises.ask("GET", f"/api/v1/generation?id={each}", premises.ada, 404) == unknown
    assert [await premises.ask("GET", path, secret) for path, secret in asked] == before
    assert rows(database, COUNT) == [(0,)]
