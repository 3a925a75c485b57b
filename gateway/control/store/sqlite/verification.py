"""Rebuilding from the entries everything that is kept beside them, and each usage entry from its generations.

What generations that were removed came to is left in their entries and in the daily sums, and these two must agree account by account;
all of them together must make what was noted when they went. Entries are read range by range, in the order they lie in: sorting
all of them by book at once would need more room than the ledger.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec

from gateway.control.store import OWN_BOOKS, LedgerReport
from gateway.control.store.sqlite.ledger import ENTRY_BITS, ROWS_PER_ENTRY
from gateway.domain.generation import decode

PROBLEMS_MAX = 100
RANGE = 100_000  # entries


def verify(db: sqlite3.Connection) -> LedgerReport:
    """On one snapshot of the database. For the connection's thread."""
    db.execute("BEGIN")
    try:
        return _Verification(db).report()
    finally:
        db.execute("ROLLBACK")


class _Verification:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._problems: list[str] = []
        self._difference_nanos = 0
        self._books: Counter[str] = Counter()
        self._used: Counter[str] = Counter()  # by account, as its usage entries say
        self._generations = 0
        self._last, self._last_nanos, self._removed, self._removed_nanos = db.execute(_RETENTION).fetchone()
        self._entry = self._last >> ENTRY_BITS  # of the last generation that was removed; it may have others left

    def report(self) -> LedgerReport:
        self._compare_entries()
        self._compare_removed()
        self._compare_sums()
        for number, total in self._db.execute(_UNBALANCED):
            self._differ(total or 0, f"transaction {number}: its entries make {total} nanos, not 0")
        accounts = {row[0] for row in self._db.execute("SELECT id FROM accounts")}
        for book in sorted(book for book in self._books if book not in accounts and not book.startswith(OWN_BOOKS)):
            self._differ(0, f"{book}: entries of an account that does not exist")
        return LedgerReport(
            ok=not self._problems,
            accounts=len(accounts),
            generations=self._generations,
            difference_nanos=self._difference_nanos,
            removed=self._removed,
            problems=tuple(self._problems[:PROBLEMS_MAX]),
        )

    def _differ(self, nanos: int, problem: str) -> None:
        self._difference_nanos += abs(nanos)
        self._problems.append(problem)

    def _compare_entries(self) -> None:
        """With their generations, range by range; what they make of each book and each account's usage is added up on the way."""
        first, last = self._db.execute("SELECT COALESCE(MIN(number), 1), COALESCE(MAX(number), 0) FROM entries").fetchone()
        for begin in range(first, last + 1, RANGE):
            end = min(begin + RANGE, last + 1)
            for book, nanos, used_nanos in self._db.execute(_SUMS, (begin, end)):
                self._books[book] += nanos
                if used_nanos is not None and not book.startswith(OWN_BOOKS):
                    self._used[book] -= used_nanos
            if end > self._entry:
                self._compare_charges(max(begin, self._entry), end)
        for generation_id, nanos, record in self._db.execute(_BEYOND, ((last + 1) << ENTRY_BITS, PROBLEMS_MAX)):
            self._differ(nanos, f"{_account_of(record)}: no usage entry charges {generation_id}")

    def _compare_charges(self, begin: int, end: int) -> None:
        """Entry by entry: what one of them lacks is not made up for by another."""
        numbers = {"first": max(begin << ENTRY_BITS, self._last + 1), "end_number": end << ENTRY_BITS}
        entries = {"begin": begin, "end": end, "entry": self._entry, "entry_nanos": self._last_nanos, "last": self._last}
        there = self._db.execute(_THERE, numbers).fetchone()[0]
        charged, wrong = self._db.execute(_CHARGED, entries).fetchone()
        self._generations += there
        if wrong:
            for book, entry, nanos, entered in self._db.execute(_CHARGES_THAT_DIFFER, entries):
                self._differ(nanos - entered, f"{book}: generations charge {nanos} nanos, their usage entry {entry} says {entered}")
        if charged != there:
            for generation_id, nanos, record in self._db.execute(_WITHOUT_ENTRY, {**numbers, "limit": PROBLEMS_MAX}):
                self._differ(nanos, f"{_account_of(record)}: no usage entry charges {generation_id}")

    def _compare_removed(self) -> None:
        entered = self._db.execute(_ENTERED_BEFORE, (self._entry,)).fetchone()[0]
        nanos = self._removed_nanos - self._last_nanos
        if entered != nanos:
            self._differ(entered - nanos, f"usage entries before {self._entry} say {entered} nanos, their removed generations made {nanos}")
        for generation_id, nanos, record in self._db.execute(_RETURNED, (self._last, PROBLEMS_MAX)):
            self._differ(nanos, f"{_account_of(record)}: {generation_id} is there, and counts as removed")

    def _compare_sums(self) -> None:
        credits = {row[0]: row[1:] for row in self._db.execute("SELECT account_id, total_nanos, used_nanos FROM credits")}
        accounts = {book: nanos for book, nanos in self._books.items() if not book.startswith(OWN_BOOKS)}
        for book, rebuilt, stored in _unequal(self._books, self._db.execute("SELECT book, nanos FROM balances")):
            self._differ(rebuilt - stored, f"{book}: entries make {rebuilt} nanos, the balance says {stored}")
        for account, rebuilt, stored in _unequal(accounts, ((account, total - used) for account, (total, used) in credits.items())):
            self._differ(rebuilt - stored, f"{account}: its credits less usage are {stored} nanos, its entries say {rebuilt}")
        for account, rebuilt, stored in _unequal(self._used, ((account, used) for account, (_, used) in credits.items())):
            self._differ(rebuilt - stored, f"{account}: its usage is {stored} nanos, its usage entries say {rebuilt}")
        for table, sums in _DAILY_SUMS.items():
            for account, rebuilt, stored in _unequal(self._used, self._db.execute(sums)):
                self._differ(rebuilt - stored, f"{account}: {table} makes {stored} nanos, its usage entries say {rebuilt}")
        for key, days, stored in _unequal(
            dict(self._db.execute(_DAYS_OF_KEYS)), self._db.execute("SELECT key_digest, nanos FROM key_totals")
        ):
            self._differ(days - stored, f"key {key}: its total is {stored} nanos, its days make {days}")


def _unequal(rebuilt: Mapping[str, int], stored: Iterable[tuple[str, int]]) -> list[tuple[str, int, int]]:
    """(name, rebuilt, stored) where these two differ; absent is 0."""
    kept = dict(stored)
    return [
        (name, rebuilt.get(name, 0), kept.get(name, 0))
        for name in sorted(rebuilt.keys() | kept.keys())
        if rebuilt.get(name, 0) != kept.get(name, 0)
    ]


def _account_of(record: bytes) -> str:
    try:
        return decode(record).account_id
    except msgspec.DecodeError:
        return "unknown account"


_RETENTION = "SELECT number, entry_nanos, generations, nanos FROM retention"
_SUMS = """
SELECT e.book, SUM(e.amount_nanos), SUM(CASE WHEN t.kind = 'usage' THEN e.amount_nanos END)
FROM entries e NOT INDEXED JOIN transactions t ON t.number = e.transaction_number
WHERE e.number >= ? AND e.number < ? GROUP BY e.book
"""
_THERE = "SELECT COUNT(*) FROM generations WHERE number >= :first AND number < :end_number"
# A usage entry of an account, and what its generations charge, with those of it that were removed.
_USAGE = f"""
SELECT e.book, e.number, -e.amount_nanos AS entered, COUNT(g.number) AS generations,
       COALESCE(SUM(g.charged_nanos), 0) + CASE WHEN e.number = :entry THEN :entry_nanos ELSE 0 END AS charged
FROM entries e NOT INDEXED JOIN transactions t ON t.number = e.transaction_number
    LEFT JOIN generations g ON g.number BETWEEN e.number << {ENTRY_BITS} AND (e.number << {ENTRY_BITS}) + {ROWS_PER_ENTRY - 1}
        AND +g.number > :last
WHERE e.number >= :begin AND e.number < :end AND t.kind = 'usage' AND e.book NOT LIKE 'gateway:%' GROUP BY e.number
"""  # noqa: S608
_CHARGED = f"""
SELECT COALESCE(SUM(generations), 0), COALESCE(SUM(charged <> entered), 0) FROM ({_USAGE})
"""  # noqa: S608
_CHARGES_THAT_DIFFER = f"""
SELECT book, number, charged, entered FROM ({_USAGE}) WHERE charged <> entered
"""  # noqa: S608
_WITHOUT_ENTRY = f"""
SELECT id, charged_nanos, record FROM generations g
WHERE number >= :first AND number < :end_number AND NOT EXISTS (
    SELECT 1 FROM entries e JOIN transactions t ON t.number = e.transaction_number
    WHERE e.number = g.number >> {ENTRY_BITS} AND t.kind = 'usage' AND e.book NOT LIKE 'gateway:%'
) LIMIT :limit
"""  # noqa: S608
_BEYOND = "SELECT id, charged_nanos, record FROM generations WHERE number >= ? LIMIT ?"
_RETURNED = "SELECT id, charged_nanos, record FROM generations WHERE number <= ? LIMIT ?"
_ENTERED_BEFORE = """
SELECT COALESCE(-SUM(e.amount_nanos), 0) FROM entries e NOT INDEXED JOIN transactions t ON t.number = e.transaction_number
WHERE e.number < ? AND t.kind = 'usage' AND e.book NOT LIKE 'gateway:%'
"""
_DAILY_SUMS = {
    "usage_daily": "SELECT account_id, SUM(nanos) FROM usage_daily GROUP BY account_id",
    "activity_daily": "SELECT account_id, SUM(nanos) FROM activity_daily GROUP BY account_id",
}
_DAYS_OF_KEYS = "SELECT key_digest, SUM(nanos) FROM usage_daily GROUP BY key_digest"
_UNBALANCED = """
SELECT t.number, SUM(e.amount_nanos) FROM transactions t LEFT JOIN entries e ON e.transaction_number = t.number
GROUP BY t.number HAVING SUM(e.amount_nanos) IS NOT 0 ORDER BY t.number
"""
