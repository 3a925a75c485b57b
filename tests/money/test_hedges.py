"""Two calls and one charge: callers pay for the answer they have, at the price of who made it; the books agree but for who was outrun."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from bench.behaviour import Behaviour
from bench.books import Entry
from bench.provider import Provider
from gateway.domain.generation import HEDGE_LOST, Generation
from tests.edge.stage import UNMOVED, Answered
from tests.money.shop import MODELS, UNLIMITED, Account, Shop, exactly, nanos, opened, priced, stored

MODEL = "acme/two"
USUAL_S, SLOW_S = 0.02, 2.0
USUAL, SLOW = Behaviour(ttft_ms=USUAL_S * 1000, tokens=50), Behaviour(ttft_ms=SLOW_S * 1000, tokens=50)
WARM_UP, HEDGED = 80, 12
CHEAPEST_FIRST = {"price_weight": 1000, "latency_weight": 0, "throughput_weight": 0, "exploration_share": 0}


@pytest_asyncio.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    async with opened(
        tmp_path, settings={"routing": {**UNMOVED, **CHEAPEST_FIRST, "hedge_percent": "100"}, "limits": UNLIMITED}
    ) as running:
        yield running


async def asked(shop: Shop, account: Account, *, stream: bool) -> Answered:
    answered = await shop.ask(MODEL, account=account, stream=stream, provider={}, max_tokens=100)
    assert answered.status == 200, answered.body
    return answered


async def warmed_up(shop: Shop, account: Account) -> list[Answered]:
    """What is usual at both endpoints is known now."""
    shop.cheap.set_behaviour(USUAL)
    shop.good.set_behaviour(USUAL)

    async def lane(stream: bool) -> list[Answered]:
        return [await asked(shop, account, stream=stream) for _ in range(WARM_UP)]

    return [answered for lane in await asyncio.gather(lane(False), lane(True)) for answered in lane]


def cost_told(answered: Answered) -> int:
    text = answered.body.decode()
    told = [exactly(line[6:]) for line in text.splitlines() if line.startswith("data: {")] or [exactly(text)]
    (usage,) = (part["usage"] for part in told if part.get("usage"))
    return nanos(usage["cost"])


async def test_hedges_are_charged_once_by_the_winners_price_and_the_books_agree_but_for_who_was_outrun(shop: Shop) -> None:
    account = await shop.new_account("hedged@example.com", "900")
    answers = await warmed_up(shop, account)
    shop.cheap.set_behaviour(SLOW)
    slow_from = shop.cheap.books.entries[-1].sequence
    answers += await asyncio.gather(*(asked(shop, account, stream=stream) for stream in (False, True) * (HEDGED // 2)))
    told = {answered.headers["X-Generation-Id"]: cost_told(answered) for answered in answers}
    for generation_id in told:
        await shop.generation(generation_id, account)
    records = stored(shop.gateway)
    books: dict[str, dict[str, Entry]] = {
        slug: {entry.answer_id: entry for entry in provider.books.entries}
        for slug, provider in (("cheap", shop.cheap), ("good", shop.good))
    }
    total = outrun = 0
    for generation_id, cost in told.items():
        record = records[generation_id]
        entry = books[record.provider].pop(record.upstream_id)
        counts = {"prompt": entry.prompt_tokens, "completion": entry.completion_tokens}
        assert cost == record.charged_nanos == priced(MODELS[MODEL][record.provider], counts)
        total += cost
        outrun += shows_both(record)
    # Nobody but who was outrun; while all are quick, some of those are so early that the provider never hears of the request.
    assert sum(len(left) for left in books.values()) <= outrun
    slow = [entry for entry in books["cheap"].values() if entry.sequence > slow_from]
    assert HEDGED // 2 <= len(slow) <= HEDGED
    assert all(entry.cancelled is not None and entry.finished is None and entry.completion_tokens == 0 for entry in slow)
    assert nanos((await shop.get("credits", account))["total_usage"]) == total
    report = await shop.verify()
    assert (report["ok"], report["difference_nanos"], report["generations"]) == (True, 0, len(told))


def shows_both(record: Generation) -> bool:
    """Whether it was hedged; then asserts that it says who served, and how long the other one was waited for."""
    by_outcome = {each.outcome: each for each in record.attempts}
    assert "ok" in by_outcome and by_outcome["ok"].provider == record.provider
    lost = by_outcome.get(HEDGE_LOST)
    if lost is None:
        return False
    assert len(record.attempts) == 2 and lost.provider != record.provider
    assert lost.latency_ms is not None and lost.usage is None and lost.charged_nanos == 0
    assert record.error == "" and record.latency_ms is not None
    return True


async def test_a_drain_that_is_over_ends_both_calls_and_charges_nothing(shop: Shop) -> None:
    account = await shop.new_account("drained@example.com", "900")
    used = sum(cost_told(answered) for answered in await warmed_up(shop, account))
    await shop.until_used(used, account)
    for provider in (shop.cheap, shop.good):
        provider.set_behaviour(Behaviour(ttft_ms=60_000))
    before = [len(provider.books.entries) for provider in (shop.cheap, shop.good)]
    answer = asyncio.create_task(shop.ask(MODEL, account=account, stream=True, provider={}, max_tokens=100))
    entries = [await called(provider, count + 1) for provider, count in zip((shop.cheap, shop.good), before, strict=True)]
    shop.gateway.signal(signal.SIGTERM)
    answered = await answer
    assert answered.status == 503
    for provider, entry in zip((shop.cheap, shop.good), entries, strict=True):
        await gone(provider, entry)
    await asyncio.to_thread(shop.gateway.wait)
    assert (await shop.verify())["ok"]


async def called(provider: Provider, count: int) -> Entry:
    await provider.wait_for(lambda books: len(books.entries) >= count)
    entry: Entry = provider.books.entries[count - 1]
    return entry


async def gone(provider: Provider, entry: Entry) -> None:
    await provider.wait_for(lambda _: entry.cancelled is not None)
