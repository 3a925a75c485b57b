"""The `provider` object: every field, its types and defaults, what it does to the order, and what is said when nothing is left."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.domain.catalog import Price
from gateway.domain.errors import BadRequest, NoEndpointMatches, UnknownModel, envelope
from gateway.domain.rules import AccountRules
from gateway.routing.filters import Needs
from gateway.routing.known_wishes import Wished
from gateway.routing.wishes import Cutoffs, Sort, Wishes, read_wishes, routed
from tests.routing.market import ALL, DATA, MODEL, TRAINING, order, scene
from tests.routing.scene import Scene, endpoint, model_of


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({}, ALL),
        (dict.fromkeys(Wishes.__struct_fields__), ALL),  # null is as absent
        ({"only": ["south"]}, {"south", "south/eu"}),  # a provider's slug means all its endpoints
        ({"only": ["south/eu"]}, {"south/eu"}),  # a tag exactly one
        ({"only": ["SOUTH", "North"]}, {"north", "south", "south/eu"}),  # any case, and display names
        ({"only": ["west"]}, {"west"}),  # but not a service tier,
        ({"only": ["west/priority"]}, {"west/priority"}),  # which must be named
        ({"ignore": ["south"]}, {"north", "west"}),
        ({"ignore": ["south/eu", "nobody"]}, {"north", "south", "west"}),
        ({"only": ["south", "west"], "ignore": ["west"]}, {"south", "south/eu"}),
        ({"quantizations": ["fp8", "bf16"]}, {"north", "south"}),
        ({"quantizations": ["unknown"]}, {"south/eu", "west"}),
        ({"data_collection": "allow"}, ALL),
        ({"data_collection": "deny"}, {"west"}),
        ({"zdr": True}, {"west"}),
        ({"zdr": False}, ALL),
        ({"max_price": {"prompt": 2.5}}, {"north", "south"}),
        ({"max_price": {"prompt": "2", "completion": 3}}, {"north", "south"}),
        ({"max_price": {"audio": 0}}, ALL),
    ],
)
def test_a_filter_leaves_what_it_says(wishes: dict[str, Any], expected: set[str]) -> None:
    assert set(order(wishes)) == expected


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({"order": ["west", "north"]}, ["west", "north", "south", "south/eu"]),
        ({"order": ["nobody", "south/eu"]}, ["south/eu", "north", "south", "west"]),
        ({"order": ["west", "south"], "allow_fallbacks": False}, ["west", "south", "south/eu"]),
        ({"order": ["west/priority"]}, ["west/priority", "north", "south", "south/eu", "west"]),
        ({"sort": "price"}, ["north", "south", "south/eu", "west"]),
        ({"sort": {"by": "price"}}, ["north", "south", "south/eu", "west"]),
        ({"sort": "price", "allow_fallbacks": False}, ["north"]),
        ({"sort": "price", "ignore": ["north"]}, ["south", "south/eu", "west"]),
        ({"order": ["west"], "sort": "price"}, ["west", "north", "south", "south/eu"]),
    ],
)
def test_an_order_is_strict(wishes: dict[str, Any], expected: list[str]) -> None:
    at = scene()
    assert {tuple(order(wishes, at=at)) for _ in range(20)} == {tuple(expected)}


def test_without_fallbacks_there_is_one_endpoint() -> None:
    at = scene()
    assert {len(order({"allow_fallbacks": False}, at=at)) for _ in range(50)} == {1}


def warmed() -> Scene:
    at = scene()
    for _ in range(20):
        at.call("north", 0.9, tokens=100, gen_s=1.0)
        at.call("south", 0.2, tokens=100, gen_s=4.0)
        at.call("south/eu", 0.5, tokens=100, gen_s=0.5)
        at.now_s += 0.1
    return at


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({"sort": "latency"}, ["south", "south/eu", "north", "west"]),  # what nobody knows goes last
        ({"sort": "throughput"}, ["south/eu", "north", "south", "west"]),
        ({"sort": "price", "preferred_max_latency": 0.6}, ["south", "south/eu", "west", "north"]),  # demoted, never removed
        ({"sort": "price", "preferred_max_latency": {"p99": 0.3}}, ["south", "west", "north", "south/eu"]),
        ({"sort": "price", "preferred_min_throughput": 50}, ["north", "south/eu", "west", "south"]),
        ({"sort": "price", "preferred_min_throughput": {"p50": 50, "p90": 150}}, ["south/eu", "west", "north", "south"]),
        ({"sort": "price", "preferred_max_latency": 0.6, "preferred_min_throughput": 50}, ["south/eu", "west", "north", "south"]),
    ],
)
def test_speeds_sort_and_demote(wishes: dict[str, Any], expected: list[str]) -> None:
    assert order(wishes, at=warmed()) == expected


@pytest.mark.parametrize(
    ("name", "first", "among"),
    [
        ("acme/large:nitro", "south/eu", True),
        ("acme/large:floor", "north", False),
        ("acme/large:exacto:nitro", "south/eu", True),
        ("acme/large:beta", None, False),
    ],
)
def test_dynamic_variants_work_on_any_model(name: str, first: str | None, among: bool) -> None:
    found = order({}, name, at=warmed())
    assert first is None or found[0] == first
    assert ("west/priority" in found) is among  # nitro lets the priority tier join


def test_order_keeps_tiers_out_also_for_nitro() -> None:
    assert "west/priority" not in order({"order": ["north"]}, "acme/large:nitro")


@pytest.mark.parametrize("name", ["acme/large:online", "acme/large:nitro:online", "acme/large:online:floor", "acme/none:online"])
def test_a_web_search_is_refused_since_nobody_does_one(name: str) -> None:
    with pytest.raises(BadRequest, match="model: :online asks for a web search"):
        scene().router.resolve(name)


def test_a_model_without_an_endpoint_in_service_is_404_and_not_to_be_tried_again() -> None:
    at = scene()
    at.show(at.model, without=[each.id for each in at.model.endpoints])
    for wishes in ({}, {"sort": "price"}):
        with pytest.raises(NoEndpointMatches) as refused:
            order(wishes, at=at)
        body = json.loads(envelope(refused.value))["error"]
        assert (body["code"], body["availability"]["code"], body["availability"]["retryable"]) == (404, "no_endpoints", False)
        assert refused.value.retry_after_s is None


@pytest.mark.parametrize(
    "name", ["acme/none", "acme/large:thinking", "acme/large:extended", "acme/none:nitro", "acme/large:NITRO", ":nitro", ""]
)
def test_unknown_names_and_unlisted_variants_are_refused(name: str) -> None:
    with pytest.raises(UnknownModel):
        scene().router.resolve(name)


def test_static_variants_are_models_of_their_own() -> None:
    free = model_of([endpoint("north", 0.0, model="acme/large:free")])
    at = Scene(MODEL, free, data=DATA, rules=TRAINING)
    assert at.router.resolve("acme/large:free").model is free
    assert at.router.resolve("acme/large:free:nitro").model is free


def test_a_free_variant_that_is_gone_is_404_and_says_so() -> None:
    with pytest.raises(NoEndpointMatches) as refused:
        scene().router.resolve("acme/large:free")
    body = json.loads(envelope(refused.value))["error"]
    assert body["code"] == 404
    assert body["message"] == "No endpoints found for acme/large:free."
    assert body["availability"]["code"] == "free_variant_ended"


PARAMETERS = frozenset({"tools", "seed"})


@pytest.mark.parametrize(
    ("wishes", "given", "message", "code", "excluded_by"),
    [
        (
            {"only": ["nobody"]},
            {},
            "No allowed providers are available for the selected model.",
            "constraint_filtered",
            "allowed_providers",
        ),
        ({"ignore": ["north", "south", "west"]}, {}, "No allowed providers are available", "constraint_filtered", "allowed_providers"),
        (
            {"only": ["north"], "zdr": True},
            {},
            "No endpoints found matching your data policy (Zero data retention). Configure: https://llm.example/settings/privacy",
            "privacy_restricted",
            "data_policy:zdr",
        ),
        (
            {"only": ["north"]},
            {"rules": AccountRules(train_paid=False)},
            "No endpoints found matching your data policy (Paid model training). Configure: https://llm.example/settings/privacy",
            "privacy_restricted",
            "data_policy:training",
        ),
        (
            {"only": ["south"], "data_collection": "deny"},
            {},
            "No endpoints found matching your data policy",
            "privacy_restricted",
            "data_policy:training",
        ),
        ({"quantizations": ["int4"]}, {}, "No endpoints found with the requested quantizations.", "constraint_filtered", "quantization"),
        ({"max_price": {"prompt": 0.1}}, {}, "No endpoints found within provider.max_price.", "constraint_filtered", "max_price"),
        (
            {"require_parameters": True},
            {"needs": Needs(parameters=PARAMETERS)},
            "No endpoints found that can handle the requested parameters.",
            "constraint_filtered",
            "require_parameters",
        ),
        ({"enforce_distillable_text": True}, {}, "No endpoints found whose model may be distilled.", "constraint_filtered", None),
        (
            {"only": ["south"]},
            {"needs": Needs(parameters=frozenset({"tools"}))},
            "No endpoints found that support tool use.",
            "constraint_filtered",
            None,
        ),
        (
            {"only": ["west"]},
            {"needs": Needs(parameters=frozenset({"tools", "tool_choice"}), forces_tool=True)},
            "No endpoints found that support the provided 'tool_choice' value.",
            "constraint_filtered",
            None,
        ),
        (
            {},
            {"needs": Needs(modalities=frozenset({"audio"}))},
            "No endpoints found that support audio input.",
            "constraint_filtered",
            None,
        ),
        ({}, {"needs": Needs(prompt_tokens=9000)}, "No endpoints found with room for a prompt", "constraint_filtered", "context_length"),
        ({}, {"needs": Needs(max_tokens=9000)}, "No endpoints found that can make max_tokens 9000.", "constraint_filtered", None),
    ],
)
def test_an_empty_result_is_404_and_names_its_cause(
    wishes: dict[str, Any], given: dict[str, Any], message: str, code: str, excluded_by: str | None
) -> None:
    with pytest.raises(NoEndpointMatches) as refused:
        order(wishes, **given)
    body = json.loads(envelope(refused.value))["error"]
    assert body["code"] == 404
    assert body["message"].startswith(message)
    assert body["metadata"]["error_type"] == "not_found"
    availability = body["availability"]
    assert availability["code"] == code
    assert availability["retryable"] is False
    assert availability["requested_models"] == ["acme/large"]
    assert availability["docs_url"].startswith("https://llm.example/")
    assert availability.get("excluded_by") == ([excluded_by] if excluded_by else None)
    assert availability["affected_providers"]
    assert "" not in availability.values()


def two_models() -> Scene:
    return Scene(
        model_of([endpoint("north", 3.0), endpoint("south", 5.0)]),
        model_of([endpoint("west", 1.0, model="acme/small"), endpoint("north", 4.0, model="acme/small")]),
    )


def across(at: Scene, wishes: Wishes) -> list[str]:
    models = [at.router.resolve("acme/large"), at.router.resolve("acme/small")]
    return [pick.endpoint.id for pick in at.router.rank_as_wished(models, Wished(wishes), now_s=at.now_s, rng=at.random.random)]


def test_fallback_models_come_after_every_endpoint_of_the_first() -> None:
    found = across(two_models(), Wishes())
    assert {each.partition("@")[0] for each in found[:2]} == {"acme/large"}
    assert {each.partition("@")[0] for each in found[2:]} == {"acme/small"}


def test_without_partitions_all_models_are_sorted_together() -> None:
    expected = ["acme/small@west", "acme/large@north", "acme/small@north", "acme/large@south"]
    assert across(two_models(), Wishes(sort=Sort("price", "none"))) == expected
    assert across(two_models(), Wishes(sort=Sort(None, "none"))) == expected  # nothing but prices is known
    assert across(two_models(), routed(Wishes(sort="price"), "sort")) == expected
    assert across(two_models(), routed(Wishes(sort="price"), "fallback"))[0] == "acme/large@north"


def test_a_model_that_cannot_serve_is_passed_over_for_its_fallback() -> None:
    assert across(two_models(), Wishes(only=("west",))) == ["acme/small@west"]
    with pytest.raises(NoEndpointMatches, match="No allowed providers"):
        across(two_models(), Wishes(only=("nobody",)))


@pytest.mark.parametrize(
    ("wishes", "told"),
    [
        ({"order": "north"}, "provider.order: Expected `array | null`, got `str`"),
        ({"order": [1]}, "provider.order[0]: Expected `str`, got `int`"),
        ({"data_collection": "maybe"}, "provider.data_collection: not one of the allowed values"),
        ({"quantizations": ["fp7"]}, "provider.quantizations[0]: not one of the allowed values"),
        ({"sort": "speed"}, "provider.sort: not one of the allowed values"),
        ({"sort": {"by": "price", "partition": "both"}}, "provider.sort.partition: not one of the allowed values"),
        ({"allow_fallbacks": "no"}, "provider.allow_fallbacks: Expected `bool | null`, got `str`"),
        ({"max_price": {"prompt": "cheap"}}, "provider.max_price.prompt: an amount in USD, such as 0.5"),
        ({"max_price": {"prompt": "NaN"}}, "provider.max_price.prompt: an amount in USD, such as 0.5"),
        ({"max_price": {"prompt": -1}}, "provider.max_price.prompt: Expected"),
        ({"preferred_max_latency": {"p95": 1}}, "provider.preferred_max_latency: an unknown key"),
        ({"data_colection": "deny"}, "provider: an unknown key; known are order, only"),
        ([], "provider: Expected `object`, got `array`"),
    ],
)
def test_a_wish_that_is_not_understood_is_refused_by_name_and_not_echoed(wishes: Any, told: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read_wishes(json.dumps(wishes).encode())
    assert refused.value.message.startswith(told)
    for word in ("maybe", "fp7", "speed", "both", "cheap", "data_colection", "p95"):
        assert word not in refused.value.message


def test_wishes_have_the_contracts_types() -> None:
    wishes = read_wishes(b'{"preferred_min_throughput": {"p50": 100, "p90": 20.5}, "preferred_max_latency": 2, "sort": {"by": "latency"}}')
    assert wishes.preferred_min_throughput == Cutoffs(p50=100, p90=20.5)
    assert wishes.preferred_max_latency == 2
    assert wishes.sort_by == "latency"
    assert not wishes.across_models


def test_prices_per_request_and_image_are_limited_in_usd_a_piece() -> None:
    priced = Price(prompt=10**9, completion=10**9, request=5 * 10**12, image=2 * 10**12)  # 0.005 and 0.002 USD
    at = Scene(model_of([endpoint("north", price=priced), endpoint("south", 2.0)]))
    assert set(order({"max_price": {"request": 0.005, "image": 0.002}}, at=at)) == {"north", "south"}
    assert order({"max_price": {"request": 0.0049}}, at=at) == ["south"]
    assert order({"max_price": {"image": "0.0019"}}, at=at) == ["south"]
