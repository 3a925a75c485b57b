"""What all parts of the SQLite store share: connections, foreign errors, lists as arguments."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiosqlite
import msgspec

from gateway.domain.errors import StoreUnavailable

BUSY_TIMEOUT_MS = 5000  # how long a foreign lock (a backup, a shell) may delay a statement before it fails


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """The database's and the file system's errors, as ours."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StoreUnavailable("The store did not answer; try again shortly", retry_after_s=1) from error


async def connect(path: Path) -> aiosqlite.Connection:
    db = await aiosqlite.connect(path, isolation_level=None)  # transactions are begun by us alone
    await db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    return db


async def row_of(db: aiosqlite.Connection, sql: str, arguments: Sequence[Any]) -> sqlite3.Row | None:
    rows = list(await db.execute_fetchall(sql, arguments))
    return rows[0] if rows else None


def listed(values: Iterable[str]) -> str:
    """A list as one argument, for `IN (SELECT value FROM json_each(?))`: the statement stays the same whatever the length."""
    return msgspec.json.encode(list(values)).decode()
