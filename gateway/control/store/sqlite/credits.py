"""Credit that comes and goes other than by usage: each change once, by its reference, with its counter-entry."""

from __future__ import annotations

import aiosqlite

from gateway.control.store import (
    ADJUSTMENTS_BOOK,
    EXPIRED_BOOK,
    FEES_BOOK,
    FUNDING_BOOK,
    GRANTS_BOOK,
    CreditChange,
    CreditChanged,
    Expired,
)
from gateway.control.store.sqlite.accounts import require_account
from gateway.control.store.sqlite.database import row_of
from gateway.control.store.sqlite.ledger import BALANCE, credits_of, post
from gateway.domain import resources
from gateway.domain.errors import BadRequest, Conflict
from gateway.domain.money import AMOUNT_NANOS_MAX

REFERENCE_MAX = 200
COUNTER_BOOKS = {"topup": FUNDING_BOOK, "refund": FUNDING_BOOK, "grant": GRANTS_BOOK, "adjustment": ADJUSTMENTS_BOOK}


def require_sound(change: CreditChange) -> None:
    """Raises BadRequest."""
    if not 0 < abs(change.nanos) <= AMOUNT_NANOS_MAX:
        raise BadRequest("the amount is nothing or out of range")
    if change.kind != "adjustment" and (change.nanos < 0) != (change.kind == "refund"):
        raise BadRequest("a refund takes credit away, a top-up or grant gives some")
    if not 0 <= change.fee_nanos <= AMOUNT_NANOS_MAX or (change.fee_nanos and change.kind != "topup"):
        raise BadRequest("the fee is out of range, or not of a top-up")
    if not 0 < len(change.reference) <= REFERENCE_MAX:
        raise BadRequest(f"the reference must have 1 to {REFERENCE_MAX} characters")


async def change(db: aiosqlite.Connection, wish: CreditChange, now_ms: int) -> CreditChanged:
    """Within the transaction that `db` is in. Raises NotFound, BadRequest, Conflict."""
    require_sound(wish)
    await require_account(db, wish.account_id)
    lines = _lines(wish)
    before = [tuple(row) for row in await db.execute_fetchall(_POSTED, (wish.reference,))]
    if before:
        if before != sorted((wish.kind, *line) for line in lines):
            raise Conflict("this reference stands for another change of credit")
        row = await row_of(db, BALANCE, (wish.account_id,))
        assert row is not None
        return CreditChanged(balance_nanos=row[0], exists=True)
    if wish.kind == "refund" and -wish.nanos > (await credits_of(db, wish.account_id)).purchased_nanos:
        raise BadRequest("a refund of more than was paid")
    balances = await post(db, wish.kind, lines, reference=wish.reference, note=wish.note, now_ms=now_ms)
    return CreditChanged(balance_nanos=balances[wish.account_id])


def _lines(wish: CreditChange) -> list[tuple[str, int]]:
    lines = [(wish.account_id, wish.nanos), (COUNTER_BOOKS[wish.kind], -wish.nanos - wish.fee_nanos), (FEES_BOOK, wish.fee_nanos)]
    return [line for line in lines if line[1]]


_POSTED = """
SELECT t.kind, e.book, e.amount_nanos FROM transactions t JOIN entries e ON e.transaction_number = t.number
WHERE t.reference = ? ORDER BY 1, 2, 3
"""


async def expirable(db: aiosqlite.Connection, before_ms: int) -> list[str]:
    """Accounts that have more than they got since: what is oldest was used first, so the rest of it came before."""
    return [row[0] for row in await db.execute_fetchall(_EXPIRABLE, (before_ms,))]


# A refund counts as use of the oldest credit: what it was a refund of cannot be told, and this is in the account's favour.
_EXPIRABLE = """
SELECT b.book FROM balances b JOIN accounts a ON a.id = b.book LEFT JOIN (
    SELECT e.book, SUM(e.amount_nanos) AS nanos
    FROM entries e INDEXED BY entries_of_credit JOIN transactions t ON t.number = e.transaction_number
    WHERE t.kind <> 'usage' AND t.created_at_ms >= ? AND e.amount_nanos > 0 AND e.book >= 'user_' GROUP BY e.book
) young ON young.book = b.book
WHERE b.nanos > COALESCE(young.nanos, 0)
"""


async def expire(db: aiosqlite.Connection, account_id: str, *, before_ms: int, now_ms: int) -> Expired | None:
    """Within the transaction that `db` is in; None: nothing of the account can go now."""
    row = await row_of(db, _OLD, (before_ms, resources.balance(account_id), account_id))
    if row is None or row[0] <= 0:
        return None
    nanos = int(row[0])
    reference = f"expiry:{account_id}:{now_ms}"
    await post(db, "expiry", [(account_id, -nanos), (EXPIRED_BOOK, nanos)], reference=reference, note="", now_ms=now_ms)
    return Expired(account_id=account_id, nanos=nanos)


_OLD = """
SELECT b.nanos - MAX(
    COALESCE((
        SELECT SUM(e.amount_nanos) FROM entries e INDEXED BY entries_of_credit JOIN transactions t ON t.number = e.transaction_number
        WHERE e.book = b.book AND t.kind <> 'usage' AND t.created_at_ms >= ? AND e.amount_nanos > 0 AND e.book >= 'user_'
    ), 0),
    COALESCE((SELECT SUM(MAX(0, l.granted_nanos - l.settled_nanos)) FROM leases l WHERE l.resource = ?), 0)
)
FROM balances b WHERE b.book = ?
"""
