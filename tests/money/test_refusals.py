"""Credit comes before service: who has none is told so, with what would help, and no provider is called for it."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from gateway.domain.money import format_usd
from tests.edge.stage import HELLO, Answered
from tests.money.shop import Account, Shop, nanos, opened, sim

pytestmark = pytest.mark.asyncio(loop_scope="module")

# What the prompt of `ask` is held at where money is short: a token per byte of its messages, and 16 for a template.
PROMPT_TOKENS = len(json.dumps(HELLO, separators=(", ", ": "))) + 16
ASKED: dict[str, Any] = {"max_tokens": 10}
HOLD_NANOS = PROMPT_TOKENS * 1000 + 10 * 2000  # of `ask(**ASKED)`
SPENDS_IT_ALL = ASKED | sim(prompt_tokens=PROMPT_TOKENS, tokens=10)
numbers = count()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    async with opened(tmp_path_factory.mktemp("refusals")) as running:
        yield running
        assert (await running.verify())["ok"]


async def owner(shop: Shop, money_nanos: int) -> Account:
    return await shop.new_account(f"owner-{next(numbers)}@example.com", format_usd(money_nanos))


def refused(answered: Answered, status: int, message: str) -> re.Match[str]:
    """The refusal's message, which is of this form."""
    error = answered.error
    assert (answered.status, error["code"]) == (status, status), error
    found = re.fullmatch(message, error["message"])
    assert found, error["message"]
    return found


NO_CREDIT = r"Insufficient credits\. Add more using /credits"
TOO_LITTLE = (
    r"This request requires more credits, or fewer max_tokens\. You requested up to (\d+) tokens, but can only afford (\d+)\. "
    r"To increase, visit /settings/credits and add more credits"
)
KEY_LIMIT = r"Key limit exceeded \((total|daily|weekly|monthly) limit\)\. Manage it using /settings/keys"


async def test_too_little_credit_is_a_402_that_names_what_can_be_afforded(shop: Shop) -> None:
    account, called = await owner(shop, HOLD_NANOS + 999), shop.good.books.requests
    for stream in (False, True):
        told = refused(await shop.ask(account=account, stream=stream), 402, TOO_LITTLE)
        assert (int(told[1]), int(told[2])) == (8192, 10)
    told = refused(await shop.ask(account=account, max_tokens=11), 402, TOO_LITTLE)
    assert (int(told[1]), int(told[2])) == (11, 10)
    assert shop.good.books.requests == called
    assert (await shop.ask(account=account, **SPENDS_IT_ALL)).status == 200  # what was called affordable is
    refused(await shop.ask(account=account, **ASKED), 402, TOO_LITTLE)  # 999 nanos are not nothing
    assert shop.good.books.requests == called + 1


async def test_led_02_what_a_provider_may_read_is_held_for_whatever_field_it_stands_in(shop: Shop) -> None:
    """Else a thousand calls at once, each with a long `functions` and a short prompt, would spend what nobody has."""
    account, called = await owner(shop, 2 * HOLD_NANOS), shop.good.books.requests
    long = [{"name": "f", "description": "x" * 10_000}]
    for field in ("functions", "documents", "unheard_of"):
        asked: dict[str, Any] = ASKED | {field: long}
        refused(await shop.ask(account=account, **asked), 402, NO_CREDIT + "|" + TOO_LITTLE)
    assert shop.good.books.requests == called
    assert (await shop.ask(account=account, **ASKED, functions=[{"name": "f"}])).status == 200


async def test_led_02_a_request_is_for_one_answer_at_the_standard_price(shop: Shop) -> None:
    account, called = await owner(shop, 10**9), shop.good.books.requests
    wishes: list[dict[str, Any]] = [
        {"n": 2},
        {"best_of": 2},
        {"prompt": ["a", "b"]},
        {"prompt": [[1], [2]]},
        {"prompt": "a", "best_of": 20},
    ]
    for wish in wishes:
        assert (await shop.ask(account=account, **wish)).status == 400
    assert shop.good.books.requests == called
    assert (await shop.ask(account=account, **ASKED, service_tier="priority")).status == 200
    assert b"service_tier" not in shop.good.books.entries[-1].body


async def test_a_prompt_that_cannot_be_paid_for_leaves_no_token_to_afford(shop: Shop) -> None:
    account = await owner(shop, 5000)
    assert refused(await shop.ask(account=account), 402, TOO_LITTLE)[2] == "0"


async def test_without_credit_the_answer_is_402_until_the_moment_that_credit_is_added(shop: Shop) -> None:
    account, called = await owner(shop, HOLD_NANOS), shop.good.books.requests
    assert (await shop.ask(account=account, **SPENDS_IT_ALL)).status == 200
    for _ in range(3):
        refused(await shop.ask(account=account, **ASKED), 402, NO_CREDIT)
    assert shop.good.books.requests == called + 1
    await shop.add(account, "1.00")
    assert (await shop.ask(account=account, **ASKED)).status == 200  # at once, and not when the refusal is forgotten


async def test_led_02_what_pays_for_50_calls_pays_for_50_calls(shop: Shop) -> None:
    account = await owner(shop, 50 * HOLD_NANOS)
    outcomes = Counter(
        answered.status for answered in await asyncio.gather(*(shop.ask(account=account, **SPENDS_IT_ALL) for _ in range(300)))
    )
    assert outcomes == {200: 50, 402: 250}
    await shop.until_used(50 * HOLD_NANOS, account)


async def test_led_02_what_pays_for_50_calls_pays_for_50_calls_at_four_edges(tmp_path: Path) -> None:
    async with opened(tmp_path, workers=4) as shop:
        account = await owner(shop, 50 * HOLD_NANOS)
        connector = aiohttp.TCPConnector(limit=50, force_close=True)  # spread over the edges
        async with aiohttp.ClientSession(connector=connector) as session:
            body = {"model": "acme/plain", "messages": HELLO, **SPENDS_IT_ALL}

            async def ask() -> int:
                async with session.post(f"{shop.gateway.url}/api/v1/chat/completions", json=body, headers=account.headers) as answer:
                    await answer.read()
                    return answer.status

            outcomes = Counter(await asyncio.gather(*(ask() for _ in range(300))))
        assert outcomes == {200: 50, 402: 250}
        await shop.until_used(50 * HOLD_NANOS, account)
        assert (await shop.verify())["ok"]


# Keys with a limit of their own.


@pytest.mark.parametrize("reset", ["", "daily", "weekly", "monthly"])
async def test_a_key_at_its_limit_is_a_403_and_the_account_is_not(shop: Shop, reset: str) -> None:
    account = await owner(shop, 10**9)
    key = await shop.new_key(account, "--limit", format_usd(HOLD_NANOS), *(("--limit-reset", reset) if reset else ()))
    called = shop.good.books.requests
    assert refused(await shop.ask(account=key), 402, TOO_LITTLE)[2] == "10"
    assert (await shop.ask(account=key, **SPENDS_IT_ALL)).status == 200
    for stream in (False, True):
        told = refused(await shop.ask(account=key, stream=stream, **ASKED), 403, KEY_LIMIT)
        assert told[1] == (reset or "total")
    assert shop.good.books.requests == called + 1
    assert (await shop.ask(account=account, **ASKED)).status == 200
    async with asyncio.timeout(20.0):
        while nanos((row := await shop.get("key", key))["usage"]) != HOLD_NANOS:
            await asyncio.sleep(0.05)
    assert nanos(row["limit_remaining"]) == 0 and nanos(row["limit"]) == HOLD_NANOS


async def test_a_key_with_a_limit_of_nothing_is_for_free_models(shop: Shop) -> None:
    key = await shop.new_key(await owner(shop, 10**9), "--limit", "0")
    refused(await shop.ask(account=key, **ASKED), 403, KEY_LIMIT)
    assert (await shop.ask("acme/free", account=key)).status == 200


async def test_a_limit_above_the_balance_does_not_lend(shop: Shop) -> None:
    key = await shop.new_key(await owner(shop, HOLD_NANOS), "--limit", "100")
    assert (await shop.ask(account=key, **SPENDS_IT_ALL)).status == 200
    refused(await shop.ask(account=key, **ASKED), 402, NO_CREDIT)


# Free models.


@pytest.mark.parametrize("stream", [False, True])
async def test_free_models_are_served_at_balance_zero_also_right_after_a_refusal(shop: Shop, stream: bool) -> None:
    account = await owner(shop, 0)
    refused(await shop.ask(account=account, stream=stream, **ASKED), 402, NO_CREDIT)
    assert (await shop.ask("acme/free", account=account, stream=stream)).status == 200
    refused(await shop.ask(account=account, stream=stream, **ASKED), 402, NO_CREDIT)
    assert (await shop.ask("acme/free", account=account, stream=stream)).status == 200


async def test_below_zero_nothing_is_served_until_the_debt_is_paid(shop: Shop) -> None:
    """A provider that counts more than one token per byte of the prompt can take an account below zero."""
    account = await owner(shop, HOLD_NANOS)
    assert (await shop.ask(account=account, **ASKED, **sim(prompt_tokens=10_000))).status == 200
    owed = 10_000 * 1000 + 10 * 2000 - HOLD_NANOS
    for model in ("acme/free", "acme/plain", "acme/free"):
        refused(await shop.ask(model, account=account, **ASKED), 402, NO_CREDIT)
    await shop.add(account, format_usd(owed))
    assert (await shop.ask("acme/free", account=account)).status == 200
    refused(await shop.ask(account=account, **ASKED), 402, NO_CREDIT)
    await shop.until_used(HOLD_NANOS + owed, account)
    assert nanos((await shop.get("credits", account))["total_credits"]) == HOLD_NANOS + owed


async def test_a_refused_request_is_no_generation(shop: Shop) -> None:
    account = await owner(shop, 0)
    answered = await shop.ask(account=account)
    assert await shop.get(f"generation?id={answered.headers['X-Generation-Id']}", account) is None
