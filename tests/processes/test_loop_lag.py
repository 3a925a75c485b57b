"""No event loop is blocked: not by hashing passwords, large requests, unknown keys, scrapes, log lines or journals."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable

import aiohttp

from bench.provider import Provider
from bench.soak import kept_to, loop_lags
from tests.conftest import MODEL, RunningGateway, StartGateway, fetch
from tests.money.shop import sim
from tests.timing import again_if_untimely, in_time

BUSY_S = 3.0
LATE_S_MAX = 0.05  # a password hashed on the loop takes longer, again and again; alone on a machine it is 0.005
SHARE = 0.9  # of the looks: a look each tenth of a second makes 30, and the machine itself stands still at times
Burden = Callable[[], Awaitable[None]]
PASSWORD = "correct horse battery staple"  # a test's


def lateness(gateway: RunningGateway) -> dict[str, Counter[float]]:
    """By process, how often its loop was late by at most each bound."""
    status, body = fetch(f"{gateway.operations_url}/metrics")
    assert status == 200
    return loop_lags(body.decode())


def late_s(before: Counter[float], after: Counter[float]) -> float:
    """The bound that the given share of the looks between kept to."""
    looks = Counter({bound: after[bound] - before[bound] for bound in after})
    assert max(looks.values()) > 10
    return kept_to(looks, SHARE)


@again_if_untimely
async def test_ovl_07_the_event_loops_are_never_blocked(start_gateway: StartGateway, provider: Provider) -> None:
    gateway = start_gateway({"north": f"{provider.url}/v1"})
    async with aiohttp.ClientSession() as session:
        all_burdens = burdens(session, gateway)
        for burden in all_burdens:
            await burden()
        before = await asyncio.to_thread(lateness, gateway)
        over = asyncio.get_running_loop().time() + BUSY_S

        async def bear(burden: Burden) -> None:
            while asyncio.get_running_loop().time() < over:
                await burden()

        await asyncio.gather(*map(bear, all_burdens))
        await asyncio.sleep(1.1)  # the edge tells its figures each second
        after = await asyncio.to_thread(lateness, gateway)
    for process in ("edge", "control"):
        in_time(late_s(before.get(process, Counter()), after[process]), LATE_S_MAX)


def burdens(session: aiohttp.ClientSession, gateway: RunningGateway) -> list[Burden]:
    """Sign-ins, unknown keys, requests of a megabyte, streams, and scrapes: each once."""
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], **sim(tokens=40)}
    large = {**chat, "messages": [{"role": "user", "content": "x" * (2**20 - 1024)}]}
    ours = {"Origin": gateway.url, "Sec-Fetch-Site": "same-origin"}

    async def post(path: str, body: dict[str, object], headers: dict[str, str]) -> None:
        async with session.post(gateway.url + path, json=body, headers=headers) as answer:
            await answer.read()

    def asking(body: dict[str, object], secret: str = gateway.key) -> Awaitable[None]:
        return post("/api/v1/chat/completions", body, {"Authorization": f"Bearer {secret}"})

    async def scrape() -> None:
        await asyncio.to_thread(fetch, f"{gateway.operations_url}/metrics")

    return [
        lambda: post("/api/v1/session", {"email": "ada@example.com", "password": PASSWORD}, ours),
        lambda: asking(chat, "sk-or-v1-" + secrets.token_hex(32)),
        lambda: asking(large),
        lambda: asking({**chat, "stream": True}),
        scrape,
    ]
