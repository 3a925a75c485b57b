"""A locked database delays bookkeeping, not tokens (LED-08)."""

from __future__ import annotations

import asyncio
import contextlib
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
