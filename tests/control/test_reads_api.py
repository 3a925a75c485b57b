"""What a key may read of itself, its account and its generations: a real store, the real application, a real socket."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from openrouter import components, operations

from gateway.control.api.application import public_application
from gateway.control.api.apps import app_id, app_of
from gateway.control.api.auth import Authentication
from gateway.control.api.credits import CreditsApi
from gateway.control.api.generation import GenerationApi
from gateway.control.api.key import RATE_NOTE, KeyApi, resets_at
from gateway.control.api.workspace import workspace_of
from gateway.control.catalog_source import CatalogSource
from gateway.control.store import Account, JournalSlice, Key
from gateway.control.store.sqlite import SqliteStore
from gateway.domain.catalog import Catalog, Endpoint, Model, Price, Provider
from gateway.domain.generation import AttemptRecord, Generation
from gateway.domain.keys import digest, label, new_secret
from gateway.domain.money import NANOS_PER_USD
from gateway.domain.resources import free_day
from gateway.domain.usage import Usage
from gateway.log import Log
from gateway.settings import Limits

# Of fields that the client itself still requires.
pytestmark = pytest.mark.filterwarnings(r"ignore:warning. \*\* DEPRECATED \*\*:DeprecationWarning")

MODEL = "acme/sage-1"
ENDPOINT = f"{MODEL}@north"
NOW = datetime.datetime(2026, 11, 25, 12, tzinfo=datetime.UTC)  # a Wednesday
NOW_S = NOW.timestamp()
UNKNOWN = "sk-or-v1-" + "0" * 64


def catalog() -> Catalog:
    endpoint = Endpoint(
        id=ENDPOINT,
        model_id=MODEL,
        provider="north",
        tag="north",
        upstream_model="m",
        price=Price(prompt=1, completion=1),
        context_length=9,
    )
    model = Model(id=MODEL, canonical_slug="acme/sage-1-20260401", name="Sage", context_length=9, endpoints=(endpoint,))
    return Catalog(
        revision="1", providers={"north": Provider(slug="north", name="North Cloud", base_url="http://127.0.0.1:1")}, models={MODEL: model}
    )


class Reader:
    """The application on a port of its own, its store, and two accounts: ada bought 25 USD, eve nothing."""

    def __init__(self, store: SqliteStore, http: TestClient[web.Request, web.Application], authentication: Authentication) -> None:
        self.store = store
        self.http = http
        self.authentication = authentication
        self.ada, self.ada_second, self.ada_management, self.eve = (new_secret() for _ in range(4))
        self._journaled = 0

    async def found(self) -> None:
        await self.store.create_account(
            Account(id="user_ada", email="ada@example.com", created_at_ms=1),
            [
                self.key(self.ada, limit_nanos=2 * NANOS_PER_USD, limit_reset="weekly"),
                self.key(self.ada_second),
                self.key(self.ada_management, management=True),
            ],
            topup_nanos=25 * NANOS_PER_USD,
        )
        await self.store.create_account(
            Account(id="user_eve", email="eve@example.com", created_at_ms=2), [self.key(self.eve, account_id="user_eve")], topup_nanos=0
        )

    def key(self, secret: str, *, account_id: str = "user_ada", **more: Any) -> Key:
        return Key(digest=digest(secret), account_id=account_id, name="test", label=label(secret), created_at_ms=1, **more)

    async def journal(self, *generations: Generation) -> None:
        """As control's journal reader posts them."""
        start, self._journaled = self._journaled, self._journaled + 100 * len(generations)
        records = [msgspec.msgpack.encode(each) for each in generations]
        await self.store.apply_journal(
            [JournalSlice(file="edge-0-a.1", incarnation="a", start=start, end=self._journaled, records=records)]
        )

    async def get(self, path: str, secret: str | None, status: int = 200, headers: Mapping[str, str] | None = None) -> Any:
        sent = {**(headers or {}), **({"Authorization": f"Bearer {secret}"} if secret is not None else {})}
        async with self.http.get(path, headers=sent) as answer:
            assert answer.status == status, await answer.text()
            assert answer.content_type == "application/json"
            return await answer.json()


@pytest.fixture
async def reader(tmp_path: Path) -> AsyncIterator[Reader]:
    store = await SqliteStore.open(tmp_path / "gateway.db")
    authentication = Authentication(store=store, now=lambda: NOW_S)
    catalogs = CatalogSource(tmp_path / "gateway.toml", catalog())
    routes = [
        *CreditsApi(store=store).routes(),
        *KeyApi(store=store, limits=Limits(), now=lambda: NOW_S).routes(),
        *GenerationApi(store=store, catalogs=catalogs).routes(),
    ]
    try:
        async with TestClient(TestServer(public_application(routes, authentication=authentication, log=Log("test", fd=-1)))) as http:
            reader = Reader(store, http, authentication)
            await reader.found()
            yield reader
    finally:
        await store.close()


def spent(secret: str, number: int, at: datetime.datetime, usd: float = 0.5, **more: Any) -> Generation:
    return Generation(
        id=f"gen-1764031697-{number:020}", account_id="user_ada", key_digest=digest(secret), model=MODEL,
        created_at_ms=int(at.timestamp() * 1000), charged_nanos=int(usd * NANOS_PER_USD), endpoint_id=ENDPOINT, provider="north", **more,
    )  # fmt: skip


def counted(generation: Generation) -> Generation:
    """As an edge settles what is free."""
    quota = free_day(generation.account_id, generation.created_at_ms / 1000)
    return msgspec.structs.replace(generation, settles=("balance:user_ada", quota))


# Who may ask


@pytest.mark.parametrize("path", ["/api/v1/credits", "/v1/key", "/api/v1/auth/key", "/v1/generation?id=gen-1", "/api/v1/generation"])
async def test_without_a_key_every_answer_is_the_same_401(reader: Reader, path: str) -> None:
    for headers in ({}, {"Authorization": reader.ada}, {"Authorization": "Basic eA=="}, {"Authorization": "Bearer "}, {"x-api-key": ""}):
        body = await reader.get(path, None, 401, headers)
        assert body["error"] == {"code": 401, "message": "No auth credentials found", "metadata": {"error_type": "authentication"}}
    for secret in (UNKNOWN, "x", "' OR 1=1 --", reader.ada + "0", reader.ada.upper()):
        assert (await reader.get(path, secret, 401))["error"]["message"] == "User not found."


async def test_a_key_may_come_in_the_header_of_anthropic_clients_and_with_any_case_of_bearer(reader: Reader) -> None:
    assert await reader.get("/v1/key", None, headers={"x-api-key": reader.ada}) == await reader.get("/v1/key", reader.ada)
    await reader.get("/v1/key", None, headers={"Authorization": f"bEARER   {reader.ada} "})


async def test_a_secret_of_strange_bytes_is_an_unknown_one(reader: Reader) -> None:
    port = reader.http.port
    for secret in (b"\xff\xfe", "é\u2028".encode()):
        inbound, outbound = await asyncio.open_connection("127.0.0.1", port)
        outbound.write(b"GET /v1/key HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer " + secret + b"\r\n\r\n")
        assert b" 401 " in (await inbound.read()).splitlines()[0]
        outbound.close()


async def test_disabled_and_expired_keys_are_401_to_the_second(reader: Reader) -> None:
    disabled, expired, lasting = (new_secret() for _ in range(3))
    await reader.store.create_key(reader.key(disabled, disabled=True))
    await reader.store.create_key(reader.key(expired, expires_at_s=int(NOW_S)))
    await reader.store.create_key(reader.key(lasting, expires_at_s=int(NOW_S) + 1))
    for secret in (disabled, expired):
        assert (await reader.get("/v1/credits", secret, 401))["error"]["message"] == "This key is disabled or has expired"
    assert (await reader.get("/v1/key", lasting))["data"]["expires_at"] == "2026-11-25T12:00:01.000Z"


# Credits


async def test_credits_are_what_came_in_and_what_was_used_for_either_key_class(reader: Reader) -> None:
    await reader.journal(spent(reader.ada, 1, NOW, 0.25))
    await reader.store.add_credits("user_ada", NANOS_PER_USD // 10, note="")
    for secret in (reader.ada, reader.ada_management):
        for prefix in ("/api/v1", "/v1"):
            body = await reader.get(f"{prefix}/credits", secret)
            assert body == {"data": {"total_credits": 25.1, "total_usage": 0.25}}
            operations.GetCreditsResponse.model_validate(body)
    assert await reader.get("/v1/credits", reader.eve) == {"data": {"total_credits": 0.0, "total_usage": 0.0}}


# The key


async def test_a_key_says_what_it_spent_in_each_window_and_what_is_left(reader: Reader) -> None:
    day = datetime.timedelta(days=1)
    await reader.journal(
        *(spent(reader.ada, days, NOW - days * day) for days in (0, 2, 3, 30)),  # Monday is two days ago, the month began 24 days ago
        spent(reader.ada_second, 99, NOW),
    )
    body = await reader.get("/api/v1/key", reader.ada)
    assert body == await reader.get("/api/v1/auth/key", reader.ada) == await reader.get("/v1/key", reader.ada)
    parsed = operations.GetCurrentKeyResponse.model_validate(body)
    budget = {
        "scope": "key_limit", "limit_usd": 2.0, "spend_usd": 1.0, "remaining_usd": 1.0, "reset_interval": "weekly",
        "resets_at": "2026-11-30T00:00:00.000Z", "include_byok": False, "budget_id": None, "guardrail_id": None,
    }  # fmt: skip
    assert body["data"] == {
        "label": label(reader.ada), "limit": 2.0, "limit_remaining": 1.0, "limit_reset": "weekly", "include_byok_in_limit": False,
        "usage": 2.0, "usage_daily": 0.5, "usage_weekly": 1.0, "usage_monthly": 1.5,
        "byok_usage": 0, "byok_usage_daily": 0, "byok_usage_weekly": 0, "byok_usage_monthly": 0,
        "is_free_tier": False, "is_management_key": False, "is_provisioning_key": False, "creator_user_id": "user_ada",
        "organization_id": None, "workspace_id": workspace_of("user_ada"), "allowed_data_regions": ["global"], "expires_at": None,
        "rate_limit": {"requests": 1350, "interval": "1m", "note": RATE_NOTE},
        "free_model_daily_requests": {"limit": 1000, "used": 0, "remaining": 1000}, "budgets": [budget], "effective_budget": budget,
    }  # fmt: skip
    assert parsed.data.effective_budget is not None


async def test_an_overspent_limit_has_nothing_left(reader: Reader) -> None:
    await reader.journal(spent(reader.ada, 1, NOW, 2.5))
    data = (await reader.get("/v1/key", reader.ada))["data"]
    assert (data["limit_remaining"], data["effective_budget"]["remaining_usd"]) == (0, -0.5)


async def test_a_key_without_a_limit_and_an_account_without_credit(reader: Reader) -> None:
    second, management, eve = [
        (await reader.get("/v1/key", secret))["data"] for secret in (reader.ada_second, reader.ada_management, reader.eve)
    ]
    assert (second["limit"], second["limit_remaining"], second["limit_reset"], second["budgets"], second["effective_budget"]) == (
        None, None, None, [], None
    )  # fmt: skip
    assert management["is_management_key"] and management["is_provisioning_key"]
    assert eve["is_free_tier"] and not second["is_free_tier"]
    assert eve["free_model_daily_requests"] == {"limit": 200, "used": 0, "remaining": 200}


async def test_requests_to_free_models_count_per_account_and_day(reader: Reader) -> None:
    free = [spent(secret, number, NOW, 0) for number, secret in enumerate((reader.ada, reader.ada_second, reader.ada))]
    yesterday = spent(reader.ada, 8, NOW - datetime.timedelta(days=1), 0)
    failed = spent(reader.ada, 7, NOW, 0, error="timeout")  # nothing was made, so it does not count
    free = [counted(generation) for generation in (*free, yesterday, failed)]
    await reader.journal(*free, spent(reader.ada, 9, NOW))
    for secret in (reader.ada, reader.ada_management):
        quota = (await reader.get("/v1/key", secret))["data"]["free_model_daily_requests"]
        assert quota == {"limit": 1000, "used": 3, "remaining": 997}


@pytest.mark.parametrize(
    ("reset", "now", "end"),
    [
        (None, NOW, None),
        ("daily", NOW, "2026-11-26T00:00:00.000Z"),
        ("weekly", datetime.datetime(2026, 11, 29, 23, 59, tzinfo=datetime.UTC), "2026-11-30T00:00:00.000Z"),
        ("weekly", datetime.datetime(2026, 11, 30, tzinfo=datetime.UTC), "2026-12-07T00:00:00.000Z"),
        ("monthly", NOW, "2026-12-01T00:00:00.000Z"),
        ("monthly", datetime.datetime(2026, 12, 31, 23, tzinfo=datetime.UTC), "2027-01-01T00:00:00.000Z"),
        ("monthly", datetime.datetime(2027, 2, 1, tzinfo=datetime.UTC), "2027-03-01T00:00:00.000Z"),
    ],
)
def test_a_window_ends_at_midnight_utc(reset: Any, now: datetime.datetime, end: str | None) -> None:
    assert resets_at(reset, now.timestamp()) == end


# Generations


async def test_a_generation_shows_every_key_to_every_key_of_its_account(reader: Reader) -> None:
    generation = spent(
        reader.ada, 7, NOW, 0.000117,
        upstream_id="chatcmpl-77", streamed=True, finish_reason="stop", native_finish_reason="end_turn",
        usage=Usage(prompt_tokens=21, completion_tokens=9, cached_tokens=4, reasoning_tokens=2, images=1),
        latency_ms=412, generation_ms=903, http_referer="https://app.example/", user_agent="curl/8", session_id="s-1",
        attempts=(
            AttemptRecord(endpoint_id="acme/gone@west", provider="west", outcome="connect_failed"),
            AttemptRecord(endpoint_id=ENDPOINT, provider="north", outcome="ok", status=200, latency_ms=412),
        ),
    )  # fmt: skip
    await reader.journal(generation)
    path = f"/api/v1/generation?id={generation.id}"
    body = await reader.get(path, reader.ada)
    assert body == await reader.get(path, reader.ada_second) == await reader.get(path.removeprefix("/api"), reader.ada_management)
    components.GenerationResponse.model_validate(body)
    assert body["data"] == {
        "id": generation.id, "upstream_id": "chatcmpl-77", "session_id": "s-1", "created_at": "2026-11-25T12:00:00.000Z",
        "model": MODEL, "provider_name": "North Cloud", "api_type": "completions", "streamed": True, "cancelled": False,
        "finish_reason": "stop", "native_finish_reason": "end_turn", "total_cost": 0.000117, "usage": 0.000117, "cache_discount": None,
        "is_byok": False, "upstream_inference_cost": None, "latency": 412, "generation_time": 903, "moderation_latency": None,
        "tokens_prompt": 21, "tokens_completion": 9, "native_tokens_prompt": 21, "native_tokens_completion": 9,
        "native_tokens_completion_images": None, "native_tokens_reasoning": 2, "native_tokens_cached": 4, "num_media_prompt": 1,
        "num_media_completion": None, "num_input_audio_prompt": None, "num_search_results": None, "num_fetches": None,
        "origin": "https://app.example/", "http_referer": "https://app.example/", "user_agent": "curl/8", "app_id": app_id("app.example"),
        "external_user": None, "router": None, "preset_id": None, "service_tier": None, "data_region": "global",
        "web_search_engine": None, "workspace_id": workspace_of("user_ada"),
        "provider_responses": [
            {"status": None, "provider_name": "west", "endpoint_id": "acme/gone@west", "model_permaslug": "acme/gone", "is_byok": False},
            {
                "status": 200, "provider_name": "North Cloud", "endpoint_id": ENDPOINT, "model_permaslug": "acme/sage-1-20260401",
                "is_byok": False, "latency": 412,
            },
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("referer", "title", "site"),
    [
        ("https://app.example/chat?x=1", "", "app.example"),
        ("http://APP.example", "App", "app.example"),
        ("https://app.example:8443/", "", "app.example:8443"),
        ("http://localhost:3000/", "App", "localhost:3000 app"),
        ("http://[::1]:3000/", "App", "[::1]:3000 app"),
        ("http://localhost:3000/", "", None),
        ("", "App", None),
        ("app.example", "App", None),
        ("javascript:alert(1)", "App", None),
        ("https://[", "App", None),
        ("https://", "App", None),
    ],
)
def test_an_application_is_known_by_where_it_is(referer: str, title: str, site: str | None) -> None:
    assert app_of(referer, title) == (app_id(site) if site is not None else None)


async def test_a_generation_that_failed_is_readable_too(reader: Reader) -> None:
    failed = spent(reader.ada, 1, NOW, 0)
    failed = msgspec.structs.replace(failed, endpoint_id="", provider="", status=502, error="connect_failed", kind="text")
    await reader.journal(failed)
    body = await reader.get(f"/v1/generation?id={failed.id}", reader.ada)
    parsed = components.GenerationResponse.model_validate(body).data
    assert (parsed.provider_name, parsed.tokens_prompt, parsed.total_cost, parsed.api_type, parsed.origin) == (
        None,
        None,
        0,
        "completions",
        "",
    )


async def test_foreign_and_absent_generations_are_one_404(reader: Reader) -> None:
    generation = spent(reader.ada, 1, NOW)
    await reader.journal(generation)
    bodies = [
        await reader.get(f"/v1/generation?id={sought}", reader.eve, 404)
        for sought in (generation.id, "gen-1764031697-00000000000000000002", "x" * 5000, "%00", "%ED%A0%80", "%FF", "'--", "gen-1%0A")
    ]
    assert all(body == bodies[0] for body in bodies)
    assert bodies[0]["error"]["code"] == 404


async def test_a_generation_needs_an_id(reader: Reader) -> None:
    for path in ("/v1/generation", "/v1/generation?id="):
        assert (await reader.get(path, reader.ada, 400))["error"]["message"].startswith("id: ")
