"""The SQLite file that sealed records lie in. Knows no key, and belongs to one thread.

Commits do not wait for the disk (`synchronous = NORMAL`): power loss may cost the last records, never the file. What is deleted
is overwritten (`secure_delete`) and the log is cut, so that it does not outlive its deletion there. The file does not shrink:
its pages are used again.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from gateway.control.content import ContentFull
from gateway.control.content.sealing import Sealed
from gateway.control.store.lock import StoreLock
from gateway.control.store.sqlite.database import BUSY_TIMEOUT_MS, cut_log
from gateway.domain.errors import StoreUnavailable

VERSION = 1
CHUNK = 64  # records deleted in one transaction: up to 64 MiB of pages to overwrite

_SCHEMA = """
CREATE TABLE content (
    id            INTEGER PRIMARY KEY,
    generation_id TEXT NOT NULL UNIQUE,
    account_id    TEXT NOT NULL,
    created_at_ms INTEGER NOT NULL,
    key_id        TEXT NOT NULL,
    nonce         BLOB NOT NULL,
    data          BLOB NOT NULL
) STRICT;
CREATE INDEX content_by_account ON content (account_id);
CREATE INDEX content_by_time ON content (created_at_ms);
CREATE INDEX content_by_key ON content (key_id);
"""
_COLUMNS = "generation_id, account_id, created_at_ms, key_id, nonce, data"


class ContentFile:
    """Made by `open`, ended by `close`. All methods raise sqlite3.Error."""

    def __init__(self, db: sqlite3.Connection, lock: StoreLock, total_bytes_max: int) -> None:
        self._db = db
        self._lock = lock
        self._total_bytes_max = total_bytes_max

    @classmethod
    def open(cls, path: Path, *, total_bytes_max: int) -> Self:
        """The file, made with its folder when absent. Raises OSError, sqlite3.Error, StoreUnavailable (another process's, or newer)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = StoreLock(path.with_name(path.name + ".lock"))
        lock.acquire()
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # before SQLite makes it readable by all
            db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)  # closed by whichever thread comes last
        except BaseException:
            lock.release()
            raise
        file = cls(db, lock, total_bytes_max)
        try:
            file._prepare()
        except BaseException:
            file.close()
            raise
        return file

    def close(self) -> None:
        try:
            self._db.close()
        finally:
            self._lock.release()

    def add(self, records: Iterable[Sealed]) -> int:
        """How many are new; a generation that is there stays as it is. Raises ContentFull when none fits any more."""
        if self.used_bytes() >= self._total_bytes_max:
            raise ContentFull("the content file is at [content] total_bytes_max")
        added = 0
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            for record in records:
                added += self._db.execute(_INSERT, _values(record)).rowcount
        return added

    def find(self, generation_id: str, account_id: str) -> Sealed | None:
        row = self._db.execute(
            f"SELECT {_COLUMNS} FROM content WHERE generation_id = ? AND account_id = ?",  # noqa: S608
            (generation_id, account_id),
        ).fetchone()
        return Sealed(*row) if row is not None else None

    def after(self, key_id: str, after: tuple[str, int], limit: int) -> list[tuple[int, Sealed]]:
        """Records under other keys than this one, with their numbers, in the order of (key, number)."""
        rows = self._db.execute(_OTHERS, (*after, key_id, limit)).fetchall()
        return [(row[0], Sealed(*row[1:])) for row in rows]

    def replace(self, records: Sequence[Sealed]) -> None:
        """Put them where those of the same generations are."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            for record in records:
                self._db.execute(
                    "UPDATE content SET key_id = ?, nonce = ?, data = ? WHERE generation_id = ?",
                    (record.key_id, record.nonce, record.data, record.generation_id),
                )

    def delete(self, generation_id: str, account_id: str) -> int:
        """How many were deleted: 0 or 1."""
        return self._delete("generation_id = ? AND account_id = ?", (generation_id, account_id))

    def delete_some_of(self, account_id: str) -> int:
        """How many of an account, `CHUNK` at most, were deleted."""
        return self._delete("account_id = ?", (account_id,))

    def delete_some_before(self, before_ms: int) -> int:
        return self._delete("created_at_ms < ?", (before_ms,))

    def cut_log(self) -> bool:
        """What was deleted leaves the log, too; False: somebody's read needs it still."""
        return cut_log(self._db)

    def used_bytes(self) -> int:
        """Of pages that hold something; the file itself may be larger."""
        pages, free, size = (self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size"))
        return int((pages - free) * size)

    def _delete(self, where: str, arguments: tuple[Any, ...]) -> int:
        statement = f"DELETE FROM content WHERE id IN (SELECT id FROM content WHERE {where} LIMIT {CHUNK})"  # noqa: S608
        return self._db.execute(statement, arguments).rowcount  # a transaction of its own

    def _prepare(self) -> None:
        self._db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA secure_delete = ON")
        self._db.execute("PRAGMA temp_store = MEMORY")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise StoreUnavailable(f"the content file is at schema {version}, newer than this program ({VERSION}); run the newer program")
        if version < VERSION:
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")


_INSERT = f"INSERT OR IGNORE INTO content ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"  # noqa: S608
_OTHERS = f"SELECT id, {_COLUMNS} FROM content WHERE (key_id, id) > (?, ?) AND key_id <> ? ORDER BY key_id, id LIMIT ?"  # noqa: S608


def _values(record: Sealed) -> tuple[Any, ...]:
    return (record.generation_id, record.account_id, record.created_at_ms, record.key_id, record.nonce, record.data)
