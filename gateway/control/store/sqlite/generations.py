"""Generations into the books: a batch of journal slices in one transaction, and what is read of it later.

Posting is one function in the connection's own thread: a trip there and back for each statement would cost as much as the
statements do. A batch is one ledger transaction, with one entry for each account and one for the revenue.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, count

import aiosqlite
import msgspec

from gateway.control.store import NOBODY, REVENUE_BOOK, Applied, JournalSlice, KeyUsage, RefusalReason, Refused
from gateway.control.store.posting import Batch, OutOfRange, Posting, ids_of, posting
from gateway.control.store.sqlite.database import listed, row_of
from gateway.control.store.sqlite.ledger import ENTRY_BITS, INSERT_ENTRY, ROWS_PER_ENTRY, SET_BALANCE
from gateway.control.store.sqlite.removal import horizon_ms
from gateway.domain.errors import StoreUnavailable
from gateway.domain.generation import Generation, decode
from gateway.domain.resources import window_start

# What SQLite says of a value, and not of the disk, a lock or itself.
RECORD_FAULTS = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError, OverflowError, ValueError)


def apply(db: sqlite3.Connection, slices: Sequence[JournalSlice]) -> Applied:
    """Post all records and move the offsets in one transaction. For the connection's thread.

    Most batches are new and whole, so that is tried first, and without a savepoint, which would copy each page that changes.
    Then with a look at which generations exist; and when the batch does not pass even so, record by record, those at fault
    set aside.
    """
    try:
        return _in_transaction(db, slices, lambda: _post(db, Batch(slices, horizon_ms=horizon_ms(db))))
    except RECORD_FAULTS:
        return _in_transaction(db, slices, lambda: _apply_carefully(db, slices))


def apply_running(db: sqlite3.Connection, piece: JournalSlice) -> Applied:
    """Post the marks of streams that nobody finished: of a generation that exists the mark is of no interest any more."""

    def post() -> Applied:
        known = _known(db, (piece,))
        left = [record for record in piece.records if not set(ids_of((msgspec.structs.replace(piece, records=(record,)),))) & known.keys()]
        return _apply_carefully(db, (msgspec.structs.replace(piece, records=left),))

    return _in_transaction(db, (), post)


def _in_transaction(db: sqlite3.Connection, slices: Sequence[JournalSlice], work: Callable[[], Applied]) -> Applied:
    db.execute("BEGIN IMMEDIATE")
    try:
        _require_offsets(db, slices)
        applied = work()
        db.executemany(_SET_OFFSET, [(piece.file, piece.end) for piece in slices])
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return applied


def _require_offsets(db: sqlite3.Connection, slices: Sequence[JournalSlice]) -> None:
    """An earlier commit that was thought to have failed may be there: then these records are not the next ones."""
    offsets = dict(db.execute(_OFFSETS_OF, (listed(piece.file for piece in slices),)))
    if any(offsets.get(piece.file, 0) != piece.start for piece in slices):
        raise StoreUnavailable("a journal was read further than this; its offset must be read again")


_OFFSETS_OF = "SELECT file, committed_bytes FROM journal_offsets WHERE file IN (SELECT value FROM json_each(?))"
_SET_OFFSET = """
INSERT INTO journal_offsets (file, committed_bytes) VALUES (?, ?)
ON CONFLICT (file) DO UPDATE SET committed_bytes = excluded.committed_bytes
"""


def _apply_carefully(db: sqlite3.Connection, slices: Sequence[JournalSlice]) -> Applied:
    applied = _attempt(db, lambda: _post(db, Batch(slices, _known(db, slices), horizon_ms(db))))
    return applied if isinstance(applied, Applied) else _apply_each(db, slices)


def _attempt(db: sqlite3.Connection, work: Callable[[], Applied]) -> Applied | Exception:
    """What it returns, or the fault of a record, with all its writes undone."""
    db.execute("SAVEPOINT attempt")
    result: Applied | Exception
    try:
        result = work()
    except RECORD_FAULTS as fault:
        db.execute("ROLLBACK TO attempt")
        result = fault
    db.execute("RELEASE attempt")
    return result


def _apply_each(db: sqlite3.Connection, slices: Sequence[JournalSlice]) -> Applied:
    done = [_apply_single(db, single) for piece in slices for single in _singles(piece)]
    return Applied(
        generations=sum(each.generations for each in done),
        exists=sum(each.exists for each in done),
        charged_nanos=sum(each.charged_nanos for each in done),
        refused=tuple(one for each in done for one in each.refused),
    )


def _singles(piece: JournalSlice) -> Iterator[JournalSlice]:
    for record in piece.corrupt:
        yield msgspec.structs.replace(piece, records=(), corrupt=(record,))
    for record in piece.records:
        yield msgspec.structs.replace(piece, records=(record,), corrupt=())


def _apply_single(db: sqlite3.Connection, single: JournalSlice) -> Applied:
    applied = _attempt(db, lambda: _post(db, Batch((single,), _known(db, (single,)), horizon_ms(db))))
    if isinstance(applied, Applied):
        return applied
    reason: RefusalReason = "out_of_range" if isinstance(applied, OutOfRange) else "invalid"
    aside = tuple(one for group in Batch((single,)).groups for one in group.refused(reason))
    _write_refused(db, aside)
    return Applied(refused=aside)


def _known(db: sqlite3.Connection, slices: Sequence[JournalSlice]) -> dict[str, tuple[str, int]]:
    return {row[0]: (row[1], row[2]) for row in db.execute(_KNOWN, (listed(ids_of(slices)),))}


_KNOWN = f"""
SELECT g.id, e.book, g.charged_nanos FROM generations g JOIN entries e ON e.number = g.number >> {ENTRY_BITS}
WHERE g.id IN (SELECT value FROM json_each(?))
"""  # noqa: S608


def _post(db: sqlite3.Connection, batch: Batch) -> Applied:
    named = {group.account_id for group in batch.groups}
    accounts = {row[0] for row in db.execute(_EXISTING, (listed(named),))}
    balances = dict(db.execute(_BALANCES, (listed({REVENUE_BOOK, *named}),)))
    result = posting(batch, accounts=accounts, balances=balances)
    if result.groups:
        _write_rows(db, result)
        db.executemany(SET_BALANCE, list(result.balances.items()))
        db.executemany(_ADD_USED, list(result.used.items()))
        db.executemany(_ADD_SETTLED, [(*row, nanos) for row, nanos in result.settled.items()])
        db.executemany(_ADD_COUNTED, [(resource, NOBODY, requests) for resource, requests in result.counted.items()])
        db.executemany(_ADD_TOTALS, [(digest, *sums) for digest, sums in result.keys.items()])
        db.executemany(_ADD_DAILY, [(*name, *sums) for name, sums in result.daily.items()])
        db.executemany(_ADD_ACTIVITY, [(*name, requests, *more) for name, (requests, _, *more) in result.activity.items()])
    _write_refused(db, result.refused)
    return Applied(
        generations=sum(len(group.records) for groups in result.groups.values() for group in groups),
        exists=result.exists,
        charged_nanos=result.charged_nanos,
        refused=tuple(result.refused),
    )


_EXISTING = "SELECT id FROM accounts WHERE id IN (SELECT value FROM json_each(?))"
_BALANCES = "SELECT book, nanos FROM balances WHERE book IN (SELECT value FROM json_each(?))"


def _write_rows(db: sqlite3.Connection, result: Posting) -> None:
    """One transaction: the entries, and the generations that each of them charges."""
    transaction = db.execute(_INSERT_USAGE, (int(time.time() * 1000),)).lastrowid
    entry = int(db.execute(_LAST_ENTRY).fetchone()[0])
    entries: list[tuple[int, int | None, str, int]] = []
    generations: list[Iterator[tuple[int, str, int, bytes]]] = []  # not made before SQLite takes them
    for account, groups in result.groups.items():
        ids = [record.id for group in groups for record in group.records]
        nanos = [record.charged_nanos for group in groups for record in group.records]
        payloads = [payload for group in groups for payload in group.payloads]
        for begin in range(0, len(ids), ROWS_PER_ENTRY):
            entry += 1
            part = slice(begin, begin + ROWS_PER_ENTRY)
            entries.append((entry, transaction, account, -sum(nanos[part])))
            generations.append(zip(count(entry << ENTRY_BITS), ids[part], nanos[part], payloads[part]))
    if charged := result.charged_nanos:
        entries.append((entry + 1, transaction, REVENUE_BOOK, charged))
    db.executemany(INSERT_ENTRY, entries)
    db.executemany(_INSERT_GENERATION, chain.from_iterable(generations))


_INSERT_USAGE = "INSERT INTO transactions (kind, created_at_ms) VALUES ('usage', ?)"
_LAST_ENTRY = "SELECT COALESCE(MAX(number), 0) FROM entries"
_INSERT_GENERATION = "INSERT INTO generations (number, id, charged_nanos, record) VALUES (?, ?, ?, ?)"


def _write_refused(db: sqlite3.Connection, records: Iterable[Refused]) -> None:
    now_ms = int(time.time() * 1000)
    db.executemany(_INSERT_REFUSED, [(one.file, one.reason, one.generation_id, one.record, now_ms) for one in records])


_INSERT_REFUSED = "INSERT INTO refused_records (file, reason, generation_id, record, refused_at_ms) VALUES (?, ?, ?, ?, ?)"
_ADD_USED = """
INSERT INTO credits (account_id, total_nanos, purchased_nanos, used_nanos) VALUES (?, 0, 0, ?)
ON CONFLICT (account_id) DO UPDATE SET used_nanos = used_nanos + excluded.used_nanos
"""
_ADD_SETTLED = """
INSERT INTO leases (resource, incarnation, granted_nanos, settled_nanos) VALUES (?, ?, 0, ?)
ON CONFLICT (resource, incarnation) DO UPDATE SET settled_nanos = settled_nanos + excluded.settled_nanos
"""
_ADD_COUNTED = """
INSERT INTO leases (resource, incarnation, granted_nanos, settled_nanos) VALUES (?, ?, ?, 0)
ON CONFLICT (resource, incarnation) DO UPDATE SET granted_nanos = granted_nanos + excluded.granted_nanos
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
_ADD_ACTIVITY = """
INSERT INTO activity_daily VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (account_id, day, model, endpoint_id, provider) DO UPDATE SET
    requests = requests + excluded.requests, prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens,
    reasoning_tokens = reasoning_tokens + excluded.reasoning_tokens,
    cached_tokens = cached_tokens + excluded.cached_tokens, nanos = nanos + excluded.nanos
"""


async def generation_of(db: aiosqlite.Connection, generation_id: str) -> Generation | None:
    row = await row_of(db, "SELECT record FROM generations WHERE id = ?", (generation_id,))
    return decode(row[0]) if row else None


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
