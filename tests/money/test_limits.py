"""Requests a minute and a day, over all edges, on real sockets: exactly as many as allowed, and a 429 that says when to come again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import psutil  # type: ignore[import-untyped]
import pytest

from tests.edge.stage import Answered
from tests.money.shop import UNLIMITED, Account, Shop, opened, sim

RATES = UNLIMITED | {
    "free_requests_per_minute": 15, "requests_per_minute_per_usd": 60, "requests_per_minute_min": 10, "requests_per_minute_max": 60,
}  # fmt: skip
DAY_S, MINUTE_S = 86_400, 60


async def within(window_s: int, room_s: float) -> None:
    """Until so much is left of the window that the next steps are within it."""
    left_s = window_s - time.time() % window_s
    if left_s < room_s:
        await asyncio.sleep(left_s + 0.05)


def require_429(answered: Answered, limit: int, window_s: int, message: str) -> None:
    """The contract's refusal: the same headers in the answer and in its metadata, and a Retry-After that is right to a second."""
    assert answered.status == 429, answered.body
    error = json.loads(answered.body)["error"]
    reset_s = (time.time() // window_s + 1) * window_s
    headers = {"X-RateLimit-Limit": str(limit), "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(int(reset_s * 1000))}
    assert error == {
        "code": 429, "message": f"Rate limit exceeded: {message}",
        "metadata": {"error_type": "rate_limit_exceeded", "headers": headers, "provider_name": None},
    }  # fmt: skip
    assert {name: answered.headers[name] for name in headers} == headers
    assert abs(int(answered.headers["Retry-After"]) - math.ceil(reset_s - time.time())) <= 1


async def many(shop: Shop, count: int, model: str, account: Account | None = None, **more: Any) -> list[Answered]:
    """So many calls at once, each on a connection of its own."""
    return await asyncio.gather(*(shop.ask(model, account=account, max_tokens=1, **more) for _ in range(count)))


def statuses(answers: list[Answered]) -> Counter[int]:
    return Counter(answered.status for answered in answers)


async def free_used(shop: Shop, account: Account) -> int:
    """As /key says once the journals are read."""
    await shop.verify()
    quota = (await shop.get("key", account))["free_model_daily_requests"]
    assert quota["remaining"] == max(0, quota["limit"] - quota["used"])
    return int(quota["used"])


def leased(shop: Shop) -> list[str]:
    """The edges that have some of a quota."""
    with contextlib.closing(sqlite3.connect(f"file:{shop.gateway.folder}/gateway.db?mode=ro", uri=True)) as db:
        return [row[0] for row in db.execute("SELECT incarnation FROM leases WHERE resource LIKE 'free-day:%' AND incarnation <> ''")]


@pytest.fixture
async def four(tmp_path: Path) -> AsyncIterator[Shop]:
    limits = {
        "free_requests_per_day": 20,
        "free_requests_per_day_credited": 30,
        "free_requests_per_minute": 0,
        "requests_per_minute_max": 0,
    }
    async with opened(tmp_path, settings={"limits": limits}, workers=4) as shop:
        yield shop


async def test_a_quota_serves_exactly_its_number_over_all_edges_at_once(four: Shop) -> None:
    await within(DAY_S, 20)
    poor = await four.new_account("poor@example.com", "1")
    answers = await many(four, 60, "acme/free", poor)
    assert statuses(answers) == {200: 20, 429: 40}
    for answered in answers:
        if answered.status == 429:
            require_429(answered, 20, DAY_S, "free-models-per-day. Add 10 credits to unlock 30 free model requests per day")
    assert await free_used(four, poor) == 20
    assert statuses(await many(four, 12, "acme/free")) == {200: 12}  # nobody else is touched by it
    second = await four.new_key(poor)
    assert (await four.ask("acme/free", account=second)).status == 429  # another key of the account does not help
    assert (await four.ask("acme/plain", account=poor, max_tokens=1)).status == 200  # what is paid for is served
    await four.add(poor, "10")  # the higher tier, at once
    answers = await many(four, 30, "acme/free", poor)
    assert statuses(answers) == {200: 10, 429: 20}
    require_429(next(each for each in answers if each.status == 429), 30, DAY_S, "free-models-per-day-high-balance.")
    assert await free_used(four, poor) == 30


async def test_what_no_provider_made_anything_for_does_not_count(four: Shop) -> None:
    await within(DAY_S, 20)
    poor = await four.new_account("poor@example.com", "1")
    failed = await many(four, 12, "acme/free", poor, **sim(status=400))
    assert statuses(failed) == {400: 12}
    answers = await many(four, 30, "acme/free", poor)
    assert statuses(answers) == {200: 20, 429: 10}
    assert await free_used(four, poor) == 20


async def test_after_the_death_of_edges_and_control_the_quota_lacks_what_was_served_and_no_more(four: Shop) -> None:
    await within(DAY_S, 30)
    poor = await four.new_account("poor@example.com", "1")
    assert statuses(await many(four, 9, "acme/free", poor)) == {200: 9}
    health = four.gateway.health()
    for edge in health["edges"]:
        os.kill(edge, signal.SIGKILL)
    os.kill(health["control"], signal.SIGKILL)
    await asyncio.to_thread(four.gateway.logged, "process_ready", role="edge", count=8, timeout_s=20.0)
    await asyncio.to_thread(four.gateway.logged, "process_ready", role="control", count=2, timeout_s=20.0)
    async with asyncio.timeout(20):
        while await free_used(four, poor) != 9 or leased(four):
            await asyncio.sleep(0.1)
    answers = await many(four, 40, "acme/free", poor)
    assert statuses(answers) == {200: 11, 429: 29}
    assert await free_used(four, poor) == 20


@pytest.fixture
async def rated(tmp_path: Path) -> AsyncIterator[Shop]:
    async with opened(tmp_path, settings={"limits": RATES}, workers=4) as shop:
        yield shop


async def test_ovl_10_a_minute_has_its_number_over_all_edges_and_a_client_that_waits_as_told_is_served_in_the_next(rated: Shop) -> None:
    await within(MINUTE_S, 15)
    limited = await rated.new_account("limited@example.com", "0.5")
    assert (await rated.get("key", limited))["rate_limit"]["requests"] == 30
    answers = await many(rated, 100, "acme/tiny", limited)
    assert statuses(answers) == {200: 30, 429: 70}
    require_429(next(each for each in answers if each.status == 429), 30, MINUTE_S, "30 requests per minute.")
    assert statuses(await many(rated, 20, "acme/tiny")) == {200: 20}  # nobody else is touched by it
    refused_at, minute = time.monotonic(), time.time() // MINUTE_S
    client = openai.AsyncOpenAI(api_key=limited.key, base_url=f"{rated.gateway.url}/api/v1", max_retries=1)
    async with client:
        told = await client.chat.completions.create(model="acme/tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=1)
    assert told.choices and time.time() // MINUTE_S == minute + 1, f"after {time.monotonic() - refused_at} s"
    answers = await many(rated, 60, "acme/tiny", limited)
    assert statuses(answers) == {200: 29, 429: 31}


async def test_credit_that_comes_raises_the_rate_at_once_up_to_the_most(rated: Shop) -> None:
    await within(MINUTE_S, 20)
    limited = await rated.new_account("limited@example.com", "0.01")
    assert statuses(await many(rated, 40, "acme/tiny", limited)) == {200: 10, 429: 30}
    await rated.add(limited, "0.49")
    assert statuses(await many(rated, 40, "acme/tiny", limited)) == {200: 20, 429: 20}
    await rated.add(limited, "100")
    answers = await many(rated, 60, "acme/tiny", limited)
    assert statuses(answers) == {200: 30, 429: 30}
    require_429(next(each for each in answers if each.status == 429), 60, MINUTE_S, "60 requests per minute.")


async def test_free_models_have_a_minute_of_their_own_and_streams_count_like_answers(rated: Shop) -> None:
    await within(MINUTE_S, 20)
    other = await rated.new_account("other@example.com", "0.01")
    assert statuses(await many(rated, 10, "acme/free", other, **sim(status=400))) == {400: 10}
    answers = await many(rated, 20, "acme/free", other, stream=True) + await many(rated, 20, "acme/free", other)
    assert statuses(answers) == {200: 15, 429: 25}
    require_429(next(each for each in answers if each.status == 429), 15, MINUTE_S, "free-models-per-min.")
    assert statuses(await many(rated, 12, "acme/tiny", other)) == {200: 10, 429: 2}


async def test_no_edge_gains_or_loses_by_a_control_that_is_replaced(rated: Shop) -> None:
    await within(MINUTE_S, 25)
    limited = await rated.new_account("limited@example.com", "0.5")
    assert statuses(await many(rated, 12, "acme/tiny", limited)) == {200: 12}
    os.kill(rated.gateway.health()["control"], signal.SIGKILL)
    control = await asyncio.to_thread(rated.gateway.logged, "process_ready", role="control", count=2)
    await asyncio.to_thread(rated.gateway.logged, "edge_joined", pid=control["child"], count=4)
    assert statuses(await many(rated, 60, "acme/tiny", limited)) == {200: 18, 429: 42}


async def test_edges_that_are_rolled_take_nothing_of_the_minute_with_them(rated: Shop) -> None:
    await within(MINUTE_S, 25)
    limited = await rated.new_account("limited@example.com", "0.5")
    assert statuses(await many(rated, 12, "acme/tiny", limited)) == {200: 12}
    rated.gateway.signal(signal.SIGUSR2)
    await asyncio.to_thread(rated.gateway.logged, "process_ended", role="edge", count=4, timeout_s=20.0)
    assert statuses(await many(rated, 60, "acme/tiny", limited)) == {200: 18, 429: 42}


async def test_a_rate_refuses_nobody_while_control_does_not_answer(tmp_path: Path) -> None:
    """What protects may fail open; what is money ends with its leases."""
    async with opened(tmp_path, settings={"limits": RATES, "server": {"hang_s": 0}}) as shop:
        await serve_without_control(shop)


async def serve_without_control(rated: Shop) -> None:
    await within(MINUTE_S, 25)
    limited = await rated.new_account("limited@example.com", "0.5")
    assert statuses(await many(rated, 12, "acme/tiny", limited)) == {200: 12}
    control = psutil.Process(rated.gateway.health()["control"])
    control.suspend()
    try:
        assert statuses(await many(rated, 40, "acme/tiny", limited)) == {200: 40}
    finally:
        control.resume()
    async with asyncio.timeout(10):
        while (await rated.ask("acme/tiny", account=limited, max_tokens=1)).status == 200:
            pass
