"""Removal in a running control: killed in the middle of it, asked to stop in the middle of it, and charging all the while."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path

import msgspec
import pytest

from gateway.control.chores import DAY_MS
from gateway.control.store import JournalSlice, LedgerReport
from gateway.control.store.sqlite import SqliteStore
from gateway.link.runtime import ADMIN
from tests.control.journaling import Writer, generation, move_back, rows
from tests.control.process import ControlProcess, write_config
from tests.control.test_removal import COUNT, GONE, now_ms

OLD = 60_000  # takes control a few seconds
YEAR_MS = 365 * DAY_MS


class Premises:
    """A control that is not running, with an account that has old generations and a setting that has them removed."""

    def __init__(self, folder: Path) -> None:
        self.config = write_config(folder)
        self.config.write_text(self.config.read_text() + "[store]\ngenerations_days = 30\n")
        self.database = folder / "var/gateway.db"
        self.control = ControlProcess(self.config)
        self.writers = 0

    async def found(self) -> None:
        await asyncio.to_thread(self.control.start)
        _, made, _ = await self.control.ask(ADMIN, "POST", "/accounts", {"email": "ann@example.com", "usd": "1"})
        self.account = made["account_id"]
        assert await asyncio.to_thread(self.control.terminate) == 0
        self.control.pulse.close()
        store = await SqliteStore.open(self.database)
        records = [
            msgspec.msgpack.encode(generation(self.account, 3, key_digest="k", created_at_ms=now_ms() - YEAR_MS)) for _ in range(OLD)
        ]
        for begin in range(0, OLD, 2000):
            piece = JournalSlice("edge-0-old.1", "old", begin, begin + 2000, records[begin : begin + 2000])
            assert (await store.apply_journal([piece])).generations == 2000
        await store.forget_journals(["edge-0-old.1"])
        await store.close()
        move_back(self.database, YEAR_MS)

    async def until(self, sql: str, value: int, seconds: float = 30) -> None:
        """A figure of the store, as another process sees it, is this at least."""
        async with asyncio.timeout(seconds):
            while (rows(self.database, sql)[0][0] or 0) < value:
                await asyncio.sleep(0.01)

    def append(self, count: int) -> Writer:
        self.writers += 1
        edge = Writer(self.database.parent / "journal", f"edge{self.writers}")
        edge.append(*(generation(self.account, 5, key_digest="k", created_at_ms=now_ms()) for _ in range(count)))
        return edge

    async def verified(self) -> LedgerReport:
        """By an operator, with control away."""
        store = await SqliteStore.open(self.database)
        try:
            return await store.verify_ledger()
        finally:
            await store.close()

    @property
    def gone(self) -> int:
        return int(rows(self.database, GONE)[0][0])


@pytest.fixture
async def premises(tmp_path: Path) -> Premises:
    premises = Premises(tmp_path)
    await premises.found()
    return premises


async def test_a_removal_that_is_killed_anywhere_goes_on_and_charging_never_stops(premises: Premises) -> None:
    posted = 0
    for kill in range(3):
        before = premises.gone
        with ControlProcess(premises.config) as control:
            await premises.until("SELECT generations FROM retention", before + 1)
            premises.append(10)
            posted += 10
            await premises.until(f"{COUNT} WHERE charged_nanos = 5", posted)
            assert premises.gone < OLD
            await asyncio.sleep(0.003 * kill)  # somewhere else in a chunk or a rest
            control.kill()
        assert rows(premises.database, "PRAGMA integrity_check") == [("ok",)]
        gone = premises.gone
        assert before < gone < OLD
        report = await premises.verified()
        assert (report.ok, report.generations, report.removed) == (True, OLD - gone + posted, gone)
    with ControlProcess(premises.config) as control:
        await premises.until("SELECT generations FROM retention", OLD)
        _, metrics, _ = await control.ask(ADMIN, "GET", "/metrics")
        [shown] = [line for line in metrics.splitlines() if line.startswith("gateway_generations_removed_total ")]
        assert float(shown.split()[1]) >= OLD - gone
        report, status = (await control.ask(ADMIN, "GET", "/ledger/verify"))[1::-1]
        assert (status, report["ok"], report["generations"], report["removed"]) == (200, True, posted, OLD)
    assert rows(premises.database, "SELECT requests, nanos FROM key_totals") == [(OLD + posted, 3 * OLD + 5 * posted)]
    assert rows(premises.database, "SELECT COUNT(*) FROM refused_records") == [(0,)]


async def test_control_ends_when_asked_in_the_middle_of_a_removal(premises: Premises) -> None:
    with ControlProcess(premises.config) as control:
        await premises.until("SELECT generations FROM retention", 1)
        assert await asyncio.to_thread(control.terminate) == 0
    with contextlib.closing(sqlite3.connect(premises.database)):
        assert 0 < premises.gone < OLD
    assert (await premises.verified()).ok
