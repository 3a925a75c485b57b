"""Stores of earlier versions: opened as they are (OPS-11), and whole wherever an upgrade is cut off (LED-14)."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import aiosqlite
import msgspec
import pytest

from gateway.control.store import CreditChange, Credits, JournalSlice, KeyUsage, posting
from gateway.control.store.migrations import migrate, read_migrations
from gateway.control.store.sqlite import SqliteStore
from gateway.domain.generation import AttemptRecord, Generation
from gateway.domain.usage import Usage
from tests.control.journaling import NOON_MS, generation, rows

FIRST_STORE = Path(__file__).parent / "first_store.sql"
LEDGER_TABLES = ("accounts", "keys", "transactions", "entries", "balances")
OPEN = """
import asyncio, sys
from pathlib import Path
from gateway.control.store.sqlite import SqliteStore

async def open_and_close():
    await (await SqliteStore.open(Path(sys.argv[1]))).close()

asyncio.run(open_and_close())
"""


async def test_ops_11_a_store_of_the_first_version_is_opened_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "gateway.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(FIRST_STORE.read_text())
    columns = {table: _columns(path, table) for table in LEDGER_TABLES}
    before = {table: _hash(path, table, columns[table]) for table in LEDGER_TABLES}
    store = await SqliteStore.open(path)
    try:
        assert {table: _hash(path, table, columns[table]) for table in LEDGER_TABLES} == before
        report = await store.verify_ledger()
        assert (report.ok, report.accounts, report.generations) == (True, 2, 5)
        usd = 10**9
        assert await store.credits("user_ann") == Credits(total_nanos=13 * usd, purchased_nanos=13 * usd, used_nanos=4006)
        assert await store.key_usage("digest-a", NOON_MS / 1000) == KeyUsage(
            total_nanos=4006, daily_nanos=4006, weekly_nanos=4006, monthly_nanos=4006
        )
        found = await store.generation("gen-1764072000-00000000000000000003")
        assert found is not None and found.charged_nanos == 1003 and found.attempts[0].latency_ms == 412
        assert rows(path, "SELECT COUNT(*) FROM generations WHERE hex(record) LIKE 'DE%'") == [(5,)]  # by names
        record = msgspec.msgpack.encode(generation(nanos=5, id="gen-1764072001-00000000000000000000"))
        applied = await store.apply_journal([JournalSlice("edge-0-a.1", "a", 1000, 1100, [record, msgspec.msgpack.encode(found)])])
        assert (applied.generations, applied.exists) == (1, 1)
        ((kept,),) = rows(path, "SELECT record FROM generations WHERE id = 'gen-1764072000-00000000000000000003'")
        named = msgspec.msgpack.decode(kept)
        late, odd = [msgspec.msgpack.encode({**named, "id": "gen-1764072002-00000000000000000000", **more}) for more in ({}, {"odd": 1})]
        applied = await store.apply_journal([JournalSlice("edge-0-a.1", "a", 1100, 1200, [late, odd])])  # of an edge of that version
        assert (applied.generations, [one.reason for one in applied.refused]) == (1, ["corrupt"])
        assert await store.generation("gen-1764072002-00000000000000000000") == msgspec.structs.replace(
            found, id="gen-1764072002-00000000000000000000"
        )
        again = CreditChange(
            account_id="user_ann", kind="topup", nanos=5 * usd, fee_nanos=8 * usd // 10, reference="stripe:pi_1", note="card"
        )
        assert (await store.change_credit(again)).exists
        assert (await store.verify_ledger()).ok
    finally:
        await store.close()


def test_records_keep_their_members_by_place_so_none_ever_moves() -> None:
    """What is in stores is read by these places: a new member goes behind the last."""
    places = {
        Generation: (
            "id account_id key_digest created_at_ms model endpoint_id provider error usage charged_nanos settles prompt_nanos"
            " unbilled_nanos kind streamed cancelled status upstream_id finish_reason native_finish_reason latency_ms generation_ms"
            " http_referer title user_agent external_user session_id attempts"
        ),
        AttemptRecord: "endpoint_id provider outcome status latency_ms usage charged_nanos",
        Usage: "prompt_tokens completion_tokens cached_tokens cache_write_tokens reasoning_tokens audio_tokens images searches estimated",
    }
    for kind, names in places.items():
        assert kind.__struct_fields__[: len(names.split())] == tuple(names.split())
    parts = {posting._Record: Generation, posting._AnyRecord: Generation, posting._Usage: Usage, posting._AnyUsage: Usage}
    for part, whole in parts.items():
        assert whole.__struct_fields__[: len(part.__struct_fields__)] == part.__struct_fields__


@pytest.mark.system("strace")
async def test_led_14_a_crash_in_a_migration_loses_nothing(tmp_path: Path) -> None:
    """Killed at each sync that an upgrade of the first schema makes, until there is none left to be killed at."""
    old = tmp_path / "old.db"
    await _first_schema(old)
    columns = {table: _columns(old, table) for table in LEDGER_TABLES}
    before = {table: _hash(old, table, columns[table]) for table in LEDGER_TABLES}
    path = tmp_path / "var" / "gateway.db"
    for nth in itertools.count(1):
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir()
        shutil.copy(old, path)
        fault = ["-e", "trace=fdatasync,fsync", "-e", f"inject=fdatasync,fsync:signal=SIGKILL:when={nth}"]
        done = subprocess.run(
            ["strace", "-f", "-qq", *fault, sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, timeout=60, check=False
        )
        store = await SqliteStore.open(path)
        try:
            assert {table: _hash(path, table, columns[table]) for table in LEDGER_TABLES} == before
            assert rows(path, "PRAGMA integrity_check") == [("ok",)]
            assert [number for (number,) in rows(path, "SELECT number FROM migrations ORDER BY 1")] == [
                migration.number for migration in read_migrations()
            ]
            assert await store.credits("user_ann") == Credits(total_nanos=5, purchased_nanos=5)
            assert (await store.verify_ledger()).ok
        finally:
            await store.close()
        if done.returncode == 0:
            break
        assert done.returncode == -9 or "killed by SIGKILL" in done.stderr, done.stderr
    assert nth > 3  # the log's first frames, a commit for each migration, and the closing checkpoint


async def _first_schema(path: Path) -> None:
    async with aiosqlite.connect(path, isolation_level=None) as db:
        await migrate(db, read_migrations()[:1])
        await db.executescript(
            """
            INSERT INTO accounts (id, email, created_at_ms) VALUES ('user_ann', 'ann', 1);
            INSERT INTO keys (digest, account_id, name, label, created_at_ms) VALUES ('digest-a', 'user_ann', 'a', 'x', 1);
            INSERT INTO transactions VALUES (1, 'topup', 'first', '', 1);
            INSERT INTO entries VALUES (1, 1, 'user_ann', 5), (2, 1, 'gateway:funding', -5);
            INSERT INTO balances VALUES ('user_ann', 5), ('gateway:funding', -5);
            """
        )


def _columns(path: Path, table: str) -> str:
    """Those of this version; a later one may add some."""
    return ", ".join(name for (name,) in rows(path, f"SELECT name FROM pragma_table_info('{table}')"))


def _hash(path: Path, table: str, columns: str) -> str:
    return hashlib.sha256(repr(rows(path, f"SELECT {columns} FROM {table} ORDER BY 1, 2")).encode()).hexdigest()
