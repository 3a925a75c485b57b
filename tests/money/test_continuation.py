"""Money of streams that went on elsewhere: each endpoint's part at its own price, to the nano of what the providers' books say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from bench.answers import text_of
from bench.behaviour import Behaviour
from bench.books import Entry
from gateway.domain.generation import Generation
from tests.conftest import eventually
from tests.edge.stage import HELLO, Answered
from tests.money.shop import TWO, Account, Shop, exactly, nanos, opened, priced, stored

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOKENS = 12
WISHES = {"provider": {"order": ["cheap", "good"], "continuation": True}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    async with opened(tmp_path_factory.mktemp("shop")) as running:
        yield running


def behave(shop: Shop, first: str, then: str = "", **more: Any) -> None:
    """How the two providers of `acme/two` answer from now on, with books that are empty."""
    for provider, text in ((shop.cheap, first), (shop.good, then)):
        provider.set_behaviour(Behaviour(tokens=TOKENS, **more).changed_by(text))
        provider.books.clear()


def part(entry: Entry, slug: str) -> int:
    return priced(TWO[slug], {"prompt": entry.prompt_tokens, "completion": entry.completion_tokens})


def told(answered: Answered) -> dict[str, Any]:
    """The stream's usage object, amounts as they are written."""
    lines = [exactly(line[6:]) for line in answered.body.decode().splitlines() if line.startswith("data: {")]
    (usage,) = [line["usage"] for line in lines if line.get("usage")]
    found: dict[str, Any] = usage
    return found


async def recorded(shop: Shop, generation_id: str, account: Account) -> Generation:
    """The record as the store keeps it, waited for."""
    await shop.generation(generation_id, account)
    return stored(shop.gateway)[generation_id]


async def asked(shop: Shop, account: Account | None = None, **more: Any) -> Answered:
    return await shop.ask("acme/two", stream=True, account=account, **{**WISHES, **more})


@pytest.mark.parametrize("usage", ["openai", "every", "none"])
async def test_each_endpoint_is_paid_for_its_part_wherever_the_stream_was_cut(shop: Shop, usage: str) -> None:
    account = await shop.new_account(f"{usage}@example.com", "50")
    total = 0
    for events in range(1, TOKENS + 4):
        behave(shop, f"close_after_events={events}", usage=usage)
        answered = await asked(shop, account)
        assert answered.text == text_of(TOKENS) and answered.events[-1] == "[DONE]"
        entries = [(entry, slug) for slug, books in (("cheap", shop.cheap.books), ("good", shop.good.books)) for entry in books.entries]
        counts = [entry.completion_tokens for entry, _ in entries]
        paid = entries if counts[0] else entries[1:]  # who gave nothing to read is not paid
        expected = sum(part(entry, slug) for entry, slug in paid)
        said = told(answered)
        assert nanos(said["cost"]) == expected
        assert (said["prompt_tokens"], said["completion_tokens"]) == (paid[0][0].prompt_tokens, TOKENS) and sum(counts) == TOKENS
        parts = said["cost_details"]
        assert nanos(parts["upstream_inference_prompt_cost"]) + nanos(parts["upstream_inference_completions_cost"]) == expected
        record = await recorded(shop, answered.headers["X-Generation-Id"], account)
        assert (record.charged_nanos, record.unbilled_nanos) == (expected, 0)
        if len(paid) == 2:
            assert [each.charged_nanos for each in record.attempts] == [part(*each) for each in paid]
            assert [each.usage.completion_tokens for each in record.attempts if each.usage is not None] == counts
        total += expected
    await shop.until_used(total, account)
    report = await shop.verify()
    assert (report["ok"], report["difference_nanos"]) == (True, 0)


async def test_what_does_not_end_well_is_free_and_keeps_what_it_would_have_cost(shop: Shop) -> None:
    behave(shop, "close_after_events=5", "close_after_events=4")
    account = await shop.new_account("broken@example.com", "1")
    answered = await asked(shop, account)
    assert answered.text == text_of(7) and answered.events[-1]["error"]["code"] == 502
    record = await recorded(shop, answered.headers["X-Generation-Id"], account)
    assert (record.charged_nanos, record.error) == (0, "stream_broken")
    assert record.unbilled_nanos == part(shop.cheap.books.entries[0], "cheap") + part(shop.good.books.entries[0], "good")
    assert record.usage is not None and record.usage.completion_tokens == 7
    assert await shop.used(account) == 0


async def test_what_does_not_end_well_costs_all_parts_where_broken_streams_are_charged(tmp_path: Path) -> None:
    async with opened(tmp_path, settings={"billing": {"charge_broken_streams": True}}) as shop:
        behave(shop, "close_after_events=5", "close_after_events=4")
        answered = await asked(shop)
        expected = part(shop.cheap.books.entries[0], "cheap") + part(shop.good.books.entries[0], "good")
        record = await shop.record(answered.headers["X-Generation-Id"])
        assert (record.charged_nanos, record.unbilled_nanos) == (expected, 0)


async def test_a_caller_who_leaves_the_second_part_pays_for_the_first_and_what_came_of_it(shop: Shop) -> None:
    behave(shop, "close_after_events=5", "tokens=2000;tokens_per_s=40")
    account = await shop.new_account("leaver@example.com", "1")
    async with shop.asking("acme/two", account, stream=True, **WISHES) as caller:
        _, headers = await caller.head()
        seen = b""
        while seen.count(b'"content":" ') < 7:
            seen += await caller.chunk()
    await shop.good.wait_for(lambda books: books.entries[0].cancelled is not None)
    record = await recorded(shop, headers["x-generation-id"], account)
    assert record.cancelled and record.usage is not None
    first, second = shop.cheap.books.entries[0], shop.good.books.entries[0]
    made = record.usage.completion_tokens - first.completion_tokens
    assert 3 <= made <= second.completion_tokens + 1
    counts = {"prompt": second.prompt_tokens, "completion": made}
    assert record.charged_nanos == part(first, "cheap") + priced(TWO["good"], counts)


async def test_a_caller_who_leaves_while_the_second_endpoint_is_silent_pays_for_the_first(shop: Shop) -> None:
    behave(shop, "close_after_events=5", "silent_accept=true")
    account = await shop.new_account("early@example.com", "1")
    async with shop.asking("acme/two", account, stream=True, **WISHES) as caller:
        _, headers = await caller.head()
        await shop.good.wait_for(lambda books: len(books.entries) == 1)
    record = await recorded(shop, headers["x-generation-id"], account)
    assert record.cancelled and record.charged_nanos == part(shop.cheap.books.entries[0], "cheap")


async def test_led_06_an_edge_that_dies_between_two_parts_has_the_first_one_charged(tmp_path: Path) -> None:
    async with opened(tmp_path) as shop:
        behave(shop, "close_after_events=5", "silent_accept=true")
        account = await shop.new_account("unlucky@example.com", "1")
        async with shop.asking("acme/two", account, stream=True, **WISHES) as caller:
            await caller.head()
            await shop.good.wait_for(lambda books: len(books.entries) == 1)
            folder = shop.gateway.folder / "journal"
            await eventually(lambda: any(path.stat().st_size for path in folder.glob("running-*")))
            shop.edge.kill()
        await eventually(lambda: any(found.error == "edge_lost" for found in stored(shop.gateway).values()))
        await shop.until_used(part(shop.cheap.books.entries[0], "cheap"), account)
        assert (await shop.verify())["ok"]


@pytest.mark.parametrize("beside", ["account", "key"])
async def test_led_05_nothing_goes_on_beyond_the_credit_and_nothing_is_overspent(shop: Shop, beside: str) -> None:
    # What both endpoints may cost together: the prompt at a token a byte, and all the tokens of the dearer one.
    most = priced(TWO["good"], {"prompt": len(json.dumps(HELLO)) + 16, "completion": 40})
    for spare, goes_on in ((0, False), (2_000_000, True)):
        usd = f"{(most + spare) // 10**9}.{(most + spare) % 10**9:09}"
        if beside == "account":
            account = await shop.new_account(f"poor{spare}@example.com", usd)
        else:
            account = await shop.new_key(await shop.new_account(f"rich{spare}@example.com", "5"), "--limit", usd)
        behave(shop, "close_after_events=5")
        answered = await asked(shop, account, max_tokens=40)
        assert answered.status == 200
        assert (answered.events[-1] == "[DONE]") == goes_on
        assert answered.text == text_of(TOKENS if goes_on else 4)
        assert len(shop.good.books.entries) == goes_on
        again = await asked(shop, account, max_tokens=1)  # what was held is free again
        assert again.status == 200, again.body


async def test_many_streams_that_go_on_at_once_leave_nothing_held(shop: Shop) -> None:
    behave(shop, "close_after_events=5")
    account = await shop.new_account("many@example.com", "2")
    answers = await asyncio.gather(*(asked(shop, account, max_tokens=40) for _ in range(60)))
    costs = [nanos(told(each)["cost"]) for each in answers]
    assert {each.text for each in answers} == {text_of(TOKENS)}
    await shop.until_used(sum(costs), account)
    report = await shop.verify()
    assert (report["ok"], report["difference_nanos"]) == (True, 0)
