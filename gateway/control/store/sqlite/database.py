"""What all parts of the SQLite store share: connections, foreign errors, lists as arguments."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import aiosqlite
import msgspec

from gateway.domain.errors import StoreUnavailable

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

BUSY_TIMEOUT_MS = 5000  # how long a foreign lock (a backup, a shell) may delay a statement before it fails


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """The database's and the file system's errors, as ours."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StoreUnavailable("The store did not answer; try again shortly", retry_after_s=1) from error


@contextlib.contextmanager
def opening(path: Path) -> Iterator[None]:
    """The same while the file is opened: whoever started us is told which one it is and what is wrong with it."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        damaged = getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
        advice = "; restore a backup in its place" if damaged else ""
        raise StoreUnavailable(f"the store {path} cannot be opened: {error}{advice}") from error


class Connection(aiosqlite.Connection):
    """One that also runs whole functions in its thread, in the same order as single statements."""

    async def run(
        self, work: Callable[Concatenate[sqlite3.Connection, Arguments], Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """`work(connection, ...)`. It must end its transaction itself: whoever awaits this may be cancelled, and it goes on."""
        return cast(Result, await self._execute(work, self._conn, *args, **kwargs))  # type: ignore[no-untyped-call]


async def connect(path: Path) -> Connection:
    db = Connection(lambda: sqlite3.connect(path, isolation_level=None), iter_chunk_size=64)  # transactions are begun by us alone
    await db
    await db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    return db


def cut_log(db: sqlite3.Connection) -> bool:
    """Bring the whole log into the database and empty it, without waiting for readers; False: one of them needs it still."""
    db.execute("PRAGMA busy_timeout = 0")
    try:
        return bool(db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0)
    finally:
        db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")


async def row_of(db: aiosqlite.Connection, sql: str, arguments: Sequence[Any]) -> sqlite3.Row | None:
    rows = list(await db.execute_fetchall(sql, arguments))
    return rows[0] if rows else None


def listed(values: Iterable[str]) -> str:
    """A list as one argument, for `IN (SELECT value FROM json_each(?))`: the statement stays the same whatever the length."""
    return msgspec.json.encode(list(values)).decode()
