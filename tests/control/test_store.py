"""The contract of a store, on real SQLite files."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import aiosqlite
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.control.store import FUNDING_BOOK, Account, Key, StoreLocked
from gateway.control.store import sqlite as sqlite_module
from gateway.control.store.migrations import Migration, migrate, read_migrations
from gateway.control.store.sqlite import SqliteStore
from gateway.domain.errors import BadRequest, Conflict, GatewayError, NotFound, StoreUnavailable
from gateway.domain.money import AMOUNT_NANOS_MAX


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    return tmp_path / "var" / "gateway.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteStore]:
    store = await SqliteStore.open(path)
    yield store
    await store.close()


def account(name: str) -> Account:
    return Account(id=f"user_{name}", email=f"{name}@example.com", created_at_ms=1)


def key(name: str, owner: str, **fields: object) -> Key:
    return Key(digest=f"digest-{name}", account_id=f"user_{owner}", name=name, label="sk-or-v1-abc...123", created_at_ms=1, **fields)  # type: ignore[arg-type]


def shell(path: Path, sql: str) -> list[tuple[object, ...]]:
    """What an operator does with the sqlite3 shell."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        rows = db.execute(sql).fetchall()
        db.commit()
    return rows


async def test_an_account_comes_with_its_keys_and_credit_in_one_transaction(store: SqliteStore, path: Path) -> None:
    await store.create_account(account("ann"), [key("a", "ann"), key("m", "ann", management=True)], topup_nanos=10_500_000_000)
    assert await store.balance("user_ann") == 10_500_000_000
    found = await store.find_keys(["digest-a", "digest-m", "digest-none"])
    assert {digest: record.management for digest, record in found.items()} == {"digest-a": False, "digest-m": True}
    assert await store.find_account("user_ann") == account("ann")
    assert [listed.name for listed in await store.list_keys("user_ann")] == ["a", "m"]
    assert shell(path, "SELECT book, nanos FROM balances ORDER BY book") == [(FUNDING_BOOK, -10_500_000_000), ("user_ann", 10_500_000_000)]


async def test_a_refused_account_leaves_nothing_behind(store: SqliteStore, path: Path) -> None:
    await store.create_account(account("ann"), [key("a", "ann")], topup_nanos=0)
    with pytest.raises(Conflict):
        await store.create_account(Account(id="user_x", email="ann@example.com", created_at_ms=1), [], topup_nanos=5)
    with pytest.raises(StoreUnavailable):  # its second key is a digest that exists
        await store.create_account(account("bob"), [key("b", "bob"), key("a", "bob")], topup_nanos=5)
    assert await store.find_account("user_bob") is None
    assert shell(path, "SELECT COUNT(*) FROM entries") == [(0,)]
    await store.create_account(account("bob"), [key("b", "bob")], topup_nanos=5)  # and the writer goes on


async def test_keys_need_an_account_and_a_limit_in_range(store: SqliteStore) -> None:
    with pytest.raises(NotFound):
        await store.create_key(key("a", "nobody"))
    await store.create_account(account("ann"), [], topup_nanos=0)
    for limit in (-1, AMOUNT_NANOS_MAX + 1, 2**63, 2**70):
        with pytest.raises(BadRequest):
            await store.create_key(key("a", "ann", limit_nanos=limit))
    await store.create_key(key("a", "ann", limit_nanos=AMOUNT_NANOS_MAX, limit_reset="daily"))
    assert (await store.list_keys("user_ann"))[0].limit_nanos == AMOUNT_NANOS_MAX


async def test_credits_add_up_under_concurrency(store: SqliteStore) -> None:
    await store.create_account(account("ann"), [], topup_nanos=1)
    await asyncio.gather(*(store.add_credits("user_ann", nanos, note="") for nanos in range(1, 51)))
    assert await store.balance("user_ann") == 1 + 1275
    report = await store.verify_ledger()
    assert (report.ok, report.accounts, report.difference_nanos) == (True, 1, 0)


async def test_amounts_out_of_range_are_refused_and_change_nothing(store: SqliteStore) -> None:
    await store.create_account(account("ann"), [], topup_nanos=AMOUNT_NANOS_MAX)
    await store.create_account(account("bob"), [], topup_nanos=AMOUNT_NANOS_MAX - 10)
    for nanos in (0, -1, 1, AMOUNT_NANOS_MAX, 2**63 - 1, 2**63, 2**64):
        with pytest.raises(BadRequest):
            await store.add_credits("user_ann", nanos, note="")
    await store.create_account(account("cat"), [], topup_nanos=1)  # the counter book has room for more than one full account
    with pytest.raises(BadRequest):
        await store.add_credits("user_cat", AMOUNT_NANOS_MAX - 1, note="")
    assert (await store.verify_ledger()).ok


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(amounts=st.lists(st.integers(-(2**65), 2**65) | st.integers(-5, 5), min_size=1, max_size=8))
def test_any_amounts_keep_the_ledger_whole(tmp_path_factory: pytest.TempPathFactory, amounts: list[int]) -> None:
    async def post_all() -> None:
        store = await SqliteStore.open(tmp_path_factory.mktemp("ledger") / "gateway.db")
        try:
            await store.create_account(account("ann"), [], topup_nanos=0)
            expected = 0
            for nanos in amounts:
                with contextlib.suppress(BadRequest):
                    expected += await store.add_credits("user_ann", nanos, note="") - expected
            assert 0 <= expected == await store.balance("user_ann") <= AMOUNT_NANOS_MAX
            assert (await store.verify_ledger()).ok
        finally:
            await store.close()

    asyncio.run(post_all())


async def test_entries_are_append_only(store: SqliteStore, path: Path) -> None:
    await store.create_account(account("ann"), [], topup_nanos=5)
    for sql in (
        "UPDATE entries SET amount_nanos = 6",
        "DELETE FROM entries",
        "UPDATE transactions SET note = 'x'",
        "DELETE FROM transactions",
    ):
        with pytest.raises(sqlite3.DatabaseError, match="append-only"):
            shell(path, sql)


@pytest.mark.parametrize(
    ("tampering", "named"),
    [
        ("UPDATE balances SET nanos = nanos + 7 WHERE book = 'user_ann'", "user_ann"),
        ("DELETE FROM balances WHERE book = 'user_ann'", "user_ann"),
        ("INSERT INTO entries (transaction_number, book, amount_nanos) SELECT number, 'user_ann', 7 FROM transactions", "transaction 1"),
        ("INSERT INTO transactions VALUES (7, 'topup', 'empty', '', 0)", "transaction 7"),
        ("DROP TRIGGER entries_keep_values; UPDATE entries SET book = 'user_gone' WHERE book = 'user_ann'", "user_gone"),
    ],
)
async def test_tampering_shows(store: SqliteStore, path: Path, tampering: str, named: str) -> None:
    await store.create_account(account("ann"), [], topup_nanos=5)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(tampering)
    report = await store.verify_ledger()
    assert report.ok is False
    assert any(problem.startswith(named) for problem in report.problems)
    assert report.difference_nanos > 0 or named == "transaction 7"


async def test_only_one_process_has_the_store_open(store: SqliteStore, path: Path) -> None:
    with pytest.raises(StoreLocked):
        await SqliteStore.open(path)
    await store.close()
    async with asyncio.timeout(5):
        again = await SqliteStore.open(path)
    await again.close()


async def test_opening_waits_for_a_holder_that_ends(store: SqliteStore, path: Path) -> None:
    opening = asyncio.create_task(SqliteStore.open(path, wait_s=5))
    await asyncio.wait([opening], timeout=0.15)
    assert not opening.done()
    await store.close()
    await (await opening).close()


async def test_the_files_are_for_the_owner_alone(store: SqliteStore, path: Path) -> None:
    await store.create_account(account("ann"), [], topup_nanos=5)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert len(modes) == 4
    assert set(modes.values()) == {0o600}


async def test_writes_are_synced_and_foreign_keys_are_on(store: SqliteStore) -> None:
    pragmas = [await _pragma(store._writer, name) for name in ("journal_mode", "synchronous", "foreign_keys")]
    assert pragmas == ["wal", 2, 1]


async def _pragma(db: aiosqlite.Connection, name: str) -> object:
    [row] = await db.execute_fetchall(f"PRAGMA {name}")
    return row[0]


async def test_a_foreign_lock_is_an_unavailable_store_and_passes(store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await store.create_account(account("ann"), [], topup_nanos=5)
    await store._writer.execute("PRAGMA busy_timeout = 50")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as foreign:
        foreign.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable):
            await store.add_credits("user_ann", 1, note="")
        assert await store.balance("user_ann") == 5  # reading goes on meanwhile
        foreign.execute("ROLLBACK")
    assert await store.add_credits("user_ann", 1, note="") == 6


async def test_a_cancelled_write_is_whole_or_absent(store: SqliteStore) -> None:
    await store.create_account(account("ann"), [], topup_nanos=1)
    for turns in range(30):  # cancelled at ever later steps
        adding = asyncio.create_task(store.add_credits("user_ann", 1, note=""))
        for _ in range(turns):
            await asyncio.sleep(0)
        adding.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await adding
    before = await store.balance("user_ann")
    assert await store.add_credits("user_ann", 1, note="") == before + 1
    assert (await store.verify_ledger()).ok


async def test_a_closed_store_is_unavailable(path: Path) -> None:
    store = await SqliteStore.open(path)
    await store.close()
    for call in (store.balance("user_ann"), store.add_credits("user_ann", 1, note="")):
        with pytest.raises(StoreUnavailable):
            await call


async def test_a_file_that_is_no_database_is_an_unavailable_store(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database, but long enough to be looked at as one" * 20)
    with pytest.raises(StoreUnavailable):
        await SqliteStore.open(path)
    path.unlink()
    await (await SqliteStore.open(path)).close()  # the lock was given back


async def test_opening_again_applies_nothing(path: Path) -> None:
    for _ in range(2):
        await (await SqliteStore.open(path)).close()
    assert [row[0] for row in shell(path, "SELECT number FROM migrations")] == [migration.number for migration in read_migrations()]


async def test_a_changed_or_newer_schema_stops_the_start(path: Path) -> None:
    await (await SqliteStore.open(path)).close()
    shell(path, "INSERT INTO migrations VALUES (999, 'future', 'x', 0)")
    with pytest.raises(StoreUnavailable, match="newer"):
        await SqliteStore.open(path)
    shell(path, "DELETE FROM migrations WHERE number = 999")
    shell(path, "UPDATE migrations SET checksum = 'other'")
    with pytest.raises(StoreUnavailable, match="differs"):
        await SqliteStore.open(path)


async def test_a_migration_is_applied_whole_or_not_at_all(tmp_path: Path) -> None:
    good = Migration(1, "good", "CREATE TABLE a (x);\n")
    bad = Migration(2, "bad", "CREATE TABLE b (x);\nINSERT INTO nowhere VALUES (1);\n")
    async with aiosqlite.connect(tmp_path / "m.db", isolation_level=None) as db:
        with pytest.raises(sqlite3.OperationalError):
            await migrate(db, [good, bad])
        tables = [name for (name,) in await db.execute_fetchall("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        assert sorted(tables) == ["a", "migrations"]
        assert await migrate(db, [good, Migration(2, "mended", "CREATE TABLE b (x);")]) == 1


def test_statements_are_constant_but_for_our_own_words() -> None:
    source = "\n".join(path.read_text() for path in Path(sqlite_module.__file__).parent.glob("*.py"))
    built = [
        line for line in source.splitlines() if 'f"' in line and any(word in line for word in ("SELECT", "INSERT", "UPDATE", "DELETE"))
    ]
    assert all("_KEY_COLUMNS" in line or "{_KEY}" in line for line in built)


def test_store_errors_are_our_faults_and_refusals_the_callers() -> None:
    assert issubclass(StoreLocked, StoreUnavailable)
    assert StoreLocked.status == 503
    assert all(issubclass(kind, GatewayError) and kind.fault == "caller" for kind in (BadRequest, Conflict, NotFound))
