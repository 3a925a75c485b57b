"""What must be true after every step, and what at the end, as an outsider reads it in the database and in the edges' books."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from gateway.control.store import REVENUE_BOOK
from tests.simulation.edge import SimEdge, SimExchange
from tests.simulation.machine import Failed


class Promises:
    """Watches one store. `expect` says what must come to be charged, `spent` what edges have spent ever, booked or not."""

    def __init__(self, database: Path, limits: dict[str, int]) -> None:
        self.expected: dict[str, int] = {}  # generation -> nanos
        self.spent: Counter[str] = Counter()  # by resource
        self._limits = limits  # key digest -> nanos per window
        self._db = sqlite3.connect(database, isolation_level=None)
        self._charged: dict[str, int] = {}  # as read so far
        self._last_number = -1
        self._version = -1
        self._rows: dict[tuple[str, str], tuple[int, int]] = {}
        self._refunded = 0
        self._debt: Counter[str] = Counter()  # what refunds took although an edge may have been spending it

    def close(self) -> None:
        self._db.close()

    def expect(self, exchange: SimExchange, nanos: int) -> None:
        """This exchange was served, or a mark of it left by a dead edge: so much must be charged, once."""
        assert exchange.hold is not None
        if exchange.generation_id in self.expected:
            raise Failed(f"{exchange.generation_id} ended twice")
        self.expected[exchange.generation_id] = nanos
        for resource in exchange.hold.resources:
            self.spent[resource] += nanos

    def check(self, edges: Iterable[SimEdge]) -> None:
        """At any instant. Raises Failed."""
        version = self._db.execute("PRAGMA data_version").fetchone()[0]
        if version != self._version:
            self._version = version
            self._db.execute("BEGIN")
            try:
                self._check_books()
                self._check_generations()
                self._check_leases()
            finally:
                self._db.execute("ROLLBACK")
        self._check_edges(list(edges))

    def uncharged(self) -> str:
        """What was served and is not in the books yet; "" when all of it is."""
        missing = sorted(self.expected.items() - self._charged.items())
        return f"served and not charged: {missing[:5]}" if missing else ""

    def has_debt(self, account: str) -> bool:
        """Whether a refund took what an edge may have been spending."""
        return self._debt[f"balance:{account}"] > 0

    def balances(self) -> dict[str, int]:
        return dict(self._db.execute("SELECT id, COALESCE(nanos, 0) FROM accounts LEFT JOIN balances ON book = id"))

    def references(self) -> set[str]:
        return {row[0] for row in self._db.execute("SELECT reference FROM transactions WHERE reference IS NOT NULL")}

    def used_of_key(self, digest: str, first_day: str) -> int:
        sql = "SELECT COALESCE(SUM(nanos), 0) FROM usage_daily WHERE key_digest = ? AND day >= ?"
        return int(self._db.execute(sql, (digest, first_day)).fetchone()[0])

    def leases(self) -> list[tuple[str, str, int, int]]:
        return self._db.execute("SELECT resource, incarnation, granted_nanos, settled_nanos FROM leases").fetchall()

    def uneven(self) -> str:
        """Which roll-ups do not add up to what was charged; "" when all do."""
        sums = ("SELECT SUM(nanos), SUM(requests) FROM usage_daily", "SELECT SUM(nanos), SUM(requests) FROM activity_daily",
                "SELECT SUM(nanos), SUM(requests) FROM key_totals", "SELECT SUM(charged_nanos), COUNT(*) FROM generations")  # fmt: skip
        found = {tuple(nanos or 0 for nanos in self._db.execute(sql).fetchone()) for sql in sums}
        return "" if len(found) == 1 else f"roll-ups say {sorted(found)}"

    def _check_books(self) -> None:
        books = dict(self._db.execute("SELECT book, nanos FROM balances"))
        if sum(books.values()):
            raise Failed(f"the books make {sum(books.values())} nanos, not 0")
        self._totals: dict[str, int] = {}
        used_by_all = 0
        for account, total, used in self._db.execute("SELECT account_id, total_nanos, used_nanos FROM credits"):
            self._totals[f"balance:{account}"] = total
            used_by_all += used
            if books.get(account, 0) != total - used:
                raise Failed(f"{account}: balance {books.get(account, 0)}, credit {total}, used {used}")
        if books.get(REVENUE_BOOK, 0) != used_by_all:
            raise Failed(f"revenue {books.get(REVENUE_BOOK, 0)}, used {used_by_all}")
        self._books = books

    def _check_generations(self) -> None:
        sql = "SELECT number, id, charged_nanos FROM generations WHERE number > ? ORDER BY number"
        for number, generation, nanos in self._db.execute(sql, (self._last_number,)):
            self._last_number = number
            if generation in self._charged:
                raise Failed(f"{generation} is charged twice")
            if self.expected.get(generation) != nanos:
                raise Failed(f"{generation} is charged {nanos}, served for {self.expected.get(generation)}")
            self._charged[generation] = nanos
        if self._books.get(REVENUE_BOOK, 0) != sum(self._charged.values()):
            raise Failed(f"revenue {self._books.get(REVENUE_BOOK, 0)}, generations {sum(self._charged.values())}")
        refused = self._db.execute("SELECT reason, generation_id FROM refused_records").fetchall()
        if refused:
            raise Failed(f"records were refused: {refused}")

    def _check_leases(self) -> None:
        self._rows = {(resource, name): (granted, settled) for resource, name, granted, settled in self.leases()}
        open_nanos: Counter[str] = Counter()
        for (resource, _), (granted, settled) in self._rows.items():
            open_nanos[resource] += max(0, granted - settled)
        refunded = self._db.execute("SELECT COUNT(*) FROM transactions WHERE kind = 'refund'").fetchone()[0]
        for resource in self._totals:
            balance = self._books.get(resource.removeprefix("balance:"), 0)
            short = open_nanos[resource] - balance
            if short > self._debt[resource]:
                if refunded == self._refunded:
                    raise Failed(f"{resource}: {open_nanos[resource]} leased of a balance of {balance}")
                self._debt[resource] = short
            if balance < -self._debt[resource]:
                raise Failed(f"{resource}: the balance is {balance}")
        self._refunded = refunded

    def _check_edges(self, edges: list[SimEdge]) -> None:
        may_spend = Counter(self.spent)
        for edge in edges:
            for resource in edge.book.standing():
                lease = edge.book.leases.get(resource)
                assert lease is not None
                granted, settled = self._rows.get((resource, edge.incarnation), (0, 0))
                if granted < lease.granted or settled > lease.spent or lease.held < 0:
                    raise Failed(f"{edge.incarnation} {resource}: control knows {granted} granted, {settled} settled; the edge {lease}")
                may_spend[resource] += lease.available + lease.held
        for resource, nanos in may_spend.items():
            if nanos > self._credit(resource) + self._debt[resource]:
                raise Failed(f"{resource}: {nanos} spent or to be spent of {self._credit(resource)}")

    def _credit(self, resource: str) -> int:
        if resource.startswith("balance:"):
            return self._totals.get(resource, 0)
        return self._limits[resource.split(":")[1]]


def holders(leases: Iterable[tuple[str, str, int, int]]) -> set[str]:
    return {incarnation for _, incarnation, _, _ in leases}
