"""The whole public application on a real socket over a real store, with two accounts, and what edges would have been told."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from gateway.control.api.application import public_application
from gateway.control.api.auth import Authentication
from gateway.control.api.route import Route
from gateway.control.api.table import public_routes
from gateway.control.catalog_source import CatalogSource
from gateway.control.content.store import ContentStore
from gateway.control.passwords import hash_password
from gateway.control.store import Account, JournalSlice, Key
from gateway.control.store.sqlite import SqliteStore
from gateway.domain.content_keys import ContentKey
from gateway.domain.generation import Generation
from gateway.domain.keys import KeyRecord, digest, label, new_secret
from gateway.domain.money import NANOS_PER_USD
from gateway.domain.usage import Usage
from gateway.log import Log
from gateway.routing.fleet import UNSEEN
from gateway.settings import Accounts, Billing, Settings
from tests.control.test_models_api import catalog

NOW = datetime.datetime(2026, 11, 25, 12, tzinfo=datetime.UTC)  # a Wednesday
DAY = datetime.timedelta(days=1)
MODEL = "acme/sage-1"
PASSWORD = "correct horse battery"
PASSWORD_HASH = hash_password(PASSWORD)
CONTENT_KEY = ContentKey(bytes(range(32)))


class Premises:
    """ada has a password, an inference key, a management key and 25 USD; eve the same but other keys, and 1 USD."""

    def __init__(
        self, store: SqliteStore, content: ContentStore, routes: list[Route], http: TestClient[web.Request, web.Application]
    ) -> None:
        self.store = store
        self.content = content
        self.routes = routes
        self.http = http
        self.now = NOW
        self.ada, self.ada_management, self.eve, self.eve_management = (new_secret() for _ in range(4))
        self.changed: list[tuple[str, KeyRecord | None]] = []
        self.limits_changed: list[str] = []
        self.deleted = 0
        self._journaled = 0

    async def found(self) -> None:
        for name, secret, management, usd in (("ada", self.ada, self.ada_management, 25), ("eve", self.eve, self.eve_management, 1)):
            account = Account(id=f"user_{name}", email=f"{name}@example.com", created_at_ms=1, password_hash=PASSWORD_HASH)
            keys = [self.stored(secret, account.id, "inference"), self.stored(management, account.id, "management", management=True)]
            await self.store.create_account(account, keys, topup_nanos=usd * NANOS_PER_USD)

    def stored(self, secret: str, account_id: str, name: str, **more: Any) -> Key:
        return Key(digest=digest(secret), account_id=account_id, name=name, label=label(secret), created_at_ms=1, **more)

    async def journal(self, *generations: Generation) -> None:
        """As control's journal reader posts them."""
        start, self._journaled = self._journaled, self._journaled + 100 * len(generations)
        records = [msgspec.msgpack.encode(generation) for generation in generations]
        await self.store.apply_journal(
            [JournalSlice(file="edge-0-a.1", incarnation="a", start=start, end=self._journaled, records=records)]
        )

    async def ask(
        self, method: str, path: str, secret: str | None = None, status: int = 200, *, headers: Mapping[str, str] | None = None, **sent: Any
    ) -> Any:
        """The JSON of the answer, whose status is asserted."""
        bearer = {"Authorization": f"Bearer {secret}"} if secret is not None else {}
        async with self.http.request(method, path, headers={**bearer, **(headers or {})}, **sent) as answer:
            text = await answer.text()
            assert answer.status == status, text
            assert answer.content_type == "application/json"
            return await answer.json()

    async def browser(self, email: str = "ada@example.com", password: str = PASSWORD) -> Browser:
        """Signed in."""
        browser = Browser(self)
        await browser.sign_in(email, password)
        return browser


class Browser:
    """Keeps the cookie itself: the socket is not TLS, so no jar would send one that is Secure."""

    def __init__(self, premises: Premises) -> None:
        self._premises = premises
        self.cookie = ""
        self.set_cookie = ""
        self.csrf_token = ""

    @property
    def headers(self) -> dict[str, str]:
        """What a page of ours has the browser send."""
        origin = str(self._premises.http.make_url("")).rstrip("/")
        sent = {"Origin": origin, "Sec-Fetch-Site": "same-origin", "X-CSRF-Token": self.csrf_token}
        return {**sent, **({"Cookie": f"__Host-session={self.cookie}"} if self.cookie else {})}

    async def ask(self, method: str, path: str, status: int = 200, *, headers: Mapping[str, str] | None = None, **sent: Any) -> Any:
        laid = {name: value for name, value in {**self.headers, **(headers or {})}.items() if value != ""}
        async with self._premises.http.request(method, path, headers=laid, **sent) as answer:
            assert answer.status == status, await answer.text()
            if "Set-Cookie" in answer.headers:
                self.set_cookie = answer.headers["Set-Cookie"]
                self.cookie = self.set_cookie.partition(";")[0].partition("=")[2].strip('"')
            return await answer.json()

    async def sign_in(self, email: str = "ada@example.com", password: str = PASSWORD) -> None:
        body = await self.ask("POST", "/api/v1/session", json={"email": email, "password": password})
        self.csrf_token = body["data"]["csrf_token"]


@contextlib.asynccontextmanager
async def opened(
    folder: Path, *, public_url: str = "", signup_usd: str = "0", signup: bool = True, content_keys: Sequence[ContentKey] = (CONTENT_KEY,)
) -> AsyncIterator[Premises]:
    store = await SqliteStore.open(folder / "gateway.db")
    settings = Settings(billing=Billing(signup_usd=signup_usd), accounts=Accounts(signup=signup))
    settings = msgspec.structs.replace(settings, server=msgspec.structs.replace(settings.server, public_url=public_url))
    there: list[Premises] = []

    def now() -> float:
        return there[0].now.timestamp()

    def account_deleted() -> None:
        there[0].deleted += 1

    content = ContentStore(folder / "content.sqlite", content_keys, total_bytes_max=settings.content.total_bytes_max, now=now)
    authentication = Authentication(store=store, origin=settings.server.public_origin, now=now)
    routes = public_routes(
        authentication=authentication,
        store=store,
        content=content,
        catalogs=CatalogSource(folder / "gateway.toml", catalog()),
        settings=settings,
        shown=lambda endpoint_id: UNSEEN,
        on_key_changed=lambda digest, record: there[0].changed.append((digest, record)),
        on_limit_changed=lambda resource: there[0].limits_changed.append(resource),
        on_account_deleted=account_deleted,
        now=now,
    )
    try:
        app = public_application(routes, authentication=authentication, log=Log("test", fd=-1))
        async with TestClient(TestServer(app)) as http:
            premises = Premises(store, content, routes, http)
            there.append(premises)
            await premises.found()
            yield premises
    finally:
        assert (await store.verify_ledger()).ok
        await content.close()
        await store.close()


def spent(secret: str, number: int, at: datetime.datetime = NOW, usd: float = 0.5, *, account: str = "user_ada", **more: Any) -> Generation:
    """A finished exchange with this key."""
    given: dict[str, Any] = {
        "id": f"gen-1764031697-{number:020}",
        "account_id": account,
        "key_digest": digest(secret),
        "model": MODEL,
        "created_at_ms": int(at.timestamp() * 1000),
        "charged_nanos": int(usd * NANOS_PER_USD),
        "endpoint_id": f"{MODEL}@north",
        "provider": "north",
        "usage": Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=2, reasoning_tokens=1),
    }
    return Generation(**{**given, **more})
