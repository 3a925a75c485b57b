"""What callers pay who leave before the end (STR-04, STR-08): for what was made, and for nothing where nothing was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from gateway.domain.generation import Generation
from tests.edge.stage import ROLE, SSE_HEAD, RawCall, chunk, event
from tests.edge.test_hang_ups import leave
from tests.money.shop import PLAIN, Shop, nanos, opened, priced, sim
from tests.timing import again_if_untimely, in_time

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOKENS_PER_S = 100


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    async with opened(tmp_path_factory.mktemp("departures")) as running:
        yield running
        assert (await running.verify())["ok"]


async def left(shop: Shop, status: int, count: int) -> Generation:
    """The record of the exchange whose log line is the `count`-th of this status."""
    line = await asyncio.to_thread(shop.gateway.logged, "exchange", status=status, count=count)
    return await shop.record(line["generation"])


def departures(shop: Shop) -> int:
    return sum(line.get("event") == "exchange" and line["status"] == 499 for line in shop.gateway.log)


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("usage", ["openai", "every"])
@pytest.mark.parametrize("events", [1, 50])
@again_if_untimely
async def test_str_04_leaving_a_stream_is_charged_for_what_was_made(shop: Shop, events: int, usage: str, how: str) -> None:
    gone, seen = departures(shop), 0
    asked = sim(tokens=8192, tokens_per_s=TOKENS_PER_S, usage=usage, prompt_tokens=2)
    async with shop.asking("acme/plain", stream=True, max_tokens=8192, **asked) as caller:
        await caller.head()
        while seen < events:
            seen += (await caller.chunk()).count(b'"content":" ')
        left_s = leave(caller, how)
        entry = shop.good.books.entries[-1]
        await shop.good.wait_for(lambda _: entry.cancelled is not None)
    record = await left(shop, 499, gone + 1)
    assert record.usage is not None and record.cancelled
    assert entry.cancelled is not None
    assert events <= record.usage.completion_tokens <= entry.completion_tokens
    # One event may be on its way, and those that the provider made until it heard of the departure.
    lost_s = (entry.completion_tokens - record.usage.completion_tokens - 2) / TOKENS_PER_S
    in_time(lost_s, entry.cancelled - left_s, at_least=-1.0)
    assert record.charged_nanos == priced(PLAIN, {"prompt": 2, "completion": record.usage.completion_tokens})
    row = await shop.generation(record.id)
    assert row["cancelled"] is True and nanos(row["total_cost"]) == record.charged_nanos


async def test_str_04_an_early_count_does_not_stand_for_what_came_after_it(shop: Shop) -> None:
    """Some providers count the prompt in the first event and the answer in the last, which a caller who leaves never sees."""
    gone, seen = departures(shop), 0

    async def script(call: RawCall) -> None:
        early = event(ROLE, usage={"prompt_tokens": 30, "completion_tokens": 0})
        await call.write(SSE_HEAD, chunk(early), *(chunk(event({"content": f"w{n}"})) for n in range(20)))
        await call.left()

    shop.raw.script = script
    async with shop.asking("acme/raw", stream=True) as caller:
        await caller.head()
        while seen < 20:
            seen += (await caller.chunk()).count(b'"content":"w')
        leave(caller, "close")
    record = await left(shop, 499, gone + 1)
    assert record.usage is not None and record.usage.estimated
    assert record.charged_nanos == priced(PLAIN, {"prompt": 30, "completion": 20})


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_str_04_leaving_before_the_first_content_is_free(shop: Shop, how: str) -> None:
    gone, before, asked = departures(shop), await shop.used(), len(shop.good.books.entries)
    async with shop.asking("acme/plain", stream=True, **sim(ttft_ms=2000)) as caller:
        await shop.good.wait_for(lambda books: len(books.entries) > asked)
        leave(caller, how)
    record = await left(shop, 499, gone + 1)
    assert (record.charged_nanos, record.unbilled_nanos, record.usage, record.cancelled) == (0, 0, None, True)
    assert await shop.used() == before


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_str_04_leaving_a_whole_answer_is_charged_in_full(shop: Shop, how: str) -> None:
    asked = len(shop.good.books.entries)
    answered = sum(line.get("event") == "exchange" and line["status"] == 200 for line in shop.gateway.log)
    async with shop.asking("acme/plain", **sim(headers_delay_ms=300, prompt_tokens=12, tokens=34)) as caller:
        await shop.good.wait_for(lambda books: len(books.entries) > asked)
        leave(caller, how)
    record = await left(shop, 200, answered + 1)
    assert record.charged_nanos == priced(PLAIN, {"prompt": 12, "completion": 34})


@pytest.mark.parametrize("stream", [False, True])
async def test_str_08_a_caller_who_only_stops_talking_is_charged_once(shop: Shop, stream: bool) -> None:
    before, records = await shop.used(), departures(shop)
    async with shop.asking("acme/plain", stream=stream, **sim(headers_delay_ms=100, prompt_tokens=12, tokens=34)) as caller:
        leave(caller, "half-close")
        await caller.reader.read()
    if stream:  # a stream's caller who stops talking has left
        record = await left(shop, 499, records + 1)
        assert record.charged_nanos == 0
    else:
        await shop.until_used(before + priced(PLAIN, {"prompt": 12, "completion": 34}))
