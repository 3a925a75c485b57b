"""LED-03: of some models nobody knows how long their answers get; what one may cost is bounded all the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
import pytest_asyncio

from gateway.domain.money import format_usd
from gateway.edge.snapshots import FIRST_TOKENS
from tests.conftest import eventually
from tests.money.shop import PLAIN, Account, Shop, nanos, opened, priced, sim, stored
from tests.provider_caller import datas
from tests.timing import again_if_untimely, in_time

pytestmark = pytest.mark.asyncio(loop_scope="module")

OPEN = "acme/open"
FIRST_NANOS = FIRST_TOKENS * 2000  # what is held at first, and the prompt's
PROMPT_NANOS = 64 * 1000  # at most
OVERSHOOT_NANOS = 20_000_000
SETTINGS: Mapping[str, Any] = {"billing": {"overshoot_usd": "0.02"}}
STREAMS = 20
CANCELLED_S = 0.5


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    async with opened(tmp_path_factory.mktemp("open"), settings=SETTINGS) as running:
        yield running
        assert (await running.verify())["ok"]


async def account_of(shop: Shop, credit: int) -> Account:
    return await shop.new_account(f"{time.monotonic_ns()}@example.com", format_usd(credit))


async def balance(shop: Shop, account: Account) -> int:
    told = await shop.get("credits", account)
    return nanos(told["total_credits"]) - nanos(told["total_usage"])


async def ended(shop: Shop, account: Account, **behaviour: object) -> tuple[int, list[Any], float]:
    """A stream read to its end: status, events, and when that was."""
    async with shop.asking(OPEN, account, stream=True, **sim(**behaviour)) as caller:
        status, _ = await caller.head()
        body = b""
        if status == 200:
            async with asyncio.timeout(30.0):
                while data := await caller.chunk():
                    body += data
        return status, datas(body), time.monotonic()


@again_if_untimely
async def test_led_03_endless_streams_end_when_the_credit_does(shop: Shop) -> None:
    credit = 2 * (FIRST_NANOS + PROMPT_NANOS) + FIRST_NANOS // 3
    account, asked = await account_of(shop, credit), len(shop.good.books.entries)
    told = await asyncio.gather(*(ended(shop, account, tokens=100_000_000, tokens_per_s=1500) for _ in range(STREAMS)))
    assert sorted(status for status, _, _ in told) == [200] * 2 + [402] * (STREAMS - 2)
    calls = list(shop.good.books.entries)[asked:]
    assert len(calls) == 2
    for _, events, _ in (each for each in told if each[0] == 200):
        last = events[-1]
        assert (last["error"]["code"], last["error"]["metadata"]["error_type"]) == (402, "payment_required")
        assert last["choices"][0]["finish_reason"] == "error" and "Insufficient credits" in last["error"]["message"]
    await eventually(lambda: all(entry.cancelled for entry in calls))
    ends = sorted(at for status, _, at in told if status == 200)
    for cancelled, at in zip(sorted(entry.cancelled or 0.0 for entry in calls), ends, strict=True):
        in_time(cancelled - at, CANCELLED_S, at_least=-CANCELLED_S)
    async with asyncio.timeout(10.0):
        while len(records := [each for each in stored(shop.gateway).values() if each.account_id == account.id]) < 2:
            await asyncio.sleep(0.05)
    for record in records:
        assert (record.error, record.status, record.finish_reason) == ("insufficient_credit", 402, "error")
        assert record.usage is not None and record.usage.completion_tokens > FIRST_TOKENS // 2
        assert [each.outcome for each in record.attempts] == ["insufficient_credit"]
    left = await balance(shop, account)
    assert left == credit - sum(record.charged_nanos for record in records)
    assert -OVERSHOOT_NANOS <= left < credit // 2  # it was used, not only held


async def test_led_03_a_stream_that_outgrows_its_first_hold_goes_on_while_there_is_credit(shop: Shop) -> None:
    tokens = 5 * FIRST_TOKENS
    account = await account_of(shop, 8 * FIRST_NANOS)
    status, events, _ = await ended(shop, account, tokens=tokens, tokens_per_s=6000, prompt_tokens=3)
    assert (status, events[-1]) == (200, "[DONE]")
    await shop.until_used(priced(PLAIN, {"prompt": 3, "completion": tokens}), account)
    assert await balance(shop, account) > 0


async def test_led_03_what_an_account_owes_is_bounded_where_an_answer_cannot_be_stopped(shop: Shop) -> None:
    """A whole answer comes at once: the rest of the balance and the overshoot are charged, and no more."""
    credit = FIRST_NANOS + PROMPT_NANOS
    account = await account_of(shop, credit)
    asked = sim(tokens=30_000, prompt_tokens=3)
    answered = await shop.ask(OPEN, account=account, **asked)
    assert answered.status == 200
    cost = priced(PLAIN, {"prompt": 3, "completion": 30_000})
    assert cost > credit + OVERSHOOT_NANOS
    row = await shop.generation(answered.json["id"], account)
    record = stored(shop.gateway)[answered.json["id"]]
    assert record.charged_nanos + record.unbilled_nanos == cost
    await shop.until_used(record.charged_nanos, account)
    # Of the balance the lease of this edge may lack a part that is smaller than any hold.
    assert -OVERSHOOT_NANOS <= await balance(shop, account) <= PROMPT_NANOS - OVERSHOOT_NANOS
    assert nanos(row["total_cost"]) == record.charged_nanos
    assert (await shop.ask(OPEN, account=account, **asked)).status == 402
    await shop.add(account, "0.03")
    assert (await shop.ask(OPEN, account=account, **sim(tokens=2))).status == 200


async def test_led_03_a_keys_limit_ends_an_endless_stream_as_the_balance_does(shop: Shop) -> None:
    account = await account_of(shop, 100 * FIRST_NANOS)
    key = await shop.new_key(account, "--limit", "0.02")
    status, events, _ = await ended(shop, key, tokens=100_000_000, tokens_per_s=1500)
    assert status == 200 and events[-1]["error"]["code"] in (402, 403)
    limit = 20_000_000
    async with asyncio.timeout(10.0):
        while not (charged := await shop.used(account)):
            await asyncio.sleep(0.05)
    assert limit // 2 < charged <= limit + OVERSHOOT_NANOS


@pytest.mark.parametrize("stream", [False, True])
async def test_led_03_a_callers_own_limit_makes_the_most_known(shop: Shop, stream: bool) -> None:
    most = 2 * FIRST_TOKENS
    poor, able = await account_of(shop, most * 2000), await account_of(shop, most * 2000 + PROMPT_NANOS)
    asked = {"max_tokens": most, "stream": stream, **sim(tokens=most, prompt_tokens=3)}
    refused = await shop.ask(OPEN, account=poor, **asked)
    assert refused.status == 402 and f"up to {most} tokens" in refused.json["error"]["message"]
    assert (await shop.ask(OPEN, account=able, **asked)).status == 200
    await shop.until_used(priced(PLAIN, {"prompt": 3, "completion": most}), able)


async def test_such_a_model_is_listed_without_a_context_length(shop: Shop) -> None:
    row = next(each for each in await shop.get("models") if each["id"] == OPEN)
    assert row["context_length"] is None and row["top_provider"]["context_length"] is None
    assert OPEN not in [each["id"] for each in await shop.get("models?context=1")]
    (endpoint,) = (await shop.get(f"models/{OPEN}/endpoints"))["endpoints"]
    assert (endpoint["context_length"], endpoint["max_completion_tokens"]) == (0, None)
