"""Edges and control die at random instants under running streams: each exchange is charged once at most, and what was told holds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.money.shop import Shop, exactly, nanos, opened, sim, stored

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

CALLERS = 20
KILLS = 6
TOKENS_PER_S = 60
BACK_S = 45.0  # what dies often is started again every 12 s and no sooner, and an edge is not ready without a control
MARK_S = 2.0  # how old a stream is by its second mark, at the latest


class Told:
    """What callers read of their streams, by generation."""

    def __init__(self) -> None:
        self.stopped = False
        self.streams: dict[str, bytes] = {}

    async def ask_on(self, shop: Shop, rng: random.Random) -> None:
        while not self.stopped:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ValueError, TimeoutError):
                await self._ask(shop, rng.choice([3, 20, 80, 200]))
            await asyncio.sleep(0.02)

    async def _ask(self, shop: Shop, tokens: int) -> None:
        told = sim(tokens=tokens, tokens_per_s=TOKENS_PER_S)
        async with shop.asking("acme/plain", stream=True, **told) as caller, asyncio.timeout(15.0):
            status, headers = await caller.head()
            if status == 200:
                generation = headers["x-generation-id"]
                self.streams[generation] = b""
                while part := await caller.chunk():
                    self.streams[generation] += part


@pytest.mark.parametrize(("seed", "fsync"), [(1, "batch"), (2, "always"), (3, "batch")])
async def test_led_06_random_kills_charge_nothing_twice_and_never_more_than_was_made(tmp_path: Path, seed: int, fsync: str) -> None:
    rng, told = random.Random(seed), Told()
    async with opened(tmp_path, settings={"journal": {"fsync": fsync}}) as shop:
        callers = [asyncio.create_task(told.ask_on(shop, rng)) for _ in range(CALLERS)]
        for _ in range(KILLS):
            await asyncio.sleep(rng.uniform(0.8, 3.0))
            # A process that dies before it is ready, again and again, is started later each time: that is not what is tested here.
            await eventually(lambda: shop.gateway.ready_status() == 200 and len(shop.gateway.health()["edges"]) == 1, BACK_S)
            control = [line["child"] for line in shop.gateway.log if line["event"] == "process_ready" and line["role"] == "control"][-1]
            os.kill(shop.edge.pid, signal.SIGKILL)
            if rng.random() < 0.7:
                await asyncio.sleep(rng.uniform(0.0, 0.3))  # while it reads what the edge left, or posts its marks
                with contextlib.suppress(ProcessLookupError):
                    os.kill(control, signal.SIGKILL)
        told.stopped = True
        await asyncio.gather(*callers)
        await eventually(lambda: shop.gateway.ready_status() == 200, BACK_S)
        await eventually(lambda: len(list((shop.gateway.folder / "journal").glob("edge-*"))) == 1, BACK_S)
        assert (await shop.verify())["ok"]
        found = stored(shop.gateway)
        assert await shop.used() == sum(record.charged_nanos for record in found.values())
        for generation, stream in told.streams.items():
            record, made = found.get(generation), stream.count(b'"content":" ')
            if stream.endswith(b"data: [DONE]\n\n"):
                assert record is not None and not record.error
                assert nanos(_usage(stream)["cost"]) == record.charged_nanos
            elif record is None:
                assert made <= TOKENS_PER_S * MARK_S, "a stream that was marked is not charged"
            else:
                assert record.usage is not None
                assert record.error != "edge_lost" or record.usage.completion_tokens <= made + 2  # on their way to the caller


def _usage(stream: bytes) -> dict[str, object]:
    last = stream.removesuffix(b"data: [DONE]\n\n").strip().rpartition(b"\n\n")[2]
    usage: dict[str, object] = exactly(last.removeprefix(b"data: "))["usage"]
    return usage
