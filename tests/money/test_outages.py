"""The books in hard times: their writer held still (OVL-06), copied while they are written (OPS-07), everybody killed (LED-07)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from gateway import cli
from gateway.domain.money import format_usd
from tests.conftest import eventually
from tests.edge.stage import Answered
from tests.money.shop import PLAIN, Account, Shop, opened, priced, sim, stored
from tests.timing import again_if_untimely, in_time

MIB = 1 << 20
JOURNAL_BYTES_MAX = 100_000
CALLERS = 8
COST_NANOS = priced(PLAIN, {"prompt": 2, "completion": 3})
ASKED = sim(tokens=3)


class Load:
    """What callers got who ask all the time."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.served: set[str] = set()  # generations that a caller has read to the end
        self.retry_after: set[str | None] = set()  # of those who were refused
        self.broken = 0

    def take(self, answered: Answered) -> None:
        self.statuses[answered.status] += 1
        if answered.status == 200 and (answered.body.endswith(b"[DONE]\n\n") or b'"usage"' in answered.body):
            self.served.add(answered.headers["X-Generation-Id"])
        elif answered.status != 200:
            self.retry_after.add(answered.headers.get("Retry-After"))


@contextlib.asynccontextmanager
async def loaded(shop: Shop, account: Account | None = None) -> AsyncIterator[Load]:
    """Callers of streams and of whole answers in the block; those whose connection breaks go on at once."""
    load, done = Load(), asyncio.Event()

    async def ask(number: int) -> None:
        while not done.is_set():
            try:
                load.take(await shop.ask(account=account, stream=bool(number % 2), **ASKED))
            except (aiohttp.ClientError, OSError):
                load.broken += 1
                await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as tasks:
        for number in range(CALLERS):
            tasks.create_task(ask(number))
        try:
            yield load
        finally:
            done.set()


def journal_bytes(shop: Shop) -> int:
    return sum(path.stat().st_size for path in (shop.gateway.folder / "journal").iterdir())


@pytest.mark.parametrize("stopped_s", [1.5, pytest.param(30.0, marks=pytest.mark.soak)])
async def test_ovl_06_while_the_ledgers_writer_is_held_still_nothing_grows_and_nothing_is_lost(tmp_path: Path, stopped_s: float) -> None:
    settings = {"journal": {"bytes_max": JOURNAL_BYTES_MAX}, "server": {"hang_s": 0}}
    async with opened(tmp_path, settings=settings) as shop:
        edge = shop.edge
        await shop.ask(**ASKED)
        control = shop.gateway.logged("process_ready", role="control")["child"]
        rss = edge.memory_info().rss
        async with loaded(shop) as load:
            await eventually(lambda: load.statuses[200] > 50)
            os.kill(control, signal.SIGSTOP)
            written = journal_bytes(shop)
            try:
                stopped = time.monotonic()
                await eventually(lambda: load.statuses[503] > 50, 60.0)
                await asyncio.sleep(stopped_s - (time.monotonic() - stopped))
                assert journal_bytes(shop) - written <= JOURNAL_BYTES_MAX + CALLERS * 1000  # and what was admitted before
                assert edge.memory_info().rss - rss <= 64 * MIB
                called, served = shop.good.books.requests, len(load.served)
                await asyncio.sleep(0.3)
                assert (shop.good.books.requests, len(load.served)) == (called, served)
            finally:
                os.kill(control, signal.SIGCONT)
            served = load.statuses[200]
            await eventually(lambda: load.statuses[200] > served + 50)
        assert set(load.statuses) == {200, 503} and not load.broken
        assert all(int(each or 0) >= 1 for each in load.retry_after)
        await shop.until_used((1 + len(load.served)) * COST_NANOS)
        assert load.served < set(stored(shop.gateway)) and len(stored(shop.gateway)) == 1 + len(load.served)
        assert (await shop.verify())["ok"]


@pytest.mark.parametrize("copies", [3, pytest.param(50, marks=pytest.mark.soak)])
async def test_ops_07_a_copy_made_online_under_load_is_consistent_and_can_be_served_from(tmp_path: Path, copies: int) -> None:
    async with opened(tmp_path / "first") as shop:
        database = shop.gateway.folder / "gateway.db"
        sizes = []
        assert (await shop.ask(**ASKED)).status == 200
        await shop.until_used(COST_NANOS)  # then every copy has something in it
        async with loaded(shop) as load:
            for number in range(copies):
                served = load.statuses[200]
                await eventually(lambda served=served: load.statuses[200] > served + 50)  # type: ignore[misc]
                sizes.append(await asyncio.to_thread(copy, database, tmp_path / f"{number}.db"))
        assert set(load.statuses) == {200} and not load.broken
        assert sizes == sorted(sizes) and sizes[0] > 0
        await shop.until_used((1 + load.statuses[200]) * COST_NANOS)
    for number in range(copies):
        (folder := tmp_path / f"restored-{number}").mkdir()
        shutil.move(tmp_path / f"{number}.db", folder / "gateway.db")
        (folder / "gateway.toml").write_text('[store]\nurl = "sqlite:///gateway.db"\n')
        assert await asyncio.to_thread(cli.main, ["ledger", "verify", "--config", str(folder / "gateway.toml")]) == 0


def copy(source: Path, target: Path) -> int:
    """SQLite's own online backup; the number of generations in the copy."""
    with contextlib.ExitStack() as opened:
        live = opened.enter_context(contextlib.closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)))
        made = opened.enter_context(contextlib.closing(sqlite3.connect(target)))
        live.backup(made, pages=16, sleep=0.001)
        (found,) = made.execute("SELECT COUNT(*) FROM generations").fetchone()
        assert made.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    return int(found)


@pytest.mark.parametrize("rounds", [2, pytest.param(100, marks=pytest.mark.soak)])
@again_if_untimely
async def test_led_07_the_ledger_survives_the_death_of_every_process_under_load(tmp_path: Path, rounds: int) -> None:
    chance, back_s = random.Random(7), []
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    async with opened(folder, settings={"journal": {"fsync": "always"}}) as shop:
        account = await shop.new_account("all@example.com", format_usd(10**12))
        served, first_s = set[str](), shop.gateway.start_s
        for _ in range(rounds):
            async with loaded(shop, account) as load:
                await eventually(lambda load=load: load.statuses[200] > 50)  # type: ignore[misc]
                await asyncio.sleep(chance.uniform(0, 2.0 if rounds > 10 else 0.3))
                os.killpg(shop.gateway.pid, signal.SIGKILL)
            await eventually(lambda: not shop.gateway.processes())
            await asyncio.to_thread(shop.gateway.wait)
            served |= load.served
            with contextlib.closing(sqlite3.connect(shop.gateway.folder / "gateway.db")) as db:
                assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            await asyncio.to_thread(shop.gateway.start)
            back_s.append(shop.gateway.start_s)
            assert (await shop.verify())["ok"]
            assert served <= set(stored(shop.gateway))
        charged = [each.charged_nanos for each in stored(shop.gateway).values() if each.account_id == account.id and each.charged_nanos]
        assert len(charged) >= len(served) and set(charged) == {COST_NANOS}
        in_time(sorted(back_s)[len(back_s) // 2], max(3.0, 2 * first_s))  # a machine on which starting takes long is excused
