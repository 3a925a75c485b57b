"""Accounts that log their prompts pay less, to the nano of the provider's count x price x what is left to pay; and all books agree."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from bench.answers import text_of
from bench.behaviour import Behaviour
from bench.books import Entry
from tests.conftest import eventually
from tests.edge.stage import SSE_HEAD, chunk, event
from tests.money.shop import MODELS, PLAIN, TWO, Account, Shop, log_prompts, nanos, opened, priced, sim, stored
from tests.money.test_books_agree import asked
from tests.money.test_charges import usage_of
from tests.money.test_continuation import TOKENS, behave, told
from tests.money.test_continuation import asked as continued

REQUESTS = 60
PERCENTS = {"1": Fraction(99, 100), "33.3333": Fraction(666_667, 1_000_000)}


async def logging_account(shop: Shop, email: str = "ann@example.com") -> Account:
    account = await shop.new_account(email, "900")
    await asyncio.to_thread(log_prompts, shop.gateway, account.id)
    return account


def counts(entry: Entry) -> dict[str, int]:
    return {
        "prompt": entry.prompt_tokens,
        "completion": entry.completion_tokens,
        "reasoning": entry.reasoning_tokens,
        "cached": entry.cached_tokens,
    }


def at(model: str, prompt_tokens: int) -> Mapping[str, Any]:
    """The price of a prompt of this size."""
    pricing = MODELS[model]["good"]
    dearer = [each for each in pricing.get("overrides", ()) if prompt_tokens > each["min_prompt_tokens"]]
    return {**pricing, **dearer[-1]} if dearer else pricing


async def agree(shop: Shop, account: Account, total: int) -> None:
    """/credits, /key and the ledger's own proof say that so much was charged."""
    await shop.until_used(total, account)
    assert nanos((await shop.get("key", account))["usage"]) == total
    report = await shop.verify()
    assert (report["ok"], report["difference_nanos"]) == (True, 0)


@pytest.mark.parametrize("percent", list(PERCENTS))
async def test_caller_record_credits_key_and_ledger_have_the_providers_count_at_what_is_left_to_pay(tmp_path: Path, percent: str) -> None:
    paid = PERCENTS[percent]
    async with opened(tmp_path, settings={"billing": {"logging_discount_percent": percent}}) as shop:
        shop.cheap.set_behaviour(Behaviour(status=500))  # acme/two falls back, at the other endpoint's price
        account, other = await logging_account(shop), await shop.new_account("other@example.com", "900")
        totals = {account.id: 0, other.id: 0}
        owners = {}
        for who in (account, other):
            numbers = [number for number in range(REQUESTS) if number % 10 != 9 or number < 20]  # two whose caller leaves
            for each in await asyncio.gather(*(asked(shop, who, number) for number in numbers)):
                owners[each.generation_id] = (who, each)
        for generation_id, (who, each) in owners.items():
            row = await shop.generation(generation_id, who)
            record = stored(shop.gateway)[generation_id]
            (entry,) = [entry for entry in shop.good.books.entries if entry.answer_id == row["upstream_id"]]
            used = counts(entry)
            if each.cost is None:
                assert record.usage is not None and record.cancelled
                used = {"prompt": 31, "completion": record.usage.completion_tokens}
            charged = priced(MODELS[each.model]["good"], used, paid if who is account else Fraction(1))
            assert record.charged_nanos == nanos(row["total_cost"]) == charged
            assert each.cost in (None, charged)
            totals[who.id] += charged
        assert 0 < totals[account.id] < totals[other.id]
        await agree(shop, account, totals[account.id])
        await agree(shop, other, totals[other.id])


async def test_one_percent_off_every_kind_of_end(tmp_path: Path) -> None:
    paid = PERCENTS["1"]
    async with opened(tmp_path) as shop:  # with the default
        account = await logging_account(shop)
        total = 0

        async def ask(model: str, *, stream: bool, **more: Any) -> tuple[dict[str, Any], int]:
            """The record, and what the parts of the cost that the caller was told come to."""
            answered = await shop.ask(model, stream=stream, account=account, **more)
            assert answered.status == 200, answered.body
            usage, row = usage_of(answered), await shop.generation(answered.headers["X-Generation-Id"], account)
            parts = usage["cost_details"]
            prompt, completion = parts["upstream_inference_prompt_cost"], parts["upstream_inference_completions_cost"]
            assert nanos(usage["cost"]) == nanos(row["total_cost"]) == nanos(prompt) + nanos(completion)
            assert nanos(prompt) == priced(at(model, usage["prompt_tokens"]), {"prompt": usage["prompt_tokens"], "completion": 0}, paid)
            return row, nanos(usage["cost"])

        for stream in (False, True):
            for prompt in (1, 7, 99, 100_001):
                for model in ("acme/plain", "acme/tiny", "acme/tiered", "acme/free"):
                    _, cost = await ask(model, stream=stream, **sim(prompt_tokens=prompt, tokens=13))
                    assert cost == priced(at(model, prompt), {"prompt": prompt, "completion": 13}, paid)
                    total += cost
        # Where the provider counts nothing our estimate is what is paid for; the discount is of that.
        row, cost = await ask("acme/plain", stream=True, **sim(usage="none", tokens=40))
        assert cost == priced(PLAIN, {"prompt": row["native_tokens_prompt"], "completion": 40}, paid)
        await agree(shop, account, total + cost)
        # What is free of charge keeps what it would have cost.
        shop.raw.answers(SSE_HEAD, *(chunk(event({"content": f" word{number}"})) for number in range(50)))
        broken = await shop.ask("acme/raw", stream=True, account=account)
        row = await shop.generation(broken.headers["X-Generation-Id"], account)
        record = stored(shop.gateway)[row["id"]]
        assert record.usage is not None and (record.charged_nanos, record.usage.completion_tokens) == (0, 50)
        assert record.unbilled_nanos == priced(PLAIN, {"prompt": record.usage.prompt_tokens, "completion": 50}, paid)


async def test_each_part_of_a_stream_that_went_on_elsewhere_is_discounted(tmp_path: Path) -> None:
    paid = PERCENTS["1"]
    async with opened(tmp_path) as shop:
        account = await logging_account(shop)
        total = 0
        for events in range(2, TOKENS + 1):
            behave(shop, f"close_after_events={events}")
            answered = await continued(shop, account)
            assert answered.text == text_of(TOKENS) and answered.events[-1] == "[DONE]"
            parts = [priced(TWO["cheap"], counts(entry), paid) for entry in shop.cheap.books.entries]
            parts += [priced(TWO["good"], counts(entry), paid) for entry in shop.good.books.entries]
            assert len(parts) == 2 and nanos(told(answered)["cost"]) == sum(parts)
            await shop.generation(answered.headers["X-Generation-Id"], account)
            record = stored(shop.gateway)[answered.headers["X-Generation-Id"]]
            assert [each.charged_nanos for each in record.attempts] == parts and record.charged_nanos == sum(parts)
            total += sum(parts)
        await agree(shop, account, total)


async def test_led_06_a_stream_that_dies_with_its_edge_is_discounted_in_its_mark(tmp_path: Path) -> None:
    async with opened(tmp_path) as shop:
        account = await logging_account(shop)
        async with shop.asking("acme/plain", account, stream=True, **sim(tokens=5000, tokens_per_s=50)) as caller:
            while b" " not in (await caller.reader.readline()).partition(b'"content":"')[2][:1]:
                pass
            await eventually(lambda: list((shop.gateway.folder / "journal").glob("running-*")))
            os.kill(shop.edge.pid, signal.SIGKILL)
        await eventually(lambda: any(found.error == "edge_lost" for found in stored(shop.gateway).values()))
        (lost,) = stored(shop.gateway).values()
        assert lost.usage is not None and lost.usage.completion_tokens > 0
        used = {"prompt": lost.usage.prompt_tokens, "completion": lost.usage.completion_tokens}
        assert lost.charged_nanos == priced(PLAIN, used, PERCENTS["1"])
        await agree(shop, account, lost.charged_nanos)


@pytest.mark.parametrize(("percent", "charged"), [("0", 10_000), ("100", 0)])
async def test_the_setting_may_be_nothing_or_all(tmp_path: Path, percent: str, charged: int) -> None:
    async with opened(tmp_path, settings={"billing": {"logging_discount_percent": percent}}) as shop:
        account = await logging_account(shop)
        answered = await shop.ask(account=account, **sim(prompt_tokens=2, tokens=4))
        assert nanos(usage_of(answered)["cost"]) == charged
        await agree(shop, account, charged)
