"""Removing generations, oldest first: their entries stay, and one row says how far it went and what they came to.

A generation's age is that of its transaction. So rows go in the order of their numbers, from the front of the table and of the index
of ids, and the pages they leave are used again for what is posted next: the file does not grow any more, and does not shrink either.
"""

from __future__ import annotations

import sqlite3

from gateway.control.store.sqlite.ledger import ENTRY_BITS


def horizon_ms(db: sqlite3.Connection) -> int:
    """Records of exchanges that ended before this may have been posted and removed."""
    return int(db.execute("SELECT horizon_ms FROM retention").fetchone()[0])


def remove(db: sqlite3.Connection, before_ms: int, limit: int) -> int:
    """Remove up to `limit` generations that were posted before `before_ms`, in one transaction; how many. For the connection's thread."""
    db.execute("BEGIN IMMEDIATE")
    try:
        last, entry_nanos = db.execute("SELECT number, entry_nanos FROM retention").fetchone()
        number, entry = last, last >> ENTRY_BITS
        count = nanos = last_ms = 0
        for each, charged, posted_ms in db.execute(_OLDEST, (last, limit)).fetchall():
            if posted_ms is None or posted_ms >= before_ms:  # None: no entry charges it, which is for `ledger verify` to tell
                break
            if each >> ENTRY_BITS != entry:
                entry, entry_nanos = each >> ENTRY_BITS, 0
            number, count, nanos, entry_nanos = each, count + 1, nanos + charged, entry_nanos + charged
            last_ms = max(last_ms, posted_ms)
        if count:
            db.execute("DELETE FROM generations WHERE number > ? AND number <= ?", (last, number))
            # From what was posted, not from the clock: one that was a year ahead for a minute must not have all records refused for a year.
            db.execute(_NOTE, (number, entry_nanos, count, nanos, last_ms + 1))
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise
    return count


_OLDEST = f"""
SELECT g.number, g.charged_nanos, t.created_at_ms
FROM generations g LEFT JOIN entries e ON e.number = g.number >> {ENTRY_BITS} LEFT JOIN transactions t ON t.number = e.transaction_number
WHERE g.number > ? ORDER BY g.number LIMIT ?
"""  # noqa: S608
_NOTE = """
UPDATE retention SET number = ?, entry_nanos = ?, generations = generations + ?, nanos = nanos + ?, horizon_ms = MAX(horizon_ms, ?)
"""
