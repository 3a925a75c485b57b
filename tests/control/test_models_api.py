"""The public catalog over HTTP, by the contract's required keys."""

from __future__ import annotations

import datetime
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from gateway.control.api.application import public_application
from gateway.control.api.auth import Authentication
from gateway.control.api.models import ModelsApi
from gateway.control.api.route import Call, Nothing, Route
from gateway.control.catalog_source import CatalogSource
from gateway.control.store.management import ModelUse
from gateway.control.store.sqlite import SqliteStore
from gateway.domain.catalog import Catalog, DataPolicy, Endpoint, Model, Price, PriceOverride, Provider, Reasoning
from gateway.domain.money import parse_price
from gateway.domain.rules import NO_RULES, AccountRules
from gateway.log import Log
from gateway.routing.figures import Percentiles
from gateway.routing.fleet import UNSEEN, Shown

Caller = TestClient[web.Request, web.Application]

MODEL_KEYS = {
    "id", "canonical_slug", "name", "created", "context_length", "architecture", "pricing", "top_provider", "per_request_limits",
    "supported_parameters", "default_parameters", "supported_voices", "links",
}  # fmt: skip
ENDPOINT_KEYS = {
    "name", "model_id", "model_name", "provider_name", "tag", "context_length", "pricing", "quantization", "max_completion_tokens",
    "max_prompt_tokens", "supported_parameters", "supports_implicit_caching", "uptime_last_5m", "uptime_last_30m", "uptime_last_1d",
    "latency_last_30m", "throughput_last_30m", "native_tools", "service_tier", "supports_diarization", "supports_tool_choice",
}  # fmt: skip


SHOWN = {
    "acme/sage-1@south": Shown(None, None, None, Percentiles(900, 900, 900, 900), Percentiles(20, 20, 20, 20)),
    "acme/sage-1@north": Shown(None, None, None, Percentiles(300, 400, 500, 600), None),
    "acme/tiny:free@south": Shown(None, None, None, Percentiles(500, 500, 500, 500), Percentiles(90, 80, 70, 60)),
}


def price(prompt: str, completion: str, **more: Any) -> Price:
    return Price(prompt=parse_price(prompt), completion=parse_price(completion), **more)


def endpoint(model: str, provider: str, cost: Price, **more: Any) -> Endpoint:
    name = f"{model}@{provider}"
    return Endpoint(id=name, model_id=model, provider=provider, tag=provider, upstream_model="m", price=cost, context_length=32_768, **more)


def catalog() -> Catalog:
    sage, tiny, vectors = "acme/sage-1", "acme/tiny:free", "zeta/vectors"
    cached = parse_price("0.00000025")
    override = PriceOverride(min_prompt_tokens=200_000, prices={"prompt": parse_price("0.000005")})
    models = [
        Model(
            id=sage, canonical_slug="acme/sage-1-20260401", name="Acme: Sage 1", created=5, context_length=131_072, description="Wise",
            input_modalities=("text", "image"), reasoning=Reasoning(default_effort="low"), knowledge_cutoff="2026-01-01",
            endpoints=(
                endpoint(sage, "south", price("0.000003", "0.00001")),
                endpoint(
                    sage, "north",
                    price("0.0000025", "0.00001", input_cache_read=cached, discount_millionths=10_000, overrides=(override,)),
                    max_completion_tokens=8192, supported_parameters=("max_tokens", "tools", "tool_choice"), region="europe-west1",
                ),
            ),
        ),
        Model(
            id=tiny, canonical_slug=tiny, name="Acme: Tiny", created=int(time.time()), context_length=8192, tokenizer="GPT",
            distillable=True,
            endpoints=(endpoint(tiny, "south", price("0", "0")),),
        ),
        Model(
            id=vectors, canonical_slug=vectors, name="Zeta: Vectors", context_length=512, output_modalities=("embeddings",),
            endpoints=(endpoint(vectors, "south", price("0.00000001", "0")),),
        ),
    ]  # fmt: skip
    return Catalog(
        revision="1",
        providers={
            "north": Provider(
                slug="north", name="North", base_url="http://127.0.0.1:1", data=DataPolicy(trains=False, retains=False, zdr=True)
            ),
            "south": Provider(slug="south", name="South", base_url="http://127.0.0.1:2", headquarters="DE"),
        },
        models={model.id: model for model in models},
        aliases={"acme/sage-1-20260401": sage},
    )


@pytest.fixture
async def catalogs(tmp_path: Path) -> CatalogSource:
    return CatalogSource(tmp_path / "gateway.toml", catalog())


@pytest.fixture
async def caller(tmp_path: Path, catalogs: CatalogSource) -> AsyncIterator[Caller]:
    async def crash(call: Call[Nothing, Nothing]) -> web.Response:
        raise RuntimeError("a secret detail")

    async def used(first_day: str) -> dict[str, ModelUse]:
        assert (datetime.datetime.now(datetime.UTC).date() - datetime.date.fromisoformat(first_day)).days in (6, 7)
        return {"acme/tiny:free": ModelUse(requests=9, tokens=10), "zeta/vectors": ModelUse(requests=3, tokens=70)}

    def shown(endpoint_id: str) -> Shown:
        return SHOWN.get(endpoint_id, UNSEEN)

    async def no_rules(account_id: str) -> AccountRules:
        return NO_RULES

    routes = [
        *ModelsApi(catalogs=catalogs, rules=no_rules, shown=shown, used=used).routes(),
        Route(method="GET", path="/crash", access="public", handler=crash, summary="", bases=("",)),
    ]
    store = await SqliteStore.open(tmp_path / "gateway.db")
    app = public_application(routes, authentication=Authentication(store=store), log=Log("test", fd=-1))
    async with TestClient(TestServer(app)) as caller:
        yield caller
    await store.close()


async def ask(caller: Caller, path: str, status: int = 200) -> Any:
    async with caller.get(path) as answer:
        assert answer.status == status, await answer.text()
        assert answer.content_type == "application/json"
        return await answer.json()


async def test_a_model_row_has_every_required_key_and_exact_prices(caller: Caller) -> None:
    for base in ("/api/v1", "/v1"):
        body = await ask(caller, f"{base}/models")
        assert (body["total_count"], body["links"]) == (2, {"next": None})
    sage, tiny = body["data"]
    assert sage.keys() >= MODEL_KEYS and tiny.keys() >= MODEL_KEYS
    assert sage["pricing"] == {
        "prompt": "0.0000025", "completion": "0.00001", "request": "0", "image": "0", "web_search": "0", "internal_reasoning": "0",
        "input_cache_read": "0.00000025", "discount": 0.01, "overrides": [{"min_prompt_tokens": 200_000, "prompt": "0.000005"}],
    }  # fmt: skip
    assert sage["architecture"] == {
        "modality": "text+image->text", "input_modalities": ["text", "image"], "output_modalities": ["text"],
        "tokenizer": "Other", "instruct_type": None,
    }  # fmt: skip
    assert sage["top_provider"] == {"context_length": 32_768, "max_completion_tokens": 8192, "is_moderated": False}
    assert sage["supported_parameters"] == ["max_tokens", "tools", "tool_choice"]
    assert sage["reasoning"] == {"mandatory": False, "default_effort": "low"}
    assert sage["links"] == {"details": "/api/v1/models/acme/sage-1-20260401/endpoints"}


async def test_optional_keys_are_left_out_rather_than_null(caller: Caller) -> None:
    sage, tiny = (await ask(caller, "/api/v1/models"))["data"]
    assert {"description", "knowledge_cutoff", "reasoning"} <= sage.keys()
    nullable = {"per_request_limits", "supported_voices", "default_parameters"}
    assert {key for key, value in tiny.items() if value is None} <= nullable
    assert all(value is not None for value in tiny["pricing"].values())


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("output_modalities=all", ["acme/sage-1", "acme/tiny:free", "zeta/vectors"]),
        ("output_modalities=embeddings", ["zeta/vectors"]),
        ("input_modalities=image", ["acme/sage-1"]),
        ("supported_parameters=tools,tool_choice", ["acme/sage-1"]),
        ("q=TINY", ["acme/tiny:free"]),
        ("context=100000", ["acme/sage-1"]),
        ("max_price=0", ["acme/tiny:free"]),
        ("min_price=2.5&max_price=2.5", ["acme/sage-1"]),
        ("providers=North,west", ["acme/sage-1"]),
        ("zdr=true&output_modalities=all", ["acme/sage-1"]),
        ("region=eu", ["acme/sage-1"]),
        ("region=us", []),
        ("arch=gpt", ["acme/tiny:free"]),
        ("max_age_days=1", ["acme/tiny:free"]),
        ("min_age_days=1", ["acme/sage-1"]),
        ("model_authors=zeta&output_modalities=all", ["zeta/vectors"]),
        ("sort=newest", ["acme/tiny:free", "acme/sage-1"]),
        ("sort=pricing-high-to-low&output_modalities=all", ["acme/sage-1", "zeta/vectors", "acme/tiny:free"]),
        ("sort=latency-low-to-high&output_modalities=all", ["acme/sage-1", "acme/tiny:free", "zeta/vectors"]),
        ("sort=throughput-high-to-low&output_modalities=all", ["acme/tiny:free", "acme/sage-1", "zeta/vectors"]),
        ("sort=top-weekly&output_modalities=all", ["zeta/vectors", "acme/tiny:free", "acme/sage-1"]),
        ("sort=most-popular&output_modalities=all", ["acme/tiny:free", "zeta/vectors", "acme/sage-1"]),
        ("distillable=true", ["acme/tiny:free"]),
        ("distillable=false", ["acme/sage-1"]),
        ("sort=of-another-day&unknown=1", ["acme/sage-1", "acme/tiny:free"]),
    ],
)
async def test_filters_and_orders(caller: Caller, query: str, ids: list[str]) -> None:
    body = await ask(caller, f"/api/v1/models?{query}")
    assert [row["id"] for row in body["data"]] == ids
    assert body["total_count"] == len(ids)


async def test_pages_lead_to_each_other(caller: Caller) -> None:
    path: str | None = "/api/v1/models?limit=1&output_modalities=all"
    ids = []
    while path is not None:
        body = await ask(caller, path)
        assert body["total_count"] == 3
        ids += [row["id"] for row in body["data"]]
        path = body["links"]["next"]
    assert ids == ["acme/sage-1", "acme/tiny:free", "zeta/vectors"]
    assert (await ask(caller, "/api/v1/models?offset=7"))["data"] == []


@pytest.mark.parametrize(
    "query",
    [
        "region=mars",
        "min_age_days=-1",
        "limit=0",
        "limit=1001",
        "limit=-1",
        "limit=x",
        "limit=",
        "offset=-1",
        "offset=9999999999999999",
        "limit=%EF%BC%91",
        "max_price=much",
    ],
)
async def test_bad_paging_is_refused(caller: Caller, query: str) -> None:
    body = await ask(caller, f"/api/v1/models?{query}", 400)
    assert body["error"]["code"] == 400


async def test_count_one_model_endpoints_and_providers(caller: Caller) -> None:
    assert await ask(caller, "/api/v1/models/count") == {"data": {"count": 2}}
    assert (await ask(caller, "/api/v1/embeddings/models"))["data"][0]["id"] == "zeta/vectors"
    for name in ("acme/sage-1", "acme/sage-1-20260401", "acme/sage-1:nitro", "acme/sage-1:exacto:floor"):
        assert (await ask(caller, f"/api/v1/model/{name}"))["data"]["id"] == "acme/sage-1"
    assert (await ask(caller, "/api/v1/model/acme/tiny:free"))["data"]["id"] == "acme/tiny:free"
    data = (await ask(caller, "/api/v1/models/acme/sage-1/endpoints"))["data"]
    assert data.keys() == {"id", "name", "created", "description", "architecture", "endpoints"}
    south, north = data["endpoints"]
    assert south.keys() >= ENDPOINT_KEYS and north.keys() >= ENDPOINT_KEYS
    assert north["supports_tool_choice"] == {"auto": True, "none": True, "required": True, "function": True}
    assert (north["name"], south["pricing"]["discount"]) == ("North | acme/sage-1-20260401", 0)
    assert [row["tag"] for row in (await ask(caller, "/api/v1/endpoints/zdr"))["data"]] == ["north"]
    assert (await ask(caller, "/api/v1/providers"))["data"] == [
        {"name": "North", "slug": "north", "privacy_policy_url": None},
        {"name": "South", "slug": "south", "privacy_policy_url": None, "headquarters": "DE"},
    ]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/api/v1/nothing",
        "/api/v1/model/acme/Sage-1",
        "/api/v1/models/acme/none/endpoints",
        "/api/v1/models/",
        "/v1/models/acme/none",
        "/v1/models/acme%2Fnone",
        "/v1/models/none",
        "/v1/models/acme/sage-1:online",
    ],
)
async def test_unknown_paths_and_names_are_404_in_the_envelope(caller: Caller, path: str) -> None:
    error = (await ask(caller, path, 404))["error"]
    assert (error["code"], error["metadata"]["error_type"]) == (404, "not_found")


@pytest.mark.parametrize("name", ["acme/sage-1", "acme%2Fsage-1", "acme%2fsage-1:nitro", "acme/sage-1-20260401"])
async def test_openai_clients_find_one_model_at_its_name(caller: Caller, name: str) -> None:
    row = await ask(caller, f"/v1/models/{name}")
    assert row.keys() >= MODEL_KEYS
    assert (row["id"], row["object"], row["created"], row["owned_by"]) == ("acme/sage-1", "model", 5, "acme")


async def test_a_wrong_method_is_405_and_says_which_are_allowed(caller: Caller) -> None:
    async with caller.delete("/api/v1/models") as answer:
        assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
        assert (await answer.json())["error"]["code"] == 405


async def test_pages_of_any_origin_may_read_the_api_and_nothing_else(caller: Caller) -> None:
    async with caller.options("/api/v1/models", headers={"Origin": "https://app.example"}) as preflight:
        assert (preflight.status, await preflight.read()) == (204, b"")
        assert "Authorization" in preflight.headers["Access-Control-Allow-Headers"]
    for path, status in (("/v1/models", 200), ("/api/v1/nothing", 404)):
        async with caller.get(path) as answer:
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (status, "*")
    for method in ("GET", "OPTIONS"):
        async with caller.request(method, "/crash") as answer:
            assert answer.status >= 400 and "Access-Control-Allow-Origin" not in answer.headers


async def test_a_crash_is_a_generic_500(caller: Caller) -> None:
    body = await ask(caller, "/crash", 500)
    assert body["error"]["message"] == "Internal Server Error"
    assert "secret" not in str(body)


async def test_a_new_catalog_shows_at_once(caller: Caller, catalogs: CatalogSource) -> None:
    await ask(caller, "/api/v1/models")
    catalogs.catalog = Catalog(revision="2", providers={}, models={})
    assert (await ask(caller, "/api/v1/models"))["total_count"] == 0
