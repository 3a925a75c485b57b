"""Numbered migrations: `schema/NNNN_name.sql`, each applied once, whole or not at all.

What was applied is recorded with a checksum: a file that changed afterwards, or a database that is newer than the
program, stops the start instead of being guessed at.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import aiosqlite
import msgspec

from gateway.domain.errors import StoreUnavailable

SCHEMA = Path(__file__).parent / "schema"

_TABLE = """
CREATE TABLE IF NOT EXISTS migrations (
    number        INTEGER PRIMARY KEY,
    name          TEXT NOT NULL,
    checksum      TEXT NOT NULL,
    applied_at_ms INTEGER NOT NULL
) STRICT
"""


class Migration(msgspec.Struct, frozen=True):
    number: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def read_migrations(folder: Path = SCHEMA) -> list[Migration]:
    """All migrations in order. Raises ValueError on a gap or a file name without a number."""
    migrations = [Migration(int(path.name[:4]), path.stem[5:], path.read_text()) for path in sorted(folder.glob("*.sql"))]
    if [migration.number for migration in migrations] != list(range(1, len(migrations) + 1)):
        raise ValueError(f"migrations in {folder} are not numbered 1..n")
    return migrations


async def migrate(db: aiosqlite.Connection, migrations: list[Migration]) -> int:
    """Bring the database up to date; how many were applied. Raises StoreUnavailable when it does not fit this program."""
    applied = await _applied(db)
    for migration in migrations[: len(applied)]:
        if applied.get(migration.number) != migration.checksum:
            raise StoreUnavailable(f"migration {migration.number:04} ({migration.name}) differs from the one that was applied")
    if len(applied) > len(migrations):
        raise StoreUnavailable(f"the store is at schema {len(applied)}, newer than this program ({len(migrations)}); run the newer program")
    pending = migrations[len(applied) :]
    for migration in pending:
        await _apply(db, migration)
    return len(pending)


async def _applied(db: aiosqlite.Connection) -> dict[int, str]:
    # Looking first keeps a start without pending migrations free of the write lock, which a backup may hold for a while.
    found = await db.execute_fetchall("SELECT 1 FROM sqlite_schema WHERE name = 'migrations'")
    if not list(found):
        return {}
    return dict(await db.execute_fetchall("SELECT number, checksum FROM migrations"))  # type: ignore[arg-type]


async def _apply(db: aiosqlite.Connection, migration: Migration) -> None:
    try:
        await db.execute("BEGIN IMMEDIATE")
        await db.execute(_TABLE)
        for statement in _statements(migration.sql):
            await db.execute(statement)
        await db.execute(
            "INSERT INTO migrations VALUES (?, ?, ?, ?)",
            (migration.number, migration.name, migration.checksum, int(time.time() * 1000)),
        )
        await db.commit()
    except BaseException:
        await db.rollback()
        raise


def _statements(sql: str) -> Iterator[str]:
    """Split a script at the semicolons that end statements, which those inside a trigger do not."""
    statement = ""
    for line in sql.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    if statement.strip() and not all(line.strip().startswith("--") or not line.strip() for line in statement.splitlines()):
        raise ValueError("a migration ends within a statement")
