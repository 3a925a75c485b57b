"""The money path through a real control process: grants over the real link, charges from real journals, and kill -9."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.domain import resources
from gateway.domain.keys import digest
from gateway.domain.metrics import Samples
from gateway.ledger.book import Book, Hold
from gateway.link.client import LinkClient
from gateway.link.messages import Back, Committed, Grant, Journaled, Standing, Want
from gateway.link.runtime import ADMIN, LINK
from tests.conftest import eventually
from tests.control.journaling import Writer, generation, rows
from tests.control.process import ControlProcess, write_config

USD = 1_000_000_000


@pytest.fixture
def control(tmp_path: Path) -> Iterator[ControlProcess]:
    with ControlProcess(write_config(tmp_path)) as control:
        yield control


class Edge:
    """An edge's half of the money path, by the shortest way."""

    def __init__(self, control: ControlProcess, incarnation: str, slot: int = 0) -> None:
        self.incarnation = incarnation
        self.book = Book()
        self.journal = Writer(control.config.parent / "var/journal", incarnation, slot)
        self.welcomed = asyncio.Event()
        self.grants: asyncio.Queue[Grant] = asyncio.Queue()
        self.funded: asyncio.Queue[str] = asyncio.Queue()
        self.recalled: asyncio.Queue[str] = asyncio.Queue()
        self.committed = 0
        self.progress = asyncio.Event()
        self.answers_recalls = True
        self.told = False
        self.link = LinkClient(
            address=str(control.runtime / LINK),
            slot=slot,
            incarnation=incarnation,
            pid=os.getpid(),
            samples=Samples,
            on_welcome=lambda catalog, incarnation: self._on_welcome(),
            on_key_changed=lambda digest, key: None,
            on_catalog=lambda catalog: None,
            on_lost=self.welcomed.clear,
            on_grant=self._on_grant,
            on_recall=self._on_recall,
            on_funded=self.funded.put_nowait,
            on_committed=self._on_committed,
        )

    async def want(self, resource: str, at_least: int, demand: int = 0) -> Grant:
        self.link.send(Want(resource, at_least, demand))
        async with asyncio.timeout(5):
            return await self.grants.get()

    def hold(self, resource: str, nanos: int) -> Hold:
        return self.book.hold((resource,), nanos, 0.0)

    def spend(self, account: str, nanos: int, **fields: Any) -> str:
        """Hold, journal and settle at once; the generation's id."""
        record = generation(account, nanos, **fields)
        self.journal.append(record)
        self.hold(resources.balance(account), nanos).settle(nanos)
        self.tell()
        return record.id

    def tell(self) -> None:
        if not self.told:
            self.told = True
            self.link.send(Journaled())

    async def until_committed(self) -> None:
        async with asyncio.timeout(10):
            while self.committed < self.journal.path.stat().st_size:
                self.progress.clear()
                await self.progress.wait()

    async def die(self) -> None:
        await self.link.stop()
        self.journal.die()

    def _on_welcome(self) -> None:
        self.told = False
        self.link.send(Standing(self.book.standing()))
        self.welcomed.set()

    def _on_grant(self, grant: Grant) -> None:
        if not grant.refused and not grant.unavailable:
            self.book.granted(grant.resource, grant.nanos, 0.0)
        self.grants.put_nowait(grant)

    def _on_recall(self, resource: str) -> None:
        self.recalled.put_nowait(resource)
        if self.answers_recalls:
            self.link.send(Back(resource, self.book.give_back(resource)))

    def _on_committed(self, committed: Committed) -> None:
        assert committed.file == self.journal.name
        self.committed, self.told = committed.offset, False
        self.progress.set()


JoinEdge = Callable[[str], Any]


@pytest.fixture
async def join(control: ControlProcess) -> AsyncIterator[JoinEdge]:
    edges: list[Edge] = []

    async def join(incarnation: str) -> Edge:
        edge = Edge(control, incarnation, len(edges))
        edges.append(edge)
        await edge.link.start()
        async with asyncio.timeout(5):
            await edge.welcomed.wait()
        return edge

    yield join
    for edge in edges:
        await edge.die()


@pytest.fixture
async def account(control: ControlProcess) -> str:
    _, made, _ = await control.ask(ADMIN, "POST", "/accounts", {"email": "ann@example.com", "usd": "10"})
    found: str = made["account_id"]
    return found


async def verified(control: ControlProcess) -> Any:
    return (await control.ask(ADMIN, "GET", "/ledger/verify"))[1]


def shown(metrics: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in metrics.splitlines() if line.partition(" ")[0].partition("{")[0] == name)


async def test_a_spent_grant_becomes_a_charge(control: ControlProcess, join: JoinEdge, account: str) -> None:
    edge = await join("a")
    assert (await edge.want(resources.balance(account), USD)).nanos == 5 * USD
    started_s = time.monotonic()
    for _ in range(5):
        edge.spend(account, USD // 5)
        await edge.until_committed()
    assert time.monotonic() - started_s < 3.5  # as told, and not at five looks of a second each
    assert rows(control.config.parent / "var/gateway.db", f"SELECT nanos FROM balances WHERE book = '{account}'") == [(9 * USD,)]
    assert await verified(control) == {"ok": True, "accounts": 1, "generations": 5, "difference_nanos": 0}
    _, metrics, _ = await control.ask(ADMIN, "GET", "/metrics")
    assert shown(metrics, "gateway_charged_usd_total") == 1.0
    assert shown(metrics, "gateway_journal_pending_records") == shown(metrics, "gateway_journal_oldest_seconds") == 0
    assert shown(metrics, "gateway_ledger_commit_seconds_count") == 5
    assert shown(metrics, "gateway_ledger_refused_records_total") == 0
    control.kill()
    await asyncio.to_thread(control.start)
    _, metrics, _ = await control.ask(ADMIN, "GET", "/metrics")
    assert shown(metrics, "gateway_charged_usd_total") == 1.0


async def test_what_one_edge_leaves_unused_another_gets(control: ControlProcess, join: JoinEdge, account: str) -> None:
    first, second = await join("a"), await join("b")
    balance = resources.balance(account)
    await first.want(balance, 9 * USD)
    hold = first.hold(balance, 3 * USD)
    assert (await second.want(balance, 7 * USD)).nanos == 7 * USD
    assert first.recalled.get_nowait() == balance
    second.hold(balance, 7 * USD)
    grant = await second.want(balance, 1)
    assert (grant.refused, grant.free_nanos) == (True, 0)
    hold.release()
    assert (await second.want(balance, 3 * USD)).nanos == 3 * USD
    first.answers_recalls = second.answers_recalls = False
    started_s = time.monotonic()
    assert (await first.want(balance, 1)).refused
    assert 0.2 < time.monotonic() - started_s < 4.0  # and not for ever


async def test_after_a_kill_control_believes_what_edges_say(control: ControlProcess, join: JoinEdge, account: str) -> None:
    edges = [await join(name) for name in "abc"]
    balance = resources.balance(account)
    for edge in edges:
        await edge.want(balance, 2 * USD)
    edges[0].hold(balance, USD)
    for _ in range(3):
        control.kill()
        await asyncio.to_thread(control.start)
        for edge in edges:
            async with asyncio.timeout(5):
                await edge.welcomed.wait()
        granted = sum(edge.book.standing()[balance] for edge in edges)
        refused = await edges[2].want(balance, 10 * USD)  # with a recall of what the others have unused
        assert refused.refused
        assert refused.free_nanos == 10 * USD - sum(edge.book.standing()[balance] for edge in edges) <= 10 * USD - granted + 3 * USD
        for edge in edges[:2]:
            await edge.want(balance, USD // 2)
    assert edges[0].book.available(balance) >= USD // 2


async def test_funds_and_keys_are_announced(control: ControlProcess, join: JoinEdge, account: str) -> None:
    edge = await join("a")
    balance = resources.balance(account)
    assert (await edge.want(balance, 11 * USD)).refused
    await control.ask(ADMIN, "POST", "/credits", {"account_id": account, "usd": "5"})
    async with asyncio.timeout(5):
        assert await edge.funded.get() == balance
    assert (await edge.want(balance, 11 * USD)).nanos >= 11 * USD
    wish = {"account_id": account, "name": "ci", "limit": "2", "limit_reset": "daily"}
    _, key, _ = await control.ask(ADMIN, "POST", "/keys", wish)
    limit = resources.key_limit(digest(key["key"]), "daily", time.time())
    async with asyncio.timeout(5):
        assert await edge.funded.get() == limit
    grant = await edge.want(limit, 3 * USD)
    assert (grant.refused, grant.free_nanos) == (True, 2 * USD)
    found: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    edge.link.find_key(digest(key["key"]), found.set_result)
    record = (await found).key
    assert (record.limit_nanos, record.limit_reset) == (2 * USD, "daily")


async def test_a_dead_edge_s_rest_is_returned_and_its_file_goes(control: ControlProcess, join: JoinEdge, account: str) -> None:
    doomed, other = await join("doomed"), await join("other")
    balance = resources.balance(account)
    await doomed.want(balance, 10 * USD)
    doomed.spend(account, 4 * USD)
    doomed.journal.write(b"\0\0\1\0half a record")
    await doomed.die()
    died_s = time.monotonic()
    await control.ask(ADMIN, "POST", "/reaped", {"slot": 0, "incarnation": "doomed"})
    async with asyncio.timeout(10):
        while await other.funded.get() != balance:
            pass
    assert time.monotonic() - died_s < 2
    await eventually(lambda: not doomed.journal.path.exists())
    assert (await other.want(balance, 6 * USD)).nanos == 6 * USD

    def cuts() -> list[int]:
        return [line["bytes"] for line in control.log() if line["event"] == "journal_cut"]

    await eventually(cuts)  # the log is written a moment later
    assert cuts() == [len(b"\0\0\1\0half a record")]


@pytest.mark.parametrize("seed", range(2))
async def test_led_06_each_record_counts_once_over_kill_9(control: ControlProcess, join: JoinEdge, account: str, seed: int) -> None:
    chance = random.Random(seed)
    edges = [await join(name) for name in "ab"]
    written: dict[str, int] = {}

    async def spend(edge: Edge) -> None:
        while True:
            for _ in range(chance.randint(1, 40)):
                record = generation(account, chance.randint(0, 1000))
                edge.journal.append(record)
                written[record.id] = record.charged_nanos
            edge.tell()
            if edge.journal.path.stat().st_size > 200_000:
                edge.journal.rotate()
            await asyncio.sleep(0.002)

    for edge in edges:
        edge.link.on_committed = lambda committed, edge=edge: setattr(edge, "told", False)
    spending = [asyncio.create_task(spend(edge)) for edge in edges]
    for _ in range(4):
        await asyncio.sleep(chance.uniform(0, 0.4))
        await asyncio.to_thread(control.kill)
        await asyncio.to_thread(control.start)
    for task in spending:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
    report = await verified(control)
    assert (report["ok"], report["generations"]) == (True, len(written))
    database = control.config.parent / "var/gateway.db"
    assert dict(rows(database, "SELECT id, charged_nanos FROM generations")) == written
    assert rows(database, f"SELECT nanos FROM balances WHERE book = '{account}'") == [(10 * USD - sum(written.values()),)]
    assert rows(database, "SELECT COUNT(*) FROM refused_records") == [(0,)]
    assert rows(database, "PRAGMA integrity_check") == [("ok",)]
    assert {line["event"] for line in control.log()}.isdisjoint({"generations_exist", "journal_cut", "leases_failed"})


async def test_a_stopped_control_leaves_nothing_behind_of_edges_that_ended(control: ControlProcess, join: JoinEdge, account: str) -> None:
    edge = await join("a")
    await edge.want(resources.balance(account), USD)
    edge.spend(account, USD)
    await edge.die()
    assert await asyncio.to_thread(control.terminate) == 0
    database = control.config.parent / "var/gateway.db"
    assert rows(database, "SELECT (SELECT COUNT(*) FROM leases), (SELECT COUNT(*) FROM generations)") == [(0, 1)]
    assert list((control.config.parent / "var/journal").iterdir()) == []


def verify(config: Path) -> tuple[int, Any]:
    command = [sys.executable, "-m", "gateway", "ledger", "verify", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, json.loads(done.stdout)


async def test_verifying_waits_for_the_journals(control: ControlProcess, join: JoinEdge, account: str) -> None:
    edge = await join("a")
    await edge.want(resources.balance(account), USD)
    for number in range(1, 4):
        edge.spend(account, USD)
        code, report = await asyncio.to_thread(verify, control.config)
        assert (code, report["ok"], report["generations"]) == (0, True, number)
    edge.journal.write(b"\0\0")  # in the middle of a write, for ever
    code, report = await asyncio.to_thread(verify, control.config)
    assert (code, report["ok"], report["generations"]) == (2, None, 3)
