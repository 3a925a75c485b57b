"""A signed-in browser in front of a running gateway, as far as its requests tell: a cookie, an origin, a token."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any

import aiohttp

from tests.conftest import MODEL, RunningGateway

PASSWORD = "correct horse battery"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
ROUTE = "/chat/completions"
CONNECTIONS = 8  # enough that each of two edges has some


class Browser:
    """Several kept connections. Keeps the cookie itself: the socket is not TLS, so no jar would send one that is Secure."""

    def __init__(self, gateway: RunningGateway, email: str = "grace@example.com") -> None:
        self.gateway = gateway
        self.email = email
        self.cookie = ""  # the session's secret
        self.csrf_token = ""
        self.account_id = ""
        self.extra: dict[str, str] = {}  # what a proxy adds on the way
        self._lines: list[aiohttp.ClientSession] = []

    async def __aenter__(self) -> Browser:
        self._lines = [aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) for _ in range(CONNECTIONS)]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for line in self._lines:
            await line.close()

    @property
    def headers(self) -> dict[str, str]:
        """What a page of ours has the browser send."""
        sent = {"Origin": self.gateway.url, "Sec-Fetch-Site": "same-origin", "X-CSRF-Token": self.csrf_token, **self.extra}
        return {**sent, "Cookie": f"theme=dark; __Host-session={self.cookie}"} if self.cookie else sent

    @contextlib.asynccontextmanager
    async def asked(
        self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str | None] | None = None, line: int = 0, **sent: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """`headers` are laid over the page's own; None takes one away."""
        laid = {name: value for name, value in {**self.headers, **(headers or {})}.items() if value is not None}
        async with self._lines[line].request(method, f"{self.gateway.url}/api/v1{path}", json=body, headers=laid, **sent) as answer:
            yield answer

    async def ask(self, method: str, path: str, status: int = 200, body: Any = None, **more: Any) -> Any:
        async with self.asked(method, path, body, **more) as answer:
            assert answer.status == status, await answer.text()
            if (set_cookie := answer.headers.get("Set-Cookie")) is not None:
                self.cookie = set_cookie.partition(";")[0].partition("=")[2].strip('"')
            return await answer.json()

    async def sign_up(self) -> None:
        await self.ask("POST", "/account", 201, {"email": self.email, "password": PASSWORD})
        await self.sign_in()

    async def sign_in(self, password: str = PASSWORD) -> None:
        session = (await self.ask("POST", "/session", 200, {"email": self.email, "password": password}))["data"]
        self.csrf_token, self.account_id = session["csrf_token"], session["account_id"]

    async def statuses(self) -> set[int]:
        """Of one request for inference on each connection."""
        found = set()
        for line in range(CONNECTIONS):
            async with self.asked("POST", ROUTE, CHAT, line=line) as answer:
                await answer.read()
                found.add(answer.status)
        return found
