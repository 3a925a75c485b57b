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

import pytest

from tests.edge.stage import Answered
from tests.money.shop import Account, Shop, opened, sim

OFF = {
    "free_requests_per_day": 0, "free_requests_per_minute": 0, "free_requests_per_day_credited": 0, "requests_per_minute_max": 0,
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
    limits = {"free_requests_per_day": 20, "free_requests_per_day_credited": 30, "free_requests_per_minute": 0, "requests_per_minute_max": 0}
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
