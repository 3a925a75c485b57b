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

from gateway.control.store import (
    NOBODY,
    REVENUE_BOOK,
    Account,
    Applied,
    CreditChange,
    CreditChanged,
    Credits,
    Expired,
    JournalSlice,
    Key,
    KeyUsage,
    LeaseBook,
    LedgerReport,
    StoreLocked,
)
from gateway.control.store.lock import StoreLock
from gateway.control.store.migrations import migrate, read_migrations
from gateway.control.store.sqlite import accounts, credits, generations, leases, ledger, removal, verification
from gateway.control.store.sqlite.database import Connection, connect, cut_log, listed, opening, translated
from gateway.control.store.sqlite.leases import SqliteLeaseBook
from gateway.control.store.sqlite.management import SqliteManagement
from gateway.domain.errors import BadRequest, StoreUnavailable
from gateway.domain.generation import Generation
from gateway.domain.keys import KeyRecord
from gateway.domain.money import AMOUNT_NANOS_MAX
from gateway.domain.rules import AccountRules, RulesChange

WAL_BYTES_KEPT = 4 * 1024 * 1024  # the log is cut back to this after a checkpoint; readers may have let it grow
WAL_BYTES_MAX = 48 * 1024 * 1024  # with a log this long, held by somebody's long read, charges wait in the journal
CACHE_KIB = 32 * 1024  # of the writer: what a batch touches stays in memory, however many accounts it is about
LOCK_RETRY_S = 0.05


class SqliteStore(SqliteManagement):
    """`Store` on one SQLite file. Made by `open`, ended by `close`."""

    def __init__(self, lock: StoreLock, writer: Connection, reader: aiosqlite.Connection, path: Path) -> None:
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
            with opening(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = StoreLock(path.with_name(path.name + ".lock"))
                await _acquire(lock, wait_s)
                opened.callback(lock.release)
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # before SQLite makes it readable by all
                writer = await connect(path)
                opened.push_async_callback(writer.close)
                await writer.execute("PRAGMA journal_mode = WAL")
                await writer.execute("PRAGMA synchronous = FULL")
                await writer.execute("PRAGMA foreign_keys = ON")
                await writer.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_KEPT}")
                await writer.execute("PRAGMA temp_store = MEMORY")
                await writer.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
                await migrate(writer, read_migrations())
                reader = await connect(path)
                opened.push_async_callback(reader.close)
                await reader.execute("PRAGMA query_only = ON")
            store = cls(lock, writer, reader, path)
            opened.pop_all()
            return store

    async def close(self) -> None:
        self._closed = True
        try:
            async with self._writing:
                with translated():
                    await self._reader.close()
                    await self._writer.close()  # last, so that it is the one that checkpoints
        finally:
            self._lock.release()

    # Accounts and keys.

    async def create_account(self, account: Account, keys: Sequence[Key], *, topup_nanos: int, grant_nanos: int = 0) -> None:
        if not 0 <= topup_nanos <= AMOUNT_NANOS_MAX or not 0 <= grant_nanos <= AMOUNT_NANOS_MAX:
            raise BadRequest("the amount is negative or out of range")
        first = [
            CreditChange(account_id=account.id, kind="grant", nanos=grant_nanos, reference=f"signup:{account.id}", note="allowance"),
            CreditChange(account_id=account.id, kind="topup", nanos=topup_nanos, reference=f"first:{account.id}", note="first credit"),
        ]
        async with self._transaction() as db:
            await accounts.insert_account(db, account)
            for key in keys:
                await accounts.insert_key(db, key)
            for change in first:
                if change.nanos:
                    await credits.change(db, change, _now_ms())

    async def create_key(self, key: Key) -> None:
        if key.limit_nanos is not None and not 0 <= key.limit_nanos <= AMOUNT_NANOS_MAX:
            raise BadRequest("the limit is negative or out of range")
        async with self._transaction() as db:
            await accounts.require_account(db, key.account_id)
            await accounts.insert_key(db, key)

    async def find_keys(self, digests: Iterable[str]) -> dict[str, KeyRecord]:
        return {row[0]: accounts.key_of(row).record() for row in await self._read(accounts.KEYS, (listed(digests),))}

    async def find_key(self, digest: str) -> Key | None:
        rows = await self._read(accounts.KEYS, (listed((digest,)),))
        return accounts.key_of(rows[0]) if rows else None

    async def find_account(self, account_id: str) -> Account | None:
        rows = await self._read(accounts.ACCOUNT, (account_id,))
        return accounts.account_of(rows[0]) if rows else None

    async def list_accounts(self, *, offset: int = 0, limit: int = 100) -> list[Account]:
        return [accounts.account_of(row) for row in await self._read(accounts.ACCOUNTS, (limit, offset))]

    async def list_keys(self, account_id: str, *, offset: int = 0, limit: int = 100) -> list[Key]:
        return [accounts.key_of(row) for row in await self._read(accounts.KEYS_OF_ACCOUNT, (account_id, limit, offset))]

    async def rules(self, account_id: str) -> AccountRules:
        rows = await self._read(accounts.RULES, (account_id,))
        return accounts.rules_of(rows[0][0] if rows else None)

    async def change_rules(self, account_id: str, change: RulesChange) -> tuple[AccountRules, list[KeyRecord]]:
        async with self._transaction() as db:
            rules, keys = await accounts.change_rules(db, account_id, change)
        return rules, [key.record() for key in keys]

    # Credit and the ledger.

    async def change_credit(self, change: CreditChange) -> CreditChanged:
        credits.require_sound(change)
        async with self._transaction() as db:
            return await credits.change(db, change, _now_ms())

    async def add_credits(self, account_id: str, nanos: int, *, note: str, fee_nanos: int = 0) -> int:
        reference = f"operator:{secrets.token_hex(12)}"
        change = CreditChange(account_id=account_id, kind="topup", nanos=nanos, fee_nanos=fee_nanos, reference=reference, note=note)
        return (await self.change_credit(change)).balance_nanos

    async def expire_credits(self, *, before_ms: int, now_ms: int) -> list[Expired]:
        expired = []
        with self._reading() as db:
            candidates = await credits.expirable(db, before_ms)
        for account_id in candidates:  # a transaction each: nobody who charges or asks for a lease waits for all of them
            async with self._transaction() as db:
                expired.append(await credits.expire(db, account_id, before_ms=before_ms, now_ms=now_ms))
        return [each for each in expired if each is not None]

    async def balance(self, account_id: str) -> int:
        rows = await self._read("SELECT nanos FROM balances WHERE book = ?", (account_id,))
        return int(rows[0][0]) if rows else 0

    async def balances(self, account_ids: Iterable[str]) -> dict[str, int]:
        rows = await self._read("SELECT book, nanos FROM balances WHERE book IN (SELECT value FROM json_each(?))", (listed(account_ids),))
        return {row[0]: row[1] for row in rows}

    async def revenue(self) -> int:
        return await self.balance(REVENUE_BOOK)

    async def credits(self, account_id: str) -> Credits:
        with self._reading() as db:
            return await ledger.credits_of(db, account_id)

    async def verify_ledger(self) -> LedgerReport:
        # A connection of its own: a long transaction on the shared reader would show other readers the past.
        with translated():
            db = await connect(self._path)
            try:
                await db.execute("PRAGMA query_only = ON")
                return await db.run(verification.verify)
            finally:
                await db.close()

    # Generations and the journal.

    async def generation(self, generation_id: str) -> Generation | None:
        with self._reading() as db:
            return await generations.generation_of(db, generation_id)

    async def key_usage(self, digest: str, now_s: float) -> KeyUsage:
        with self._reading() as db:
            return await generations.key_usage_of(db, digest, now_s)

    async def free_requests(self, account_id: str, now_s: float) -> int:
        with self._reading() as db:
            return await leases.free_requests_of(db, account_id, now_s)

    async def journal_offsets(self) -> dict[str, int]:
        return {row[0]: row[1] for row in await self._read("SELECT file, committed_bytes FROM journal_offsets", ())}

    async def apply_journal(self, slices: Sequence[JournalSlice]) -> Applied:
        async with self._writing_thread() as writer:
            if self._wal_bytes() > WAL_BYTES_MAX and not await writer.run(cut_log):
                raise StoreUnavailable("a long read keeps the database's log from being cut; charges wait in the journal")
            return await writer.run(generations.apply, slices)

    async def apply_running(self, incarnation: str, records: Sequence[bytes]) -> Applied:
        async with self._writing_thread() as writer:
            return await writer.run(generations.apply_running, JournalSlice("", incarnation, 0, 0, records))

    async def remove_generations(self, *, before_ms: int, limit: int) -> int:
        async with self._writing_thread() as writer:
            if self._wal_bytes() > WAL_BYTES_MAX // 2 and not await writer.run(cut_log):  # the rest of it is for charges
                raise StoreUnavailable("a long read keeps the database's log from being cut")
            return await writer.run(removal.remove, before_ms, limit)

    async def forget_journals(self, files: Iterable[str]) -> None:
        async with self._transaction() as db:
            await db.execute("DELETE FROM journal_offsets WHERE file IN (SELECT value FROM json_each(?))", (listed(files),))

    # Leases.

    @contextlib.asynccontextmanager
    async def leasing(self) -> AsyncIterator[LeaseBook]:
        async with self._transaction() as db:
            yield SqliteLeaseBook(db)

    async def forget_windows(self, now_s: float) -> int:
        async with self._transaction() as db:
            return await leases.forget_windows(db, now_s)

    async def lease_holders(self) -> set[str]:
        return {row[0] for row in await self._read("SELECT DISTINCT incarnation FROM leases WHERE incarnation <> ?", (NOBODY,))}

    def _wal_bytes(self) -> int:
        try:
            return self._path.with_name(self._path.name + "-wal").stat().st_size
        except FileNotFoundError:
            return 0

    def _require_open(self) -> None:
        if self._closed:
            raise StoreUnavailable("The store is closed")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[aiosqlite.Connection]:
        self._require_open()
        with translated():
            yield self._reader

    async def _read(self, sql: str, arguments: Sequence[Any]) -> list[sqlite3.Row]:
        with self._reading() as db:
            return list(await db.execute_fetchall(sql, arguments))

    @contextlib.asynccontextmanager
    async def _writing_thread(self) -> AsyncIterator[Connection]:
        """For functions that are whole transactions: one that began is carried out, whoever awaits it is cancelled."""
        async with self._writing:
            self._require_open()
            with translated():
                yield self._writer

    @contextlib.asynccontextmanager
    async def _transaction(self) -> AsyncIterator[aiosqlite.Connection]:
        """Committed when the block ends, rolled back when it raises or is cancelled.

        The connection runs statements in the order they were asked for, so a rollback asked for while cancelled
        still comes before the next transaction's BEGIN.
        """
        async with self._writing:
            self._require_open()
            with translated():
                try:
                    await self._writer.execute("BEGIN IMMEDIATE")
                    yield self._writer
                    await self._writer.commit()
                except BaseException:
                    await self._writer.rollback()
                    raise


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


def _now_ms() -> int:
    return int(time.time() * 1000)
