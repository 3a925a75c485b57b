"""400 mixed requests over two edges: the provider's books, what callers read, every generation, credits, the key and the
ledger's own proof say the same, to the nano.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from bench.behaviour import Behaviour
from bench.books import Entry
from tests.edge.test_hang_ups import leave
from tests.money.shop import FREE, MODELS, Account, Shop, exactly, nanos, opened, priced, sim, stored

REQUESTS, AT_ONCE, SEED = 400, 20, 11
TOKENS_PER_S = 40  # of streams whose callers leave
# What each kind of request costs at the endpoint that serves it.
MODELS_ASKED = ("acme/plain", "acme/rich", "acme/tiny", "acme/free", "acme/two", "acme/two")
REPORTS = ("openai", "every", "with_finish", "null_until_end")


class Transcript(msgspec.Struct):
    """What a caller has of one request."""

    generation_id: str
    model: str
    cost: int | None  # nanos, from the text of `usage.cost`; None: the caller left before it came
    counts: tuple[int, int] | None = None
    seen: int = 0  # events of content until the caller left
    left_s: float = 0.0  # when, by the monotonic clock


def asked_for(rng: random.Random) -> dict[str, Any]:
    prompt = rng.choice((0, 1, 7, 999, 50_000))
    fields: dict[str, Any] = {
        "usage": rng.choice(REPORTS),
        "prompt_tokens": prompt,
        "cached_tokens": rng.choice((0, prompt // 3, prompt)),
        "tokens": rng.randrange(1, 40),
    }
    if rng.random() < 0.3:
        fields |= {"reasoning_deltas": rng.randrange(1, 5), "reasoning_tokens": rng.randrange(5, 50)}
    return fields


async def read_to_the_end(shop: Shop, model: str, account: Account, *, stream: bool, **more: Any) -> Transcript:
    answered = await shop.ask(model, account=account, stream=stream, **more)
    assert answered.status == 200, answered.body
    text = answered.body.decode()
    told = [exactly(line[6:]) for line in text.splitlines() if line.startswith("data: {")] if stream else [exactly(text)]
    (usage,) = (part["usage"] for part in told if part.get("usage"))
    counts = (usage["prompt_tokens"], usage["completion_tokens"])
    return Transcript(answered.headers["X-Generation-Id"], model, nanos(usage["cost"]), counts)


async def leave_midway(shop: Shop, model: str, account: Account, events: int, how: str) -> Transcript:
    async with shop.asking(
        model, account, stream=True, **sim(tokens=2000, tokens_per_s=TOKENS_PER_S, usage="every", prompt_tokens=31)
    ) as caller:
        _, headers = await caller.head()
        seen = 0
        while seen < events:
            seen += (await caller.chunk()).count(b'"content":" ')
        left_s = leave(caller, how)
    return Transcript(headers["x-generation-id"], model, None, seen=seen, left_s=left_s)


async def asked(shop: Shop, account: Account, number: int) -> Transcript:
    rng = random.Random(SEED * 10_000 + number)
    model = rng.choice(MODELS_ASKED)
    if number % 10 == 9:
        return await leave_midway(shop, "acme/plain", account, rng.randrange(1, 20), rng.choice(("close", "reset")))
    return await read_to_the_end(shop, model, account, stream=rng.random() < 0.5, **sim(**asked_for(rng)))


def cost_in_the_providers_books(entry: Entry, pricing: Mapping[str, Any], cached: int) -> int:
    counts = {"prompt": entry.prompt_tokens, "completion": entry.completion_tokens, "reasoning": entry.reasoning_tokens, "cached": cached}
    return priced(pricing, counts)


async def test_provider_callers_generations_credits_key_and_ledger_agree_to_the_nano(tmp_path: Path) -> None:
    async with opened(tmp_path, workers=2) as shop:
        shop.cheap.set_behaviour(Behaviour(status=500))  # acme/two falls back, at the other endpoint's price
        account = await shop.new_account("bank@example.com", "900")
        places = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> Transcript:
            async with places:
                return await asked(shop, account, number)

        transcripts = await asyncio.gather(*(one(number) for number in range(REQUESTS)))
        rows = {each.generation_id: await shop.generation(each.generation_id, account) for each in transcripts}
        assert len(rows) == REQUESTS
        books = {entry.answer_id: entry for entry in shop.good.books.entries}
        records = stored(shop.gateway)
        total = late = 0
        for each in transcripts:
            row, record = rows[each.generation_id], records[each.generation_id]
            entry = books.pop(row["upstream_id"])
            charged = nanos(row["total_cost"])
            total += charged
            assert charged == record.charged_nanos and record.usage is not None and not record.usage.estimated
            pricing = MODELS[each.model]["good"]
            if each.cost is None:
                made = record.usage.completion_tokens
                assert row["cancelled"] and entry.cancelled is not None and each.seen <= made <= entry.completion_tokens
                # One event may be on its way, and those that the provider made until it heard of the departure. One that was
                # late itself makes more of them at once.
                late += entry.completion_tokens > made + 2 + TOKENS_PER_S * (entry.cancelled - each.left_s)
                assert charged == priced(pricing, {"prompt": 31, "completion": record.usage.completion_tokens})
            else:
                assert each.cost == charged == cost_in_the_providers_books(entry, pricing, entry.cached_tokens)
                assert each.counts == (entry.prompt_tokens, entry.completion_tokens)
            assert (charged == 0) <= (pricing == FREE or entry.prompt_tokens + entry.completion_tokens == 0)
            assert len(row["provider_responses"]) == (2 if each.model == "acme/two" else 1)
        assert not books, "a call that nobody was charged for"
        assert late <= REQUESTS // 100
        assert nanos((await shop.get("credits", account))["total_usage"]) == total
        assert nanos((await shop.get("key", account))["usage"]) == total
        report = await shop.verify()
        assert (report["ok"], report["difference_nanos"], report["generations"]) == (True, 0, REQUESTS)
