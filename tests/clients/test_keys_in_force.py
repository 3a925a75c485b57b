"""What is changed of a key holds on every edge, at once, for callers who are in the middle of using it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
import pytest

from bench.provider import Provider
from tests.conftest import MODEL, RunningGateway, StartGateway

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
CONNECTIONS = 8  # enough that both edges have some
REVOKED_S = 1.0  # AUT-06
STALL_S = 2.0  # what a busy machine may add


@pytest.fixture
def gateway(start_gateway: StartGateway, provider: Provider) -> RunningGateway:
    """Two edges."""
    return start_gateway({"north": f"{provider.url}/v1"}, workers=2)


class Callers:
    """Kept connections to both edges, all with one key."""

    def __init__(self, gateway: RunningGateway, secret: str) -> None:
        self._url = f"{gateway.url}/api/v1/chat/completions"
        self._headers = {"Authorization": f"Bearer {secret}"}

    async def __aenter__(self) -> Callers:
        self._sessions = [aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) for _ in range(CONNECTIONS)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for session in self._sessions:
            await session.close()

    async def statuses(self) -> list[int]:
        """One request on each connection."""

        async def ask(session: aiohttp.ClientSession) -> int:
            async with session.post(self._url, json=CHAT, headers=self._headers) as answer:
                await answer.read()
                return answer.status

        return list(await asyncio.gather(*(ask(session) for session in self._sessions)))

    async def all_become(self, status: int) -> float:
        """Seconds until every connection is answered so, and then still is."""
        began = time.monotonic()
        while set(await self.statuses()) != {status}:
            assert time.monotonic() - began < REVOKED_S + STALL_S
        took = time.monotonic() - began
        assert set(await self.statuses()) == {status}
        return took


async def manage(gateway: RunningGateway, secret: str, method: str, path: str, status: int = 200, **body: Any) -> Any:
    headers = {"Authorization": f"Bearer {secret}"}
    async with aiohttp.ClientSession() as session:
        async with session.request(method, f"{gateway.url}/api/v1{path}", headers=headers, json=body or None) as answer:
            assert answer.status == status, await answer.text()
            return await answer.json()


async def test_AUT_06_a_disabled_and_a_deleted_key_are_refused_on_every_edge_at_once(gateway: RunningGateway) -> None:
    secret = gateway.create_account("eve@example.com")["management_key"]
    made = await manage(gateway, secret, "POST", "/keys", 201, name="x")
    path = f"/keys/{made['data']['hash']}"
    async with Callers(gateway, made["key"]) as callers:
        assert set(await callers.statuses()) == {200}
        await manage(gateway, secret, "PATCH", path, disabled=True)
        await callers.all_become(401)
        await manage(gateway, secret, "PATCH", path, disabled=False)
        await callers.all_become(200)
        await manage(gateway, secret, "DELETE", path)
        await callers.all_become(401)


async def test_AUT_06_a_lowered_limit_holds_on_every_edge_at_once_and_a_raised_one_serves(gateway: RunningGateway) -> None:
    secret = gateway.create_account("eve@example.com")["management_key"]
    made = await manage(gateway, secret, "POST", "/keys", 201, name="x", limit=5)
    path = f"/keys/{made['data']['hash']}"
    async with Callers(gateway, made["key"]) as callers:
        assert set(await callers.statuses()) == {200}  # edges have leases of the limit now, for many more requests
        await manage(gateway, secret, "PATCH", path, limit=0)
        await callers.all_become(403)
        await manage(gateway, secret, "PATCH", path, limit=5, limit_reset="daily")
        await callers.all_become(200)
        await manage(gateway, secret, "PATCH", path, limit=None)
        await callers.all_become(200)
    key = await manage(gateway, secret, "GET", path)  # first: charges are still being posted
    account = await manage(gateway, secret, "GET", "/credits")
    assert key["data"]["usage"] <= account["data"]["total_usage"]


async def test_a_management_key_is_refused_on_inference_and_a_new_key_serves_without_waiting(gateway: RunningGateway) -> None:
    secret = gateway.create_account("eve@example.com")["management_key"]
    async with Callers(gateway, secret) as callers:
        assert set(await callers.statuses()) == {403}
    made = await manage(gateway, secret, "POST", "/keys", 201, name="x")
    async with Callers(gateway, made["key"]) as callers:
        assert set(await callers.statuses()) == {200}


async def test_a_deleted_account_is_served_nowhere_and_its_books_are_whole(gateway: RunningGateway) -> None:
    credentials = {"email": "grace@example.com", "password": "correct horse battery"}
    async with aiohttp.ClientSession(headers={"Origin": gateway.url}) as http:
        async with http.post(f"{gateway.url}/api/v1/account", json=credentials) as answer:
            assert answer.status == 201
        async with http.post(f"{gateway.url}/api/v1/session", json=credentials) as answer:
            session = (await answer.json())["data"]
            cookie = answer.headers["Set-Cookie"].partition(";")[0]
        headers = {"Cookie": cookie, "X-CSRF-Token": session["csrf_token"]}
        async with http.post(f"{gateway.url}/api/v1/keys", json={"name": "mine"}, headers=headers) as answer:
            key = (await answer.json())["key"]
        gateway.admin("credits", "add", "--account", session["account_id"], "--usd", "5.00")
        async with Callers(gateway, key) as callers:
            assert set(await callers.statuses()) == {200}
            async with http.delete(f"{gateway.url}/api/v1/account", json={"password": credentials["password"]}, headers=headers) as answer:
                assert answer.status == 200
            await callers.all_become(401)
    gateway.logged("control_ready")
    assert gateway.admin("ledger", "verify")["ok"]
