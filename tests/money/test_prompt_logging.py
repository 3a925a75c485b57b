"""Prompt logging as an account lives with it: switched on and off over the API, read back, paid for with a discount, deleted."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.edge.stage import Answered
from tests.money.shop import Account, Shop, nanos, opened

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = base64.b64encode(secrets.token_bytes(32)).decode()
CANARY = "canary-93b1c7"
ASKED = [{"role": "user", "content": f"Say it: {CANARY}"}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    async with opened(tmp_path_factory.mktemp("shop"), workers=2, environ={"GATEWAY_CONTENT_KEY": KEY}) as shop:
        yield shop


async def privacy(shop: Shop, account: Account, **change: object) -> dict[str, Any]:
    """PATCH /privacy with a management key of the account."""
    manager = await shop.new_key(account, "--management")
    async with shop.session.patch(f"{shop.gateway.url}/api/v1/privacy", json=change, headers=manager.headers) as answer:
        assert answer.status == 200, await answer.text()
        rules: dict[str, Any] = (await answer.json())["data"]
        return rules


async def content(shop: Shop, account: Account, answered: Answered, *, deleted: bool = False) -> Any:
    """What is kept of it, waited for; None once it is not there any more."""
    async with asyncio.timeout(10.0):
        while ((found := await shop.get(f"generation/content?id={generation_id(answered)}", account)) is None) is not deleted:
            await asyncio.sleep(0.05)
    return found


def generation_id(answered: Answered) -> str:
    return answered.headers["X-Generation-Id"]


def on_disk(shop: Shop) -> list[str]:
    """Files of the gateway in which the canary stands."""
    return [path.name for path in shop.gateway.folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_was_said_is_read_back_costs_a_percent_less_and_stands_nowhere_in_clear(shop: Shop, stream: bool) -> None:
    account = await shop.new_account(f"kept-{stream}@example.com", "5")
    before = await shop.ask(stream=stream, account=account, messages=ASKED)
    assert (await privacy(shop, account, log_prompts=True))["log_prompts"] is True
    answered = await shop.ask(stream=stream, account=account, messages=ASKED)
    kept = await content(shop, account, answered)
    said = answered.text if stream else json.loads(answered.body)["choices"][0]["message"]["content"]
    assert kept["input"]["messages"] == ASKED and kept["output"]["completion"] == said != ""
    full, less = [nanos((await shop.generation(generation_id(each), account))["total_cost"]) for each in (before, answered)]
    assert less == -(-full * 99 // 100)
    await shop.until_used(full + less, account)
    assert await shop.get(f"generation/content?id={generation_id(before)}", account) is None  # said before it was switched on
    assert await shop.get(f"generation/content?id={generation_id(answered)}") is None  # another account's key
    await privacy(shop, account, log_prompts=False)
    after = await shop.ask(stream=stream, account=account, messages=ASKED)
    assert nanos((await shop.generation(generation_id(after), account))["total_cost"]) == full
    assert (await content(shop, account, answered)) == kept and await shop.get(
        f"generation/content?id={generation_id(after)}", account
    ) is None
    assert await asyncio.to_thread(on_disk, shop) == []
    assert CANARY not in json.dumps(shop.gateway.log) + shop.gateway.metrics() + "".join(shop.gateway.noise)


async def test_what_was_kept_is_deleted_one_by_one_and_all_at_once(shop: Shop) -> None:
    account = await shop.new_account("deleted@example.com", "5")
    await privacy(shop, account, log_prompts=True)
    manager = await shop.new_key(account, "--management")
    first, second, third = [await shop.ask(account=account, messages=ASKED) for _ in range(3)]
    for each in (first, second, third):
        await content(shop, account, each)
    for query, count, gone, left in ((f"id={generation_id(first)}", 1, [first], [second, third]), ("all=true", 2, [second, third], [])):
        async with shop.session.delete(f"{shop.gateway.url}/api/v1/generation/content?{query}", headers=manager.headers) as answer:
            assert (answer.status, (await answer.json())["count"]) == (200, count)
        for each in gone:
            await content(shop, account, each, deleted=True)
        for each in left:
            await content(shop, account, each)
    assert (await shop.verify())["ok"] is True  # what it cost is not forgotten with it


async def test_nothing_can_be_switched_on_where_no_key_encrypts(tmp_path: Path) -> None:
    async with opened(tmp_path, environ={"GATEWAY_CONTENT_KEY": ""}) as shop:
        manager = await shop.new_key(shop.account, "--management")
        async with shop.session.patch(f"{shop.gateway.url}/api/v1/privacy", json={"log_prompts": True}, headers=manager.headers) as answer:
            assert 400 <= answer.status < 500 and "no key to encrypt" in await answer.text()
        answered = await shop.ask(messages=ASKED)
        await shop.generation(generation_id(answered))
        assert await shop.get(f"generation/content?id={generation_id(answered)}") is None
        assert not list(shop.gateway.folder.rglob("content.sqlite*"))


async def test_nobody_pays_less_while_the_key_is_gone_and_the_wish_holds_again_once_it_is_back(tmp_path: Path) -> None:
    async with opened(tmp_path, environ={"GATEWAY_CONTENT_KEY": KEY}) as shop:
        account = await shop.new_account("gone@example.com", "5")
        full = await cost(shop, account)
        await privacy(shop, account, log_prompts=True)
        kept = await shop.ask(account=account, messages=ASKED)
        await content(shop, account, kept)
        less = -(-full * 99 // 100)
        assert await cost(shop, account) == less
        await restarted(shop, "")
        assert await cost(shop, account) == full
        assert (await privacy(shop, account, enforce_zdr=False))["log_prompts"] is True  # tells edges of the rules anew
        assert await cost(shop, account) == full
        told = [line for line in shop.gateway.log if line["event"] == "content_dropped"]
        assert [(line["level"], line["reason"]) for line in told] == [("error", "no_key")]
        await restarted(shop, KEY)
        assert await cost(shop, account) == less
        await content(shop, account, kept)
        assert (await shop.verify())["ok"]


async def cost(shop: Shop, account: Account) -> int:
    """Nanos, of one and the same question."""
    answered = await shop.ask(account=account, messages=ASKED)
    return nanos((await shop.generation(generation_id(answered), account))["total_cost"])


async def restarted(shop: Shop, key: str) -> None:
    await asyncio.to_thread(shop.gateway.stop)
    shop.gateway.environ["GATEWAY_CONTENT_KEY"] = key
    await asyncio.to_thread(shop.gateway.start)
