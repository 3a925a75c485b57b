"""Leases within a transaction: what there is of a resource, who was granted how much, and writing that down."""

from __future__ import annotations

from collections.abc import Iterable

import aiosqlite

from gateway.control.store import NOBODY, LeaseRow
from gateway.control.store.sqlite.database import listed, row_of
from gateway.domain import resources


class SqliteLeaseBook:
    """`LeaseBook` on a connection that is within a transaction."""

    def __init__(self, db: aiosqlite.Connection) -> None:
        self._db = db

    async def totals(self, wanted: Iterable[str]) -> dict[str, int]:
        wanted = list(wanted)
        accounts = {name.removeprefix("balance:"): name for name in wanted if name.startswith("balance:")}
        keys = [name for name in wanted if name.startswith("key:")]
        quotas: dict[str, list[str]] = {}
        for name in filter(resources.is_quota, wanted):
            quotas.setdefault(resources.account_of(name), []).append(name)
        found = {accounts[row[0]]: row[1] for row in await self._db.execute_fetchall(_ACCOUNTS, (listed(accounts),))}
        if quotas:
            bought = await self._db.execute_fetchall(_BOUGHT, (listed(quotas),))
            found.update((name, row[1]) for row in bought for name in quotas[row[0]])
        if keys:
            found.update((row[0], row[1]) for row in await self._db.execute_fetchall(_LIMITS, (listed(keys),)))
        return found

    async def rows(self, *, resources: Iterable[str], incarnations: Iterable[str]) -> list[LeaseRow]:
        rows = await self._db.execute_fetchall(_ROWS, (listed(resources), listed(incarnations)))
        return [LeaseRow(*row) for row in rows]

    async def write(self, rows: Iterable[LeaseRow]) -> None:
        await self._db.executemany(_WRITE, [(row.resource, row.incarnation, row.granted_nanos) for row in rows])

    async def delete(self, incarnation: str) -> None:
        await self._db.execute("DELETE FROM leases WHERE incarnation = ?", (incarnation,))


_ACCOUNTS = """
SELECT a.id, COALESCE(b.nanos, 0) FROM accounts a LEFT JOIN balances b ON b.book = a.id
WHERE a.id IN (SELECT value FROM json_each(?))
"""
_BOUGHT = """
SELECT a.id, COALESCE(c.purchased_nanos, 0) FROM accounts a LEFT JOIN credits c ON c.account_id = a.id
WHERE a.id IN (SELECT value FROM json_each(?))
"""
# `key:<digest>:<first day of the window>`: a digest is 64 characters, no day means all time.
_LIMITS = """
SELECT wanted.name, k.limit_nanos - CASE
    WHEN wanted.first_day = '' THEN COALESCE((SELECT nanos FROM key_totals t WHERE t.key_digest = k.digest), 0)
    ELSE COALESCE((SELECT SUM(nanos) FROM usage_daily u WHERE u.key_digest = k.digest AND u.day >= wanted.first_day), 0)
END
FROM (SELECT value AS name, substr(value, 5, instr(substr(value, 5), ':') - 1) AS digest,
             substr(value, 5 + instr(substr(value, 5), ':')) AS first_day FROM json_each(?)) wanted
JOIN keys k ON k.digest = wanted.digest WHERE k.limit_nanos IS NOT NULL
"""
_ROWS = """
SELECT resource, incarnation, granted_nanos, settled_nanos FROM leases WHERE resource IN (SELECT value FROM json_each(?))
UNION
SELECT resource, incarnation, granted_nanos, settled_nanos FROM leases WHERE incarnation IN (SELECT value FROM json_each(?))
"""
_WRITE = """
INSERT INTO leases (resource, incarnation, granted_nanos, settled_nanos) VALUES (?, ?, ?, 0)
ON CONFLICT (resource, incarnation) DO UPDATE SET granted_nanos = excluded.granted_nanos
"""


async def free_requests_of(db: aiosqlite.Connection, account_id: str, now_s: float) -> int:
    row = await row_of(db, _USED, (resources.free_day(account_id, now_s), NOBODY))
    return int(row[0]) if row is not None else 0


_USED = "SELECT granted_nanos FROM leases WHERE resource = ? AND incarnation = ?"


async def forget_windows(db: aiosqlite.Connection, now_s: float) -> int:
    """Rows of an edge that gave back all it did not use are equal; those of no edge say what was used up."""
    found = await db.execute_fetchall(_WINDOWS)
    over = sorted({row[0] for row in found if resources.is_over(row[0], now_s - resources.CLOCKS_S)})
    if over:
        await db.execute(_FORGET, (listed(over), NOBODY))
    return len(over)


_WINDOWS = """
SELECT DISTINCT resource FROM leases
WHERE resource >= 'free-day:' AND resource < 'free-day;' OR resource >= 'key:' AND resource < 'key;'
"""
_FORGET = """
DELETE FROM leases WHERE resource IN (SELECT value FROM json_each(?)) AND (incarnation = ? OR granted_nanos = settled_nanos)
"""
