"""Requests that are large and legal, callers who are many and idle, and crowds that come back after an outage (INP-13, OVL-05, OVL-09)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import time
from typing import Any

import pytest

from bench.behaviour import Behaviour
from tests.conftest import eventually
from tests.edge.stage import FIRST, GOOD, HELLO, Stage, behaving, sighted, stage_of
from tests.timing import again_if_untimely, in_time

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20
KIB = 1 << 10
ROUTE = "/api/v1/chat/completions"
stage = stage_of(
    settings={"timeouts": {"first_token_s": 60.0, "idle_s": 60.0, "total_s": 120.0}, "upstream": {"inflight_max": 4000}}, catalog=sighted
)


def tool(number: int) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
    return {"type": "function", "function": {"name": f"tool_{number}", "description": "tells the weather", "parameters": parameters}}


def image(bytes_number: int) -> dict[str, Any]:
    data = base64.b64encode(random.Random(3).randbytes(bytes_number)).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


LARGE: dict[str, dict[str, Any]] = {
    "10,000 tools": {"tools": [tool(number) for number in range(10_000)]},
    "an image of 5 MiB": {"messages": [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, image(5 * MIB)]}]},
    "2,000 messages": {"messages": [{"role": ("user", "assistant")[n % 2], "content": f"message {n}"} for n in range(2000)]},
    "10,000 parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": f"part {n}"} for n in range(10_000)]}]},
}


async def ask_largely(stage: Stage, name: str) -> int:
    """The status of a large request, sent as fast as it is taken."""
    async with stage.connected() as caller:
        key = f"Authorization: Bearer {stage.gateway.key}\r\n"
        caller.send({"model": GOOD, "messages": HELLO, **LARGE[name]}, ROUTE, key)
        return (await caller.answer())[0]


@pytest.mark.parametrize("name", LARGE)
@again_if_untimely
async def test_inp_13_large_and_legal_requests_arrive_whole_and_neighbours_hardly_notice(stage: Stage, name: str) -> None:
    stage.good.books.clear()
    asked, slowest_s = asyncio.create_task(ask_largely(stage, name)), 0.0
    async with stage.connected() as neighbour:
        while not asked.done():
            began = time.monotonic()
            neighbour.writer.write(f"OPTIONS {ROUTE} HTTP/1.1\r\nHost: gw\r\n\r\n".encode())
            assert (await neighbour.head())[0] == 204
            slowest_s = max(slowest_s, time.monotonic() - began)
    assert await asked == 200
    sent = json.loads(stage.good.books.entries[-1].body)
    for field, value in LARGE[name].items():
        assert sent[field] == value
    in_time(slowest_s, 0.25)


async def test_inp_13_large_requests_leave_no_memory_behind(stage: Stage) -> None:
    for _ in range(3):  # what an allocator keeps for the next one
        assert await ask_largely(stage, "an image of 5 MiB") == 200
    rss = stage.rss_bytes()
    for _ in range(5):
        stage.good.books.clear()
        assert await ask_largely(stage, "an image of 5 MiB") == 200
    assert stage.rss_bytes() - rss < 16 * MIB


async def test_inp_13_large_requests_that_are_refused_leave_no_memory_behind(stage: Stage) -> None:
    """A refusal knows the frames that it came through, and they know the body."""
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: gw\r\nAuthorization: Bearer {stage.gateway.key}\r\nContent-Length: {5 * MIB}\r\n\r\n".encode()

    async def refused() -> None:
        async with stage.connected() as caller:
            caller.writer.write(head + b"x" * (5 * MIB))
            assert (await caller.answer())[0] == 400

    for _ in range(3):
        await refused()
    rss = stage.rss_bytes()
    for _ in range(20):
        await refused()
    assert stage.rss_bytes() - rss < 16 * MIB


@pytest.mark.parametrize("streams", [300, pytest.param(2000, marks=pytest.mark.soak)])
async def test_ovl_05_idle_streams_are_cheap(stage: Stage, streams: int) -> None:
    stage.first.books.clear()
    with behaving(stage.first, Behaviour(stall_after_events=2)):
        async with contextlib.AsyncExitStack() as opened:

            async def begin() -> None:
                caller = await opened.enter_async_context(stage.streaming(FIRST))
                assert (await caller.head())[0] == 200
                await caller.chunk()

            for _ in range(50):  # what the first ones need is no stream's own
                await begin()
            rss = stage.rss_bytes()
            for _ in range(streams):
                await begin()
            assert (stage.rss_bytes() - rss) / streams <= 48 * KIB
            assert (await stage.ask(GOOD)).status == 200
    await eventually(lambda: all(entry.cancelled for entry in stage.first.books.entries))


@pytest.mark.parametrize(("down_s", "callers"), [(1.0, 50), pytest.param(10.0, 200, marks=pytest.mark.soak)])
@again_if_untimely
async def test_ovl_09_a_crowd_that_retries_is_served_as_soon_as_its_provider_is_back(stage: Stage, down_s: float, callers: int) -> None:
    """Every caller asks again at once, as those do who know no better."""
    statuses: set[int] = set()

    async def insist() -> float:
        while True:
            answered = await stage.ask(FIRST, max_tokens=1)
            statuses.add(answered.status)
            if answered.status == 200:
                return time.monotonic()
            await asyncio.sleep(0.05)

    await stage.first.down()
    crowd = asyncio.gather(*(insist() for _ in range(callers)))
    await asyncio.sleep(down_s)  # the outage
    await stage.first.up()
    returned = time.monotonic()
    served = sorted(await crowd)
    assert statuses == {200, 502}
    in_time(served[len(served) * 9 // 10] - returned, 5.0)
