"""Generations into the books: a batch of journal slices in one transaction, and what is read of it later."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence

import aiosqlite
import msgspec

from gateway.control.store import REVENUE_BOOK, Applied, JournalSlice, KeyUsage, Refused
from gateway.control.store.posting import Posting, State, posting, refused
from gateway.control.store.sqlite.database import listed, row_of
from gateway.control.store.sqlite.ledger import SET_BALANCE
from gateway.domain.errors import StoreUnavailable
from gateway.domain.generation import Generation
from gateway.domain.resources import window_start

# What SQLite says of a value, and not of the disk, a lock or itself.
RECORD_FAULTS = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError, OverflowError, ValueError)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Generation)


async def apply(db: aiosqlite.Connection, slices: Sequence[JournalSlice]) -> Applied:
    """Post all records and move the offsets, within the transaction that `db` is in.

    When the batch as a whole does not pass, its records are posted one by one and those at fault are set aside.
    """
    await _require_offsets(db, slices)
    await db.execute("SAVEPOINT batch")
    try:
        applied = await _apply_whole(db, slices)
    except RECORD_FAULTS:
        await db.execute("ROLLBACK TO batch")
        applied = await _apply_each(db, slices)
    await db.execute("RELEASE batch")
    await db.executemany(
        "INSERT INTO journal_offsets (file, committed_bytes) VALUES (?, ?) "
        "ON CONFLICT (file) DO UPDATE SET committed_bytes = excluded.committed_bytes",
        [(piece.file, piece.end) for piece in slices],
    )
    return applied


async def _require_offsets(db: aiosqlite.Connection, slices: Sequence[JournalSlice]) -> None:
    """An earlier commit that was thought to have failed may be there: then these records are not the next ones."""
    offsets = {row[0]: row[1] for row in await db.execute_fetchall(_OFFSETS_OF, (listed(piece.file for piece in slices),))}
    if any(offsets.get(piece.file, 0) != piece.start for piece in slices):
        raise StoreUnavailable("a journal was read further than this; its offset must be read again")


_OFFSETS_OF = "SELECT file, committed_bytes FROM journal_offsets WHERE file IN (SELECT value FROM json_each(?))"


async def _apply_whole(db: aiosqlite.Connection, slices: Sequence[JournalSlice]) -> Applied:
    result = posting(slices, await _state(db, slices))
    await _write(db, result)
    return Applied(
        generations=len(result.generations), exists=result.exists, charged_nanos=result.charged_nanos, refused=tuple(result.refused)
    )


async def _apply_each(db: aiosqlite.Connection, slices: Sequence[JournalSlice]) -> Applied:
    done: list[Applied] = []
    for piece in slices:
        for single in _singles(piece):
            await db.execute("SAVEPOINT record")
            try:
                done.append(await _apply_whole(db, (single,)))
            except RECORD_FAULTS:
                await db.execute("ROLLBACK TO record")
                done.append(await _set_aside(db, single))
            await db.execute("RELEASE record")
    return Applied(
        generations=sum(each.generations for each in done),
        exists=sum(each.exists for each in done),
        charged_nanos=sum(each.charged_nanos for each in done),
        refused=tuple(one for each in done for one in each.refused),
    )


def _singles(piece: JournalSlice) -> Iterator[JournalSlice]:
    for record in piece.corrupt:
        yield msgspec.structs.replace(piece, generations=(), corrupt=(record,))
    for generation in piece.generations:
        yield msgspec.structs.replace(piece, generations=(generation,), corrupt=())


async def _set_aside(db: aiosqlite.Connection, single: JournalSlice) -> Applied:
    aside = tuple(refused(single.file, "invalid", generation) for generation in single.generations)
    await _write_refused(db, aside)
    return Applied(refused=aside)


async def _state(db: aiosqlite.Connection, slices: Sequence[JournalSlice]) -> State:
    generations = [generation for piece in slices for generation in piece.generations]
    accounts = listed({generation.account_id for generation in generations})
    books = listed({REVENUE_BOOK, *(generation.account_id for generation in generations)})
    charged = await db.execute_fetchall(_CHARGED, (listed(generation.id for generation in generations),))
    return State(
        accounts={row[0] for row in await db.execute_fetchall(_EXISTING, (accounts,))},
        charged={row[0]: (row[1], row[2]) for row in charged},
        balances={row[0]: row[1] for row in await db.execute_fetchall(_BALANCES, (books,))},
    )


_EXISTING = "SELECT id FROM accounts WHERE id IN (SELECT value FROM json_each(?))"
_CHARGED = "SELECT id, account_id, charged_nanos FROM generations WHERE id IN (SELECT value FROM json_each(?))"
_BALANCES = "SELECT book, nanos FROM balances WHERE book IN (SELECT value FROM json_each(?))"


async def _write(db: aiosqlite.Connection, result: Posting) -> None:
    now_ms = int(time.time() * 1000)
    charged = [generation for generation in result.generations if generation.charged_nanos]
    await db.executemany(_INSERT_GENERATION, [_row(generation) for generation in result.generations])
    if charged:
        await db.executemany(_INSERT_USAGE, [(generation.id, now_ms) for generation in charged])
        await db.executemany(_INSERT_ENTRY, [line for generation in charged for line in _lines(generation)])
        await db.executemany(SET_BALANCE, list(result.balances.items()))
        await db.executemany(_ADD_USED, list(result.used.items()))
        await db.executemany(_ADD_SETTLED, [(*row, nanos) for row, nanos in result.settled.items()])
    await db.executemany(_ADD_TOTALS, [(digest, *sums) for digest, sums in result.keys.items()])
    await db.executemany(_ADD_DAILY, [(*msgspec.to_builtins(key), *msgspec.to_builtins(sums)) for key, sums in result.daily.items()])
    await _write_refused(db, result.refused)


async def _write_refused(db: aiosqlite.Connection, records: Iterable[Refused]) -> None:
    now_ms = int(time.time() * 1000)
    await db.executemany(
        "INSERT INTO refused_records (file, reason, generation_id, record, refused_at_ms) VALUES (?, ?, ?, ?, ?)",
        [(one.file, one.reason, one.generation_id, one.record, now_ms) for one in records],
    )


def _row(generation: Generation) -> tuple[object, ...]:
    return (
        generation.id, generation.account_id, generation.key_digest, generation.created_at_ms, generation.model,
        generation.endpoint_id, generation.provider, generation.charged_nanos, _encoder.encode(generation),
    )  # fmt: skip


def _lines(generation: Generation) -> tuple[tuple[str, str, int], ...]:
    nanos = generation.charged_nanos
    return ((generation.id, generation.account_id, -nanos), (generation.id, REVENUE_BOOK, nanos))


_INSERT_GENERATION = "INSERT INTO generations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_INSERT_USAGE = "INSERT INTO transactions (id, kind, created_at_ms) VALUES (?, 'usage', ?)"
_INSERT_ENTRY = "INSERT INTO entries (transaction_id, book, amount_nanos) VALUES (?, ?, ?)"
_ADD_USED = """
INSERT INTO credits (account_id, total_nanos, purchased_nanos, used_nanos) VALUES (?, 0, 0, ?)
ON CONFLICT (account_id) DO UPDATE SET used_nanos = used_nanos + excluded.used_nanos
"""
_ADD_SETTLED = """
INSERT INTO leases (resource, incarnation, granted_nanos, settled_nanos) VALUES (?, ?, 0, ?)
ON CONFLICT (resource, incarnation) DO UPDATE SET settled_nanos = settled_nanos + excluded.settled_nanos
"""
_ADD_TOTALS = """
INSERT INTO key_totals (key_digest, requests, nanos) VALUES (?, ?, ?)
ON CONFLICT (key_digest) DO UPDATE SET requests = requests + excluded.requests, nanos = nanos + excluded.nanos
"""
_ADD_DAILY = """
INSERT INTO usage_daily VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (account_id, day, key_digest, model, endpoint_id, provider) DO UPDATE SET
    requests = requests + excluded.requests, served = served + excluded.served, prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens,
    reasoning_tokens = reasoning_tokens + excluded.reasoning_tokens,
    cached_tokens = cached_tokens + excluded.cached_tokens, nanos = nanos + excluded.nanos
"""


async def generation_of(db: aiosqlite.Connection, generation_id: str) -> Generation | None:
    row = await row_of(db, "SELECT record FROM generations WHERE id = ?", (generation_id,))
    return _decoder.decode(row[0]) if row else None


async def free_requests_of(db: aiosqlite.Connection, account_id: str, now_s: float) -> int:
    row = await row_of(db, _FREE_REQUESTS, (account_id, window_start("daily", now_s)))
    assert row is not None
    return int(row[0])


_FREE_REQUESTS = "SELECT COALESCE(SUM(served), 0) FROM usage_daily WHERE account_id = ? AND day = ? AND model LIKE '%:free'"


async def key_usage_of(db: aiosqlite.Connection, digest: str, now_s: float) -> KeyUsage:
    daily, weekly, monthly = (window_start(reset, now_s) for reset in ("daily", "weekly", "monthly"))
    row = await row_of(db, _KEY_USAGE, (daily, weekly, monthly, digest, min(weekly, monthly), digest))
    assert row is not None
    return KeyUsage(total_nanos=row[0], daily_nanos=row[1], weekly_nanos=row[2], monthly_nanos=row[3])


_KEY_USAGE = """
SELECT COALESCE((SELECT nanos FROM key_totals WHERE key_digest = digest), 0), daily, weekly, monthly FROM (
    SELECT COALESCE(SUM(CASE WHEN day >= ? THEN nanos END), 0) AS daily,
           COALESCE(SUM(CASE WHEN day >= ? THEN nanos END), 0) AS weekly,
           COALESCE(SUM(CASE WHEN day >= ? THEN nanos END), 0) AS monthly
    FROM usage_daily WHERE key_digest = ? AND day >= ?
), (SELECT ? AS digest)
"""
