"""LED-01: money is conserved at every instant, as anybody sees it who reads the database meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
import threading
from collections import Counter
from pathlib import Path

import pytest

from gateway.control.bookkeeper import Bookkeeper
from gateway.control.leases import releaser
from gateway.control.store import Account, CreditChange, CreditKind
from gateway.control.store.sqlite import SqliteStore
from gateway.domain.errors import BadRequest
from gateway.log import Log
from tests.control.journaling import Writer, generation

ACCOUNTS = [f"user_{name}" for name in "abcdefgh"]
WORKERS = 4
USD = 1_000_000_000

# Each makes no row as long as no nano appears or vanishes; one read transaction sees all of them at one instant.
IDENTITIES = {
    "all books together make nothing": "SELECT 1 WHERE (SELECT SUM(nanos) FROM balances) <> 0",
    "credits less usage are the balance": """
        SELECT 1 FROM credits c JOIN balances b ON b.book = c.account_id WHERE c.total_nanos - c.used_nanos <> b.nanos""",
    "what was used is the revenue": """
        SELECT 1 WHERE (SELECT SUM(used_nanos) FROM credits)
        <> (SELECT COALESCE(SUM(nanos), 0) FROM balances WHERE book = 'gateway:revenue')""",
    "leases are settled by what was spent of them": """
        SELECT 1 WHERE (SELECT COALESCE(SUM(settled_nanos), 0) FROM leases) <> (SELECT SUM(used_nanos) FROM credits)""",
}
# These read every entry and generation, so not each time.
WHOLE_IDENTITIES = {
    "each transaction makes nothing": "SELECT 1 FROM entries GROUP BY transaction_number HAVING SUM(amount_nanos) <> 0",
    "a balance is what its entries make": """
        SELECT b.book FROM balances b JOIN entries e ON e.book = b.book GROUP BY b.book HAVING SUM(e.amount_nanos) <> b.nanos""",
    "what was spent is what generations cost": """
        SELECT 1 WHERE (SELECT COALESCE(SUM(charged_nanos), 0) FROM generations)
        <> (SELECT COALESCE(SUM(nanos), 0) FROM balances WHERE book = 'gateway:revenue')""",
}
WHOLE_EVERY = 10


class Snapshots(threading.Thread):
    """Looks at the database from outside again and again until `ended`."""

    def __init__(self, database: Path, every_s: float) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.taken = 0
        self.broken: list[str] = []
        self._database = database
        self._every_s = every_s

    def run(self) -> None:
        with contextlib.closing(sqlite3.connect(f"file:{self._database}?mode=ro", uri=True, isolation_level=None)) as db:
            while not self.ended.wait(self._every_s):
                db.execute("BEGIN")
                wanted = IDENTITIES | (WHOLE_IDENTITIES if self.taken % WHOLE_EVERY == 0 else {})
                self.broken += [name for name, sql in wanted.items() if db.execute(sql).fetchall()]
                db.execute("COMMIT")
                self.taken += 1


class Bank:
    """Eight accounts, four edges that journal what they served, an operator; and the log of all that was done."""

    def __init__(self, folder: Path, store: SqliteStore, seed: int) -> None:
        self.store = store
        self.chance = random.Random(seed)
        self.balances: Counter[str] = Counter()
        self.edges = [Writer(folder / "journal", f"edge{n}", n) for n in range(WORKERS)]
        self.keeper = Bookkeeper(
            store=store, folder=folder / "journal", release=releaser(store), is_joined=lambda incarnation: True, log=Log("bank")
        )
        self.unanswered: CreditChange | None = None  # whether it was made is for the store to say
        self._references = 0

    async def serve(self, edge: Writer) -> None:
        while True:
            for _ in range(self.chance.randint(1, 30)):
                account, nanos = self.chance.choice(ACCOUNTS), self.chance.randint(0, 10**6)
                edge.append(generation(account, nanos, key_digest=f"digest-{account}"))
                self.balances[account] -= nanos
            self.keeper.wake()
            if edge.path.stat().st_size > 200_000:
                edge.rotate()
            await asyncio.sleep(0.003)

    async def operate(self) -> None:
        while True:
            account, other = self.chance.sample(ACCOUNTS, 2)
            nanos = self.chance.randint(1, USD)
            match self.chance.choice(["topup", "refund", "grant", "transfer"]):
                case "transfer":
                    await self.change("adjustment", account, -nanos)
                    await self.change("adjustment", other, nanos)
                case "topup":
                    await self.change("topup", account, nanos, fee_nanos=self.chance.randint(0, 1) * USD)
                case "refund":
                    await self.change("refund", account, -nanos)
                case _:
                    await self.change("grant", account, nanos)
            await asyncio.sleep(0.001)

    async def change(self, kind: CreditKind, account: str, nanos: int, *, fee_nanos: int = 0) -> None:
        self._references += 1
        reference = f"bank:{self._references}"
        self.unanswered = CreditChange(account_id=account, kind=kind, nanos=nanos, fee_nanos=fee_nanos, reference=reference)
        await self.answered()

    async def answered(self) -> None:
        """Make the change, again if need be: its reference makes it count once."""
        if self.unanswered is not None:
            with contextlib.suppress(BadRequest):  # a refund of more than was paid
                await self.store.change_credit(self.unanswered)
                self.balances[self.unanswered.account_id] += self.unanswered.nanos
            self.unanswered = None


async def conserved(folder: Path, *, seconds: float, every_s: float, seed: int) -> int:
    """Runs the bank; how many snapshots were taken, all of them whole."""
    store = await SqliteStore.open(folder / "gateway.db")
    try:
        bank = Bank(folder, store, seed)
        for account in ACCOUNTS:
            await store.create_account(Account(id=account, email=account, created_at_ms=1), [], topup_nanos=100 * USD)
            bank.balances[account] = 100 * USD
        snapshots = Snapshots(folder / "gateway.db", every_s)
        await bank.keeper.load()
        working = [asyncio.create_task(work) for work in (bank.keeper.run(), bank.operate(), *map(bank.serve, bank.edges))]
        snapshots.start()
        done, _ = await asyncio.wait(working, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        assert not done, [task.exception() for task in done]
        for task in working[1:]:
            task.cancel()
        await asyncio.wait(working[1:])
        await bank.answered()
        assert await bank.keeper.drained(30)
        working[0].cancel()
        await asyncio.wait(working[:1])
        snapshots.ended.set()
        await asyncio.to_thread(snapshots.join)
        assert snapshots.broken == []
        assert {account: await store.balance(account) for account in ACCOUNTS} == bank.balances, f"seed {seed}"
        report = await store.verify_ledger()
        assert report.ok and report.generations > 0, report
        return snapshots.taken
    finally:
        await store.close()


async def test_led_01_money_is_conserved_at_every_instant(tmp_path: Path) -> None:
    assert await conserved(tmp_path, seconds=3.0, every_s=0.02, seed=random.randrange(10**6)) > 10


@pytest.mark.soak
async def test_led_01_money_is_conserved_for_a_minute(tmp_path: Path) -> None:
    assert await conserved(tmp_path, seconds=60.0, every_s=0.03, seed=1) >= 1000
