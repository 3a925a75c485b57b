"""The store on SQLite: one connection that writes, one that reads, one process that has them open.

The writer commits with synchronous=FULL, so an answered write survives power loss. Readers never wait for it (WAL)
and never see a transaction half done, because they are another connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import aiosqlite

from gateway.control.store import FUNDING_BOOK, OWN_BOOKS, Account, Key, LedgerReport, StoreLocked, TransactionKind
from gateway.control.store.lock import StoreLock
from gateway.control.store.migrations import migrate, read_migrations
from gateway.domain.errors import BadRequest, Conflict, NotFound, StoreUnavailable
from gateway.domain.keys import KeyRecord
from gateway.domain.money import AMOUNT_NANOS_MAX

BUSY_TIMEOUT_MS = 5000  # how long a foreign lock (a backup, a shell) may delay a statement before it fails
WAL_BYTES_KEPT = 4 * 1024 * 1024  # the log is cut back to this after a checkpoint; readers may have let it grow
DIGESTS_MAX = 500  # per statement; SQLite's own limit on variables is 32,766
PROBLEMS_MAX = 100
LOCK_RETRY_S = 0.05
OWN_BOOK_NANOS_MAX = 2**63 - 1  # the gateway's own books face all accounts together

_KEY_COLUMNS = "digest, account_id, name, label, created_at_ms, management, disabled, limit_nanos, limit_reset, expires_at_s, updated_at_ms"


class SqliteStore:
    """`Store` on one SQLite file. Made by `open`, ended by `close`."""

    def __init__(self, lock: StoreLock, writer: aiosqlite.Connection, reader: aiosqlite.Connection, path: Path) -> None:
        self._lock = lock
        self._writer = writer
        self._reader = reader
        self._path = path
        self._writing = asyncio.Lock()
        self._closed = False

    @classmethod
    async def open(cls, path: Path, *, wait_s: float = 0) -> Self:
        """Lock, open and migrate the file, made with its folder when absent.

        Raises StoreLocked when another process has it open for longer than `wait_s`, StoreUnavailable.
        """
        async with contextlib.AsyncExitStack() as opened:
            with _translated():
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = StoreLock(path.with_name(path.name + ".lock"))
                await _acquire(lock, wait_s)
                opened.callback(lock.release)
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # before SQLite makes it readable by all
                writer = await _connect(path)
                opened.push_async_callback(writer.close)
                await writer.execute("PRAGMA journal_mode = WAL")
                await writer.execute("PRAGMA synchronous = FULL")
                await writer.execute("PRAGMA foreign_keys = ON")
                await writer.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_KEPT}")
                await migrate(writer, read_migrations())
                reader = await _connect(path)
                opened.push_async_callback(reader.close)
                await reader.execute("PRAGMA query_only = ON")
            store = cls(lock, writer, reader, path)
            opened.pop_all()
            return store

    async def close(self) -> None:
        self._closed = True
        try:
            async with self._writing:
                with _translated():
                    await self._reader.close()
                    await self._writer.close()  # last, so that it is the one that checkpoints
        finally:
            self._lock.release()

    async def create_account(self, account: Account, keys: Sequence[Key], *, topup_nanos: int) -> None:
        if not 0 <= topup_nanos <= AMOUNT_NANOS_MAX:
            raise BadRequest("the amount is negative or out of range")
        async with self._transaction() as db:
            if await _row(db, "SELECT 1 FROM accounts WHERE email = ?", (account.email,)):
                raise Conflict("an account with this email exists")
            await db.execute(
                "INSERT INTO accounts (id, email, password_hash, created_at_ms) VALUES (?, ?, ?, ?)",
                (account.id, account.email, account.password_hash, account.created_at_ms),
            )
            for key in keys:
                await _insert_key(db, key)
            if topup_nanos:
                await _post(db, "topup", [(account.id, topup_nanos), (FUNDING_BOOK, -topup_nanos)], note="first credit")

    async def create_key(self, key: Key) -> None:
        if key.limit_nanos is not None and not 0 <= key.limit_nanos <= AMOUNT_NANOS_MAX:
            raise BadRequest("the limit is negative or out of range")
        async with self._transaction() as db:
            await _require_account(db, key.account_id)
            await _insert_key(db, key)

    async def find_keys(self, digests: Iterable[str]) -> dict[str, KeyRecord]:
        wanted = list(digests)
        found: dict[str, KeyRecord] = {}
        for start in range(0, len(wanted), DIGESTS_MAX):
            part = wanted[start : start + DIGESTS_MAX]
            rows = await self._read(f"SELECT {_KEY_COLUMNS} FROM keys WHERE digest IN ({', '.join('?' * len(part))})", part)  # noqa: S608
            found.update((row[0], _key(row).record()) for row in rows)
        return found

    async def find_account(self, account_id: str) -> Account | None:
        rows = await self._read("SELECT id, email, created_at_ms, password_hash FROM accounts WHERE id = ?", (account_id,))
        return _account(rows[0]) if rows else None

    async def list_accounts(self, *, offset: int = 0, limit: int = 100) -> list[Account]:
        rows = await self._read(
            "SELECT id, email, created_at_ms, password_hash FROM accounts ORDER BY created_at_ms, id LIMIT ? OFFSET ?", (limit, offset)
        )
        return [_account(row) for row in rows]

    async def list_keys(self, account_id: str, *, offset: int = 0, limit: int = 100) -> list[Key]:
        rows = await self._read(
            f"SELECT {_KEY_COLUMNS} FROM keys WHERE account_id = ? ORDER BY created_at_ms DESC, digest LIMIT ? OFFSET ?",  # noqa: S608
            (account_id, limit, offset),
        )
        return [_key(row) for row in rows]

    async def add_credits(self, account_id: str, nanos: int, *, note: str) -> int:
        if not 0 < nanos <= AMOUNT_NANOS_MAX:
            raise BadRequest("the amount is not positive or out of range")
        async with self._transaction() as db:
            await _require_account(db, account_id)
            balances = await _post(db, "topup", [(account_id, nanos), (FUNDING_BOOK, -nanos)], note=note)
        return balances[account_id]

    async def balance(self, account_id: str) -> int:
        rows = await self._read("SELECT nanos FROM balances WHERE book = ?", (account_id,))
        return int(rows[0][0]) if rows else 0

    async def verify_ledger(self) -> LedgerReport:
        # A connection of its own: a long transaction on the shared reader would show other readers the past.
        with _translated():
            db = await _connect(self._path)
            try:
                await db.execute("PRAGMA query_only = ON")
                await db.execute("BEGIN")
                return await _verify(db)
            finally:
                await db.close()

    def _require_open(self) -> None:
        if self._closed:
            raise StoreUnavailable("The store is closed")

    async def _read(self, sql: str, arguments: Sequence[Any]) -> list[sqlite3.Row]:
        self._require_open()
        with _translated():
            return list(await self._reader.execute_fetchall(sql, arguments))

    @contextlib.asynccontextmanager
    async def _transaction(self) -> AsyncIterator[aiosqlite.Connection]:
        """Committed when the block ends, rolled back when it raises or is cancelled.

        The connection runs statements in the order they were asked for, so a rollback asked for while cancelled
        still comes before the next transaction's BEGIN.
        """
        async with self._writing:
            self._require_open()
            with _translated():
                try:
                    await self._writer.execute("BEGIN IMMEDIATE")
                    yield self._writer
                    await self._writer.commit()
                except BaseException:
                    await self._writer.rollback()
                    raise


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """The database's and the file system's errors, as ours."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StoreUnavailable("The store did not answer; try again shortly", retry_after_s=1) from error


async def _acquire(lock: StoreLock, wait_s: float) -> None:
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + wait_s
    while True:
        try:
            return lock.acquire()
        except StoreLocked:
            if loop.time() >= deadline_s:
                raise
        await asyncio.sleep(LOCK_RETRY_S)  # the kernel tells nobody that a file lock became free


async def _connect(path: Path) -> aiosqlite.Connection:
    db = await aiosqlite.connect(path, isolation_level=None)  # transactions are begun by us alone
    await db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    return db


async def _row(db: aiosqlite.Connection, sql: str, arguments: Sequence[Any]) -> sqlite3.Row | None:
    rows = list(await db.execute_fetchall(sql, arguments))
    return rows[0] if rows else None


async def _require_account(db: aiosqlite.Connection, account_id: str) -> None:
    if not await _row(db, "SELECT 1 FROM accounts WHERE id = ?", (account_id,)):
        raise NotFound("no such account")


async def _insert_key(db: aiosqlite.Connection, key: Key) -> None:
    await db.execute(
        f"INSERT INTO keys ({_KEY_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
        (
            key.digest, key.account_id, key.name, key.label, key.created_at_ms, key.management, key.disabled,
            key.limit_nanos, key.limit_reset, key.expires_at_s, key.updated_at_ms,
        ),
    )  # fmt: skip


async def _post(db: aiosqlite.Connection, kind: TransactionKind, lines: Sequence[tuple[str, int]], *, note: str) -> dict[str, int]:
    """Append one transaction of (book, nanos) lines and carry the balances; the new balances by book.

    Raises BadRequest when a balance would leave its range.
    """
    assert sum(nanos for _, nanos in lines) == 0, "entries must sum to zero"
    transaction_id = f"txn_{secrets.token_hex(12)}"
    await db.execute(
        "INSERT INTO transactions (id, kind, note, created_at_ms) VALUES (?, ?, ?, ?)",
        (transaction_id, kind, note, int(time.time() * 1000)),
    )
    balances: dict[str, int] = {}
    for book, nanos in lines:
        row = await _row(db, "SELECT nanos FROM balances WHERE book = ?", (book,))
        balances[book] = (row[0] if row else 0) + nanos
        if abs(balances[book]) > (OWN_BOOK_NANOS_MAX if book.startswith(OWN_BOOKS) else AMOUNT_NANOS_MAX):
            raise BadRequest("the balance would be out of range")
        await db.execute("INSERT INTO entries (transaction_id, book, amount_nanos) VALUES (?, ?, ?)", (transaction_id, book, nanos))
        await db.execute(
            "INSERT INTO balances (book, nanos) VALUES (?, ?) ON CONFLICT (book) DO UPDATE SET nanos = excluded.nanos",
            (book, balances[book]),
        )
    return balances


async def _verify(db: aiosqlite.Connection) -> LedgerReport:
    problems: list[str] = []
    difference_nanos = 0
    for book, rebuilt, stored in await db.execute_fetchall(_BOOKS_THAT_DIFFER):
        difference_nanos += abs(rebuilt - stored)
        problems.append(f"{book}: entries make {rebuilt} nanos, the balance says {stored}")
    for transaction_id, total in await db.execute_fetchall(_UNBALANCED):
        difference_nanos += abs(total or 0)
        problems.append(f"{transaction_id}: its entries make {total} nanos, not 0")
    for (book,) in await db.execute_fetchall(_UNKNOWN_BOOKS, (OWN_BOOKS + "%",)):
        problems.append(f"{book}: entries of an account that does not exist")
    accounts = await _row(db, "SELECT COUNT(*) FROM accounts", ())
    generations = await _row(db, "SELECT COUNT(*) FROM transactions WHERE kind = 'usage'", ())
    assert accounts and generations
    return LedgerReport(
        ok=not problems,
        accounts=accounts[0],
        generations=generations[0],
        difference_nanos=difference_nanos,
        problems=tuple(problems[:PROBLEMS_MAX]),
    )


_BOOKS_THAT_DIFFER = """
SELECT book, SUM(rebuilt) AS rebuilt, SUM(stored) AS stored FROM (
    SELECT book, amount_nanos AS rebuilt, 0 AS stored FROM entries
    UNION ALL SELECT book, 0, nanos FROM balances
) GROUP BY book HAVING SUM(rebuilt) <> SUM(stored) ORDER BY book
"""
_UNBALANCED = """
SELECT t.id, SUM(e.amount_nanos) FROM transactions t LEFT JOIN entries e ON e.transaction_id = t.id
GROUP BY t.id HAVING SUM(e.amount_nanos) IS NOT 0 ORDER BY t.id
"""
_UNKNOWN_BOOKS = "SELECT DISTINCT book FROM entries WHERE book NOT LIKE ? AND book NOT IN (SELECT id FROM accounts) ORDER BY book"


def _account(row: sqlite3.Row) -> Account:
    return Account(id=row[0], email=row[1], created_at_ms=row[2], password_hash=row[3])


def _key(row: sqlite3.Row) -> Key:
    return Key(
        digest=row[0], account_id=row[1], name=row[2], label=row[3], created_at_ms=row[4], management=bool(row[5]), disabled=bool(row[6]),
        limit_nanos=row[7], limit_reset=row[8], expires_at_s=row[9], updated_at_ms=row[10],
    )  # fmt: skip
