"""The double-entry ledger: posting one transaction, with what is kept beside the entries."""

from __future__ import annotations

from collections.abc import Sequence

import aiosqlite

from gateway.control.store import OWN_BOOKS, Credits, TransactionKind
from gateway.control.store.posting import OWN_BOOK_NANOS_MAX
from gateway.control.store.sqlite.database import row_of
from gateway.domain.errors import BadRequest
from gateway.domain.money import AMOUNT_NANOS_MAX

ENTRY_BITS = 12  # a generation's number is its entry's number shifted by this, plus its place
ROWS_PER_ENTRY = 1 << ENTRY_BITS
PURCHASES = frozenset({"topup", "refund"})


async def post(
    db: aiosqlite.Connection, kind: TransactionKind, lines: Sequence[tuple[str, int]], *, reference: str, note: str, now_ms: int
) -> dict[str, int]:
    """Append one transaction of (book, nanos) lines and carry the balances; the new balances by book.

    Raises BadRequest when a balance would leave its range.
    """
    assert sum(nanos for _, nanos in lines) == 0, "entries must sum to zero"
    assert kind != "usage", "usage is posted from the journal alone"
    cursor = await db.execute(_INSERT_TRANSACTION, (kind, reference, note, now_ms))
    transaction = cursor.lastrowid
    await cursor.close()
    balances: dict[str, int] = {}
    for book, nanos in lines:
        own = book.startswith(OWN_BOOKS)
        row = await row_of(db, BALANCE, (book,))
        balances[book] = (row[0] if row else 0) + nanos
        if abs(balances[book]) > (OWN_BOOK_NANOS_MAX if own else AMOUNT_NANOS_MAX):
            raise BadRequest("the balance would be out of range")
        await db.execute(INSERT_ENTRY, (None, transaction, book, nanos))
        await db.execute(SET_BALANCE, (book, balances[book]))
        if not own:
            await db.execute(_ADD_CREDITS, (book, nanos, nanos if kind in PURCHASES else 0))
    return balances


BALANCE = "SELECT nanos FROM balances WHERE book = ?"
_INSERT_TRANSACTION = "INSERT INTO transactions (kind, reference, note, created_at_ms) VALUES (?, ?, ?, ?)"
INSERT_ENTRY = "INSERT INTO entries (number, transaction_number, book, amount_nanos) VALUES (?, ?, ?, ?)"
SET_BALANCE = "INSERT INTO balances (book, nanos) VALUES (?, ?) ON CONFLICT (book) DO UPDATE SET nanos = excluded.nanos"
_ADD_CREDITS = """
INSERT INTO credits (account_id, total_nanos, purchased_nanos, used_nanos) VALUES (?, ?, ?, 0)
ON CONFLICT (account_id) DO UPDATE SET
    total_nanos = total_nanos + excluded.total_nanos, purchased_nanos = purchased_nanos + excluded.purchased_nanos
"""


async def credits_of(db: aiosqlite.Connection, account_id: str) -> Credits:
    row = await row_of(db, "SELECT total_nanos, purchased_nanos, used_nanos FROM credits WHERE account_id = ?", (account_id,))
    return Credits(total_nanos=row[0], purchased_nanos=row[1], used_nanos=row[2]) if row else Credits()
