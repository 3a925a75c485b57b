"""Long runs: nothing leaks, and the books agree to the end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
import psutil  # type: ignore[import-untyped]
import pytest

from bench.behaviour import Behaviour
from bench.provider import Provider
from tests.conftest import MODEL, RunningGateway, StartGateway, eventually

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

REQUESTS = 40_000
WARM_UP = 8_000
CONCURRENT = 32
RSS_BYTES_PER_10K_MAX = 1024 * 1024  # OPS-10
HANG_UPS, FAILURES = 0.2, 0.05


async def test_ops_10_nothing_leaks_over_time(start_gateway: StartGateway) -> None:
    """Streams and whole answers, a fifth of them left by their callers, a twentieth failing upstream."""
    async with Provider(port=0, behaviour=Behaviour(tokens=20, tokens_per_s=2000)) as provider:
        gateway = start_gateway({"north": f"{provider.url}/v1"})
        edge = psutil.Process(gateway.health()["edges"][0])
        await load(gateway, WARM_UP)
        await quiet(edge)
        rss_bytes, fds = edge.memory_info().rss, edge.num_fds()
        await load(gateway, REQUESTS)
        await quiet(edge)
        grown_bytes = edge.memory_info().rss - rss_bytes
        verified = await asyncio.to_thread(gateway.admin, "ledger", "verify")
    assert grown_bytes <= RSS_BYTES_PER_10K_MAX * REQUESTS / 10_000
    assert abs(edge.num_fds() - fds) <= 5
    assert verified["ok"] is True
    assert verified["difference_nanos"] == 0


async def load(gateway: RunningGateway, requests: int) -> None:
    rng = random.Random(requests)
    waiting = iter(range(requests))
    connector = aiohttp.TCPConnector(limit=CONCURRENT)
    async with aiohttp.ClientSession(connector=connector, headers={"Authorization": f"Bearer {gateway.key}"}) as session:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CONCURRENT):
                tasks.create_task(ask_on(session, gateway.url, waiting, rng))


async def ask_on(session: aiohttp.ClientSession, url: str, waiting: Iterator[int], rng: random.Random) -> None:
    for _ in waiting:
        stream = rng.random() < 0.5
        body = {"model": MODEL, "stream": stream, "messages": [{"role": "user", "content": "Hello"}]}
        fails, leaves = rng.random() < FAILURES, stream and rng.random() < HANG_UPS
        if fails:
            body["metadata"] = {"sim": "status=500"}
        async with session.post(f"{url}/api/v1/chat/completions", json=body) as answer:
            assert answer.status == (502 if fails else 200)
            if leaves and not fails:
                with left(answer):
                    await answer.content.readany()
            else:
                await answer.read()


@contextmanager
def left(answer: aiohttp.ClientResponse) -> Iterator[None]:
    yield
    answer.close()  # with its connection: the caller is gone


async def quiet(edge: psutil.Process) -> None:
    """Until the callers' connections are closed, as far as a test can see."""
    await eventually(lambda: len(edge.net_connections(kind="tcp")) <= CONCURRENT + 8, timeout_s=10.0)
