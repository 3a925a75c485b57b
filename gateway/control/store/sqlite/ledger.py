"""The double-entry ledger: posting one transaction, and rebuilding everything that is kept beside the entries."""

from __future__ import annotations

from collections.abc import Sequence

import aiosqlite
import msgspec

from gateway.control.store import OWN_BOOKS, Credits, LedgerReport, TransactionKind
from gateway.control.store.posting import OWN_BOOK_NANOS_MAX
from gateway.control.store.sqlite.database import row_of
from gateway.domain.errors import BadRequest
from gateway.domain.generation import decode
from gateway.domain.money import AMOUNT_NANOS_MAX

PROBLEMS_MAX = 100
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


async def verify(db: aiosqlite.Connection) -> LedgerReport:
    """Rebuild balances, credits and charges from the entries, within the transaction that `db` is in."""
    problems: list[str] = []
    difference_nanos = 0
    for book, rebuilt, stored in await db.execute_fetchall(_BOOKS_THAT_DIFFER):
        difference_nanos += abs(rebuilt - stored)
        problems.append(f"{book}: entries make {rebuilt} nanos, the balance says {stored}")
    for account, entry, charged, entered in await db.execute_fetchall(_CHARGES_THAT_DIFFER):
        difference_nanos += abs(charged - entered)
        problems.append(f"{account}: generations charge {charged} nanos, their usage entry {entry} says {entered}")
    for account, used, entered in await db.execute_fetchall(_CREDITS_THAT_DIFFER):
        difference_nanos += abs(used - entered)
        problems.append(f"{account}: its credits less usage are {used} nanos, its entries say {entered}")
    for generation_id, nanos, record in await db.execute_fetchall(_WITHOUT_ENTRY, (PROBLEMS_MAX,)):
        difference_nanos += nanos
        problems.append(f"{_account_of(record)}: no usage entry charges {generation_id}")
    for number, total in await db.execute_fetchall(_UNBALANCED):
        difference_nanos += abs(total or 0)
        problems.append(f"transaction {number}: its entries make {total} nanos, not 0")
    for (book,) in await db.execute_fetchall(_UNKNOWN_BOOKS, (OWN_BOOKS + "%",)):
        problems.append(f"{book}: entries of an account that does not exist")
    accounts = await row_of(db, "SELECT COUNT(*) FROM accounts", ())
    generations = await row_of(db, "SELECT COUNT(*) FROM generations", ())
    assert accounts and generations
    return LedgerReport(
        ok=not problems,
        accounts=accounts[0],
        generations=generations[0],
        difference_nanos=difference_nanos,
        problems=tuple(problems[:PROBLEMS_MAX]),
    )


def _account_of(record: bytes) -> str:
    try:
        return decode(record).account_id
    except msgspec.DecodeError:
        return "unknown account"


_BOOKS_THAT_DIFFER = """
SELECT book, SUM(rebuilt) AS rebuilt, SUM(stored) AS stored FROM (
    SELECT book, amount_nanos AS rebuilt, 0 AS stored FROM entries
    UNION ALL SELECT book, 0, nanos FROM balances
) GROUP BY book HAVING SUM(rebuilt) <> SUM(stored) ORDER BY book
"""
# Entry by entry: what one of them lacks is not made up for by another.
_CHARGES_THAT_DIFFER = f"""
SELECT book, number, charged, entered FROM (
    SELECT e.book, e.number, -e.amount_nanos AS entered, COALESCE((
        SELECT SUM(g.charged_nanos) FROM generations g
        WHERE g.number BETWEEN e.number << {ENTRY_BITS} AND (e.number << {ENTRY_BITS}) + {ROWS_PER_ENTRY - 1}
    ), 0) AS charged
    FROM entries e JOIN transactions t ON t.number = e.transaction_number WHERE t.kind = 'usage' AND e.book NOT LIKE 'gateway:%'
) WHERE charged <> entered ORDER BY book, number
"""  # noqa: S608
_WITHOUT_ENTRY = f"""
SELECT id, charged_nanos, record FROM generations g WHERE NOT EXISTS (
    SELECT 1 FROM entries e JOIN transactions t ON t.number = e.transaction_number
    WHERE e.number = g.number >> {ENTRY_BITS} AND t.kind = 'usage' AND e.book NOT LIKE 'gateway:%'
) LIMIT ?
"""  # noqa: S608
_CREDITS_THAT_DIFFER = """
SELECT account, SUM(counted) AS counted, SUM(stored) AS stored FROM (
    SELECT account_id AS account, total_nanos - used_nanos AS counted, 0 AS stored FROM credits
    UNION ALL SELECT book, 0, amount_nanos FROM entries WHERE book NOT LIKE 'gateway:%'
) GROUP BY account HAVING SUM(counted) <> SUM(stored) ORDER BY account
"""
_UNBALANCED = """
SELECT t.number, SUM(e.amount_nanos) FROM transactions t LEFT JOIN entries e ON e.transaction_number = t.number
GROUP BY t.number HAVING SUM(e.amount_nanos) IS NOT 0 ORDER BY t.number
"""
_UNKNOWN_BOOKS = "SELECT DISTINCT book FROM entries WHERE book NOT LIKE ? AND book NOT IN (SELECT id FROM accounts) ORDER BY book"
