"""The ledger outlives every process (LED-07), and a locked database delays bookkeeping alone (LED-08)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import time
from pathlib import Path

import aiohttp
import pytest

from tests.money.shop import PLAIN, Shop, opened, priced, stored

CALLERS = 6
CHARGE_NANOS = priced(PLAIN, {"prompt": 2, "completion": 16})


async def call(shop: Shop, stream: bool, charged: set[str], statuses: set[int], until: asyncio.Event) -> None:
    """Ask again and again until told to end, or nobody answers; note what was answered whole."""
    with contextlib.suppress(aiohttp.ClientError, asyncio.IncompleteReadError):
        while not until.is_set():
            answered = await shop.ask(stream=stream)
            statuses.add(answered.status)
            if answered.status == 200 and (not stream or answered.body.endswith(b"data: [DONE]\n\n")):
                charged.add(answered.headers["X-Generation-Id"])


def kill_all(shop: Shop) -> None:
    for pid in shop.gateway.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def killed_again_and_again(folder: Path, *, rounds: int, load_s: float) -> float:
    """Kill the whole gateway under load, start it, and look at its books; the longest start in seconds."""
    chance = random.Random(7)
    charged: set[str] = set()
    longest_s = 0.0
    async with opened(folder) as shop:
        for _ in range(rounds):
            before = len(charged)
            calling = [asyncio.create_task(call(shop, bool(n % 2), charged, set(), asyncio.Event())) for n in range(CALLERS)]
            await asyncio.sleep(chance.uniform(0.2, 1.0) * load_s)
            await asyncio.to_thread(kill_all, shop)
            await asyncio.gather(*calling)
            await asyncio.to_thread(shop.gateway.wait)
            began_s = time.monotonic()
            await asyncio.to_thread(shop.gateway.start)
            longest_s = max(longest_s, time.monotonic() - began_s)
            assert (await shop.verify())["ok"]
            with contextlib.closing(sqlite3.connect(f"file:{shop.gateway.folder}/gateway.db?mode=ro", uri=True)) as db:
                assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert len(charged) > before
            records = stored(shop.gateway)
            assert charged <= records.keys()
            assert {records[each].charged_nanos for each in charged} == {CHARGE_NANOS}
        assert await shop.used() == sum(record.charged_nanos for record in stored(shop.gateway).values())
    return longest_s


async def test_led_07_the_ledger_survives_the_death_of_every_process_under_load(tmp_path: Path) -> None:
    await killed_again_and_again(tmp_path, rounds=5, load_s=0.6)


@pytest.mark.soak
async def test_led_07_a_hundred_deaths(tmp_path: Path) -> None:
    assert await killed_again_and_again(tmp_path, rounds=100, load_s=2.0) <= 3.0


async def locked(folder: Path, *, lock_s: float) -> tuple[set[int], float]:
    """Load while somebody else holds the database's write lock; statuses seen, and how long the backlog took afterwards."""
    charged: set[str] = set()
    statuses: set[int] = set()
    async with opened(folder) as shop:
        assert (await shop.ask()).status == 200  # the edge knows the key, and has a lease
        ended = asyncio.Event()
        with contextlib.closing(sqlite3.connect(f"{shop.gateway.folder}/gateway.db", isolation_level=None, timeout=5.0)) as foreign:
            foreign.execute("BEGIN IMMEDIATE")
            known = len(stored(shop.gateway))
            calling = [asyncio.create_task(call(shop, bool(n % 2), charged, statuses, ended)) for n in range(CALLERS)]
            await asyncio.sleep(lock_s)
            assert len(stored(shop.gateway)) == known and len(charged) > 0
            foreign.execute("ROLLBACK")
        released_s = time.monotonic()
        waiting = set(charged)
        while not waiting <= stored(shop.gateway).keys():
            assert time.monotonic() - released_s < 10.0
            await asyncio.sleep(0.02)
        drained_s = time.monotonic() - released_s
        ended.set()
        await asyncio.gather(*calling)
        assert (await shop.verify())["generations"] == 1 + len(charged)
        assert await shop.used() == (1 + len(charged)) * CHARGE_NANOS
    return statuses, drained_s


async def test_led_08_a_locked_database_delays_charges_and_no_answer(tmp_path: Path) -> None:
    statuses, _ = await locked(tmp_path, lock_s=2.5)
    assert statuses == {200}


@pytest.mark.soak
async def test_led_08_a_database_locked_for_ten_seconds(tmp_path: Path) -> None:
    statuses, drained_s = await locked(tmp_path, lock_s=10.0)
    assert statuses == {200}
    assert drained_s <= 2.0
