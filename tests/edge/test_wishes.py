"""Callers' wishes over a running gateway: who answers, who is never asked, and what is said where nobody is left.

Three providers: North is cheap and trains on prompts, South keeps them, West does neither. And the endpoint that has a
conversation's prompt in its cache is asked again.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from bench.behaviour import Behaviour
from tests.edge.stage import HELLO, Stage, stage_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROVIDERS = {
    "north": ("first", "{ trains = true, retains = true }"),
    "south": ("good", "{ trains = false, retains = true }"),
    "west": ("good", "{ trains = false, retains = false, zdr = true }"),
}
DOLLAR = {0: "0", 1: "0.000001", 2: "0.000002", 4: "0.000004"}
ENDPOINTS: dict[str, list[tuple[str, int, str]]] = {
    "acme/wished": [
        ("north", 1, 'quantization = "fp8"\nsupported_parameters = ["tools", "tool_choice", "max_tokens"]'),
        (
            "south",
            2,
            'quantization = "bf16"\nsupported_parameters = ["max_tokens", "seed", "response_format"]\nmax_completion_tokens = 1000',
        ),
        ("west", 4, 'supported_parameters = ["tools", "max_tokens"]'),
    ],
    "acme/wished:free": [("north", 0, "")],
    "acme/other": [("west", 4, "")],
    "acme/failing": [("north", 1, ""), ("south", 2, "")],
    "acme/cached": [("north", 1, ""), ("south", 1, "")],
    "acme/named": [("north", 1, ""), ("south", 1, "")],
    "acme/uncached": [("north", 1, ""), ("south", 1, "")],
}
CACHING = {"acme/cached", "acme/named"}


def with_more(catalog: str) -> str:
    """The catalog with these providers, at the addresses of the Stage's own, and their models."""
    urls = dict(re.findall(r'slug = "(\w+)"\nname = "\w+"\nbase_url = "([^"]+)"', catalog))
    parts = [catalog]
    for slug, (at, data) in PROVIDERS.items():
        parts.append(f'[[providers]]\nslug = "{slug}"\nname = "{slug.title()}"\nbase_url = "{urls[at]}"\ndata = {data}')
    for model, endpoints in ENDPOINTS.items():
        parts.append(f'[[models]]\nid = "{model}"\ncontext_length = 8192')
        for slug, dollars, more in endpoints:
            cache = ', input_cache_read = "0.0000001"' if model in CACHING else ""
            name = f"{model.partition('/')[2].replace(':', '-')}-{slug}"
            price = f'pricing = {{ prompt = "{DOLLAR[dollars]}", completion = "{DOLLAR[dollars]}"{cache} }}'
            parts.append(f'[[models.endpoints]]\nprovider = "{slug}"\nupstream_model = "{name}"\n{price}\n{more}')
    return "\n".join(parts)


stage = stage_of(catalog=with_more, training=True)

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
TOO = {"models": ["acme/wished"]}
ANSWERED: dict[str, tuple[dict[str, Any], str]] = {
    "order": ({"provider": {"order": ["south", "north"]}}, "South"),
    "order skips who does not host": ({"provider": {"order": ["nobody", "west"]}}, "West"),
    "order by display name": ({"provider": {"order": ["WEST"]}}, "West"),
    "only": ({"provider": {"only": ["south"]}}, "South"),
    "ignore": ({"provider": {"ignore": ["north", "south"]}}, "West"),
    "sort by price": ({"provider": {"sort": "price"}}, "North"),
    "sort as an object": ({"provider": {"sort": {"by": "price", "partition": "model"}}}, "North"),
    "floor": ({"model": "acme/wished:floor"}, "North"),
    "order beats a variant": ({"model": "acme/wished:floor", "provider": {"order": ["west"]}}, "West"),
    "max_price": ({"provider": {"max_price": {"prompt": 1.5}}}, "North"),
    "quantizations": ({"provider": {"quantizations": ["bf16", "fp16"]}}, "South"),
    "data_collection": ({"provider": {"data_collection": "deny"}}, "West"),
    "zdr": ({"provider": {"zdr": True}}, "West"),
    "require_parameters": ({"provider": {"require_parameters": True}, "seed": 1}, "South"),
    "tools": ({"tools": TOOLS, "provider": {"ignore": ["north"]}}, "West"),
    "response_format": ({"response_format": {"type": "json_object"}}, "South"),
    "a model that cannot serve is skipped": ({"model": "acme/wished:free", **TOO, "provider": {"only": ["west"]}}, "West"),
    "all models' endpoints together": ({"model": "acme/other", **TOO, "provider": {"sort": {"by": "price", "partition": "none"}}}, "North"),
    "route sorts them too": ({"model": "acme/other", **TOO, "route": "sort", "provider": {"sort": "price"}}, "North"),
    "route fallback does not": ({"model": "acme/other", **TOO, "route": "fallback", "provider": {"sort": "price"}}, "West"),
    "every other key null": ({"provider": {"only": ["south"], **dict.fromkeys(("order", "ignore", "sort", "max_price", "zdr"))}}, "South"),
}


@pytest.mark.parametrize("name", ANSWERED)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_wish_decides_who_answers(stage: Stage, name: str, stream: bool) -> None:
    wish, provider = ANSWERED[name]
    for _ in range(3):
        answered = await stage.ask(**{"model": "acme/wished", "stream": stream, **wish})
        assert answered.status == 200, answered.body
        assert (answered.events[0] if stream else answered.json)["provider"] == provider
    sent = stage.first.books.entries[-1] if provider == "North" else stage.good.books.entries[-1]
    assert b'"provider"' not in sent.body and b'"models"' not in sent.body and b'"route"' not in sent.body


async def test_a_free_variant_is_a_model_of_its_own_and_costs_nothing(stage: Stage) -> None:
    answered = await stage.ask("acme/wished:free")
    assert (answered.json["model"], answered.json["provider"], answered.json["usage"]["cost"]) == ("acme/wished:free", "North", 0)


async def test_nitro_and_latency_follow_what_was_seen(stage: Stage) -> None:
    stage.first.set_behaviour(Behaviour(headers_delay_ms=150, tokens_per_s=200), "wished-north")
    try:
        for slug in ("north", "south", "west"):
            for _ in range(3):
                assert (await stage.ask("acme/wished", stream=True, provider={"only": [slug]})).status == 200
        wishes: list[dict[str, Any]] = [
            {"provider": {"sort": "latency"}},
            {"provider": {"sort": "throughput"}},
            {"model": "acme/wished:nitro"},
        ]
        for wish in wishes:
            answered = await stage.ask(**{"model": "acme/wished", **wish})
            assert answered.json["provider"] in ("South", "West")
    finally:
        stage.first.set_behaviour(Behaviour(), "wished-north")


async def test_without_fallbacks_nobody_else_is_asked(stage: Stage) -> None:
    stage.first.set_behaviour(Behaviour(status=500, error_message="no power"), "failing-north")
    try:
        before = stage.good.books.requests
        for wish in ({"order": ["north"], "allow_fallbacks": False}, {"sort": "price", "allow_fallbacks": False}, {"only": ["north"]}):
            answered = await stage.ask("acme/failing", provider=wish)
            assert answered.status == 502 and "no power" in answered.error["metadata"]["raw"]
        assert stage.good.books.requests == before
        assert (await stage.ask("acme/failing", provider={"order": ["north"]})).json["provider"] == "South"
        other = await stage.ask("acme/failing", provider={"only": ["north", "west"]}, models=["acme/other"])
        assert (other.json["model"], other.json["provider"]) == ("acme/other", "West")
    finally:
        stage.first.set_behaviour(Behaviour(), "failing-north")


NOBODY: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "only": ({"provider": {"only": ["nobody"]}}, "No allowed providers", {"excluded_by": ["allowed_providers"]}),
    "ignore": ({"provider": {"ignore": ["north", "south", "west"]}}, "No allowed providers", {"code": "constraint_filtered"}),
    "max_price": ({"provider": {"max_price": {"prompt": "0.5"}}}, "max_price", {"excluded_by": ["max_price"]}),
    "quantizations": ({"provider": {"quantizations": ["int4"]}}, "quantizations", {"excluded_by": ["quantization"]}),
    "zdr": ({"provider": {"zdr": True, "only": ["north"]}}, "Zero data retention", {"code": "privacy_restricted"}),
    "data_collection": ({"provider": {"data_collection": "deny", "ignore": ["west"]}}, "data policy", {"code": "privacy_restricted"}),
    "require_parameters": ({"provider": {"require_parameters": True}, "top_a": 0.5}, "parameters", {"excluded_by": ["require_parameters"]}),
    "no free variant": ({"model": "acme/other:free"}, "No endpoints found", {"code": "free_variant_ended"}),
    "tools": ({"tools": TOOLS, "provider": {"only": ["south"]}}, "tool use", {"constraint": {"field": "tools"}}),
    "max_tokens": ({"max_tokens": 9000}, "max_tokens 9000", {"constraint": {"field": "max_tokens"}}),
}


@pytest.mark.parametrize("name", NOBODY)
async def test_where_nobody_is_left_a_404_says_why_for_people_and_machines(stage: Stage, name: str) -> None:
    wish, words, availability = NOBODY[name]
    before = stage.first.books.requests + stage.good.books.requests
    answered = await stage.ask(**{"model": "acme/wished", **wish})
    assert (answered.status, answered.error["code"]) == (404, 404)
    assert words in answered.error["message"]
    told = answered.error["availability"]
    assert told["retryable"] is False and told["requested_models"]
    for key, value in availability.items():
        assert value.items() <= told[key].items() if isinstance(value, dict) else told[key] == value
    assert stage.first.books.requests + stage.good.books.requests == before


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"provider": {"prefer": ["north"]}}, "an unknown key"),
        ({"provider": {"sort": "cheapest"}}, "provider.sort"),
        ({"provider": {"order": "north"}}, "provider.order"),
        ({"provider": {"max_price": {"prompt": "a lot"}}}, "provider.max_price.prompt"),
        ({"provider": []}, "provider"),
        ({"route": "random"}, "route"),
        ({"model": "acme/wished:quick"}, "not a valid model ID"),
        ({"models": ["acme/nothing"]}, "not a valid model ID"),
    ],
)
async def test_a_wish_that_is_not_understood_is_a_400(stage: Stage, wish: dict[str, Any], words: str) -> None:
    answered = await stage.ask(**{"model": "acme/wished", **wish})
    assert answered.status == 400 and words in answered.error["message"]


# Prompt caches


def conversation(number: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": f"You are number {number}."}, *HELLO]


async def providers_of(stage: Stage, model: str, count: int, **more: Any) -> list[str]:
    return [(await stage.ask(model, **more)).json["provider"] for _ in range(count)]


async def test_a_conversation_goes_back_to_the_endpoint_that_has_its_prompt_in_the_cache_unless_that_is_sick(stage: Stage) -> None:
    cached = Behaviour(prompt_tokens=100, cached_tokens=60)
    for provider, name in ((stage.first, "cached-north"), (stage.good, "cached-south")):
        provider.set_behaviour(cached, name)
    homes = {}
    for number in range(12):
        homes[number] = (await providers_of(stage, "acme/cached", 1, messages=conversation(number)))[0]
    assert set(homes.values()) == {"North", "South"}  # others go where they like
    for number, home in homes.items():
        more = [*conversation(number), {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Go on."}]
        assert set(await providers_of(stage, "acme/cached", 4, messages=more)) == {home}
    stayed = next(number for number, home in homes.items() if home == "North")
    stage.first.set_behaviour(Behaviour(status=503), "cached-north")
    assert set(await providers_of(stage, "acme/cached", 12, messages=conversation(stayed))) == {"South"}
    north = sum(entry.model == "cached-north" and entry.status == 503 for entry in stage.first.books.entries)
    assert 1 <= north <= 6  # health outranks the cache


async def test_a_named_session_goes_back_after_any_success(stage: Stage) -> None:
    for how in ("header", "body"):
        for number in range(6):
            name = f"{how}-{number}"
            given: dict[str, Any] = {"headers": {"x-session-id": name}} if how == "header" else {"session_id": name}
            assert len(set(await providers_of(stage, "acme/named", 5, messages=conversation(0), **given))) == 1


async def test_where_nothing_is_cached_or_an_order_is_wished_nobody_is_remembered(stage: Stage) -> None:
    assert len(set(await providers_of(stage, "acme/uncached", 30, session_id="one"))) == 2
    first = (await providers_of(stage, "acme/named", 1, session_id="ordered"))[0]
    other = {"North": "south", "South": "north"}[first]
    assert await providers_of(stage, "acme/named", 1, session_id="ordered", provider={"order": [other]}) == [other.title()]
