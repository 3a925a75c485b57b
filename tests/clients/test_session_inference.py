"""Inference by a signed-in browser: pages of ours alone, until the session ends, at the account's expense and on no key's books."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from bench.provider import Provider
from gateway.domain.keys import digest, new_secret
from tests.clients.browser import CHAT, PASSWORD, ROUTE, Browser
from tests.conftest import RunningGateway, StartGateway

ENDED_S = 1.0  # WEB-01
STALL_S = 2.0  # what a busy machine may add


@pytest.fixture
def gateway(start_gateway: StartGateway, provider: Provider) -> RunningGateway:
    """Two edges."""
    return start_gateway({"north": f"{provider.url}/v1"}, workers=2)


@pytest.fixture
async def browser(gateway: RunningGateway) -> AsyncIterator[Browser]:
    """Signed in, with 5 USD."""
    async with Browser(gateway) as there:
        await there.sign_up()
        await asyncio.to_thread(gateway.admin, "credits", "add", "--account", there.account_id, "--usd", "5.00")
        yield there


async def all_become(browser: Browser, status: int) -> None:
    """Every edge answers so, within the second."""
    began = time.monotonic()
    while await browser.statuses() != {status}:
        assert time.monotonic() - began < ENDED_S + STALL_S
    assert await browser.statuses() == {status}


async def generation_of(browser: Browser, generation_id: str) -> Any:
    found: list[Any] = []
    async with asyncio.timeout(10.0):
        while not found:
            async with browser.asked("GET", f"/generation?id={generation_id}") as answer:
                if answer.status == 200:
                    found.append((await answer.json())["data"])
                else:
                    await asyncio.sleep(0.02)  # the journal is read by control, at its own pace
    return found[0]


async def test_a_session_is_served_on_every_edge_and_pays_from_its_account(browser: Browser) -> None:
    assert await browser.statuses() == {200}
    made = await browser.ask("POST", "/keys", 201, {"name": "mine"})
    async with browser.asked("POST", ROUTE, {**CHAT, "stream": True}) as answer:
        assert answer.status == 200 and b"[DONE]" in await answer.read()
        generation_id = answer.headers["X-Generation-Id"]
        assert answer.headers["Access-Control-Allow-Origin"] == "*" and "Access-Control-Allow-Credentials" not in answer.headers
    generation = await generation_of(browser, generation_id)
    assert generation["streamed"] and generation["total_cost"] > 0
    line = await asyncio.to_thread(browser.gateway.logged, "exchange", generation=generation_id)
    assert (line["key"], line["account"]) == ("session", browser.account_id) and browser.cookie not in str(browser.gateway.log)
    used = (await browser.ask("GET", "/credits"))["data"]["total_usage"]
    assert used >= generation["total_cost"]
    assert (await browser.ask("GET", f"/keys/{made['data']['hash']}"))["data"]["usage"] == 0  # of no key
    assert (await browser.ask("GET", "/activity"))["data"] == []  # of today, which is not over
    assert (await asyncio.to_thread(browser.gateway.admin, "ledger", "verify"))["ok"]


STRANGE: list[dict[str, str | None]] = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "none"},
    {"Content-Type": "text/plain"},
    {"Content-Type": "application/x-www-form-urlencoded"},
    {"X-CSRF-Token": None},
    {"X-CSRF-Token": "0" * 64},
    {"X-CSRF-Token": "ä"},
]


async def test_WEB_02_pages_of_others_spend_nothing(browser: Browser, provider: Provider) -> None:
    for route in (ROUTE, "/completions"):
        for headers in STRANGE:
            error = (await browser.ask("POST", route, 403, {**CHAT, "prompt": "Hello"}, headers=headers))["error"]
            assert error["code"] == 403, headers
    assert not provider.books.entries
    assert await browser.statuses() == {200}


async def test_AUT_04_a_key_is_no_session_and_a_session_no_key_and_the_key_counts_where_both_come(
    browser: Browser, gateway: RunningGateway
) -> None:
    unknown = {"Authorization": f"Bearer {new_secret()}"}
    await browser.ask("POST", ROUTE, 401, CHAT, headers=unknown)  # does not fall through to the cookie
    await browser.ask("POST", ROUTE, 401, CHAT, headers={"Authorization": "Basic Og=="})
    both = {"Authorization": f"Bearer {gateway.key}", "Origin": "https://app.example", "X-CSRF-Token": None}
    answer = await browser.ask("POST", ROUTE, 200, CHAT, headers=both)  # a key needs no page of ours
    line = await asyncio.to_thread(gateway.logged, "exchange", generation=answer["id"])
    assert line["account"] == gateway.account_id != browser.account_id
    await browser.ask("POST", ROUTE, 401, CHAT, headers={"Authorization": f"Bearer {browser.cookie}", "Cookie": None})
    await browser.ask("POST", ROUTE, 401, CHAT, headers={"Authorization": f"Bearer session:{digest(browser.cookie)}"})
    in_cookie = {"Cookie": f"__Host-session={gateway.key}", "X-CSRF-Token": digest(b"csrf:" + gateway.key.encode())}
    await browser.ask("POST", ROUTE, 401, CHAT, headers=in_cookie)
    for cookie in ("", "__Host-session=", "session=x", f"__Host-session2={browser.cookie}", "__Host-session=" + "a" * 600):
        await browser.ask("POST", ROUTE, 401, CHAT, headers={"Cookie": cookie})


async def test_WEB_01_signing_out_ends_a_session_on_every_edge_at_once(browser: Browser) -> None:
    assert await browser.statuses() == {200}
    cookie = browser.cookie
    await browser.ask("DELETE", "/session")
    browser.cookie = cookie
    await all_become(browser, 401)
    error = (await browser.ask("POST", ROUTE, 401, CHAT))["error"]
    assert error["message"] == "This session is over; sign in again"


async def test_WEB_01_a_new_password_and_a_new_sign_in_end_what_was_open_before(browser: Browser, gateway: RunningGateway) -> None:
    async with Browser(gateway) as elsewhere:
        await elsewhere.sign_in()
        assert await browser.statuses() == await elsewhere.statuses() == {200}
        changed = await browser.ask("PATCH", "/account", 200, {"password": PASSWORD, "new_password": "another horse battery"})
        await all_become(elsewhere, 401)
        browser.csrf_token = changed["data"]["csrf_token"]
        assert await browser.statuses() == {200}
        before, token = browser.cookie, browser.csrf_token
        await browser.sign_in("another horse battery")
        assert await browser.statuses() == {200}
        browser.cookie, browser.csrf_token = before, token
        await all_become(browser, 401)


async def test_a_deleted_account_has_no_session_left(browser: Browser) -> None:
    assert await browser.statuses() == {200}
    cookie = browser.cookie
    await browser.ask("DELETE", "/account", 200, {"password": PASSWORD})
    browser.cookie = cookie
    await all_become(browser, 401)


async def test_what_the_account_allows_binds_its_sessions_at_once(browser: Browser, gateway: RunningGateway) -> None:
    assert await browser.statuses() == {200}
    await asyncio.to_thread(gateway.admin, "account", "set", "--account", browser.account_id, "--ignore", "north")
    await all_become(browser, 404)


async def test_an_account_without_credit_is_refused_by_session_as_by_key(gateway: RunningGateway) -> None:
    async with Browser(gateway) as poor:
        await poor.sign_up()
        assert await poor.statuses() == {402}


async def test_the_configured_address_alone_is_ours(start_gateway: StartGateway, provider: Provider) -> None:
    gateway = start_gateway({"north": f"{provider.url}/v1"}, settings={"server": {"public_url": "https://ai.example/x"}})
    async with Browser(gateway) as browser:
        browser.extra = {"Origin": "https://ai.example"}
        await browser.sign_up()
        assert await browser.statuses() == {402}
        browser.extra = {}
        assert await browser.statuses() == {403}
        browser.extra = {"Origin": "https://evil.example", "Host": "evil.example"}
        assert await browser.statuses() == {403}


async def test_a_trusted_proxy_tells_whether_the_page_came_safely(start_gateway: StartGateway, provider: Provider) -> None:
    trusting = start_gateway({"north": f"{provider.url}/v1"}, settings={"server": {"trusted_proxies": ["127.0.0.0/8"]}})
    doubting = start_gateway({"north": f"{provider.url}/v1"})
    for gateway, plain in ((trusting, 403), (doubting, 402)):
        async with Browser(gateway) as browser:
            secure = gateway.url.replace("http://", "https://")
            browser.extra = {"Origin": secure, "X-Forwarded-Proto": "https"}
            await browser.sign_up()
            assert await browser.statuses() == {402}
            browser.extra["Origin"] = gateway.url  # the same host, but a page that anybody on the way could have written
            assert await browser.statuses() == {plain}
            await browser.ask("DELETE", "/session", 403 if plain == 403 else 200)


async def test_sign_ups_are_counted_by_the_address_that_a_trusted_proxy_tells(start_gateway: StartGateway) -> None:
    trusting = start_gateway({"north": "http://127.0.0.1:9/v1"}, settings={"server": {"trusted_proxies": ["127.0.0.1"]}})
    doubting = start_gateway({"north": "http://127.0.0.1:9/v1"})

    async def sign_up(browser: Browser, number: int, address: str) -> int:
        body = {"email": f"n{number}@example.com", "password": PASSWORD}
        headers = {"X-Forwarded-For": f"{number}.1.1.1, {address}", "X-Real-IP": f"10.0.0.{number}", "X-Gateway-Caller": f"10.0.0.{number}"}
        async with browser.asked("POST", "/account", body, headers=headers) as answer:
            await answer.read()
            return answer.status

    async with Browser(trusting) as browser:
        assert [await sign_up(browser, number, f"2001:db8::{number:x}") for number in range(20)] == [201] * 20  # one network of a caller
        assert await sign_up(browser, 20, "2001:db8::ffff") == 429
        assert await sign_up(browser, 21, "198.51.100.2") == 201
    async with Browser(doubting) as browser:
        assert [await sign_up(browser, number, f"198.51.100.{number}") for number in range(21)] == [201] * 20 + [429]
