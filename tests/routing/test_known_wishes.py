"""What is kept of wishes that callers repeat: never a decision that no longer holds, and never more than some MB of it."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from gateway.domain.catalog import DataPolicy
from gateway.domain.errors import NoEndpointMatches, Throttled
from gateway.domain.rules import AccountRules
from gateway.routing.filters import Needs
from gateway.routing.known_wishes import KEPT_MAX, KNOWN_BYTES_MAX, KNOWN_MAX, KnownWishes
from tests.routing.market import ALL, MODEL, order, scene
from tests.routing.scene import Scene, endpoint, model_of

TRIO = model_of([endpoint("a", 1.0), endpoint("b", 2.0), endpoint("c", 3.0)])
KEPT: list[dict[str, Any]] = [
    {"sort": "price"},
    {"sort": "latency"},
    {"sort": {"by": "throughput", "partition": "model"}},
    {"sort": {"by": "price", "partition": "none"}},
    {"order": ["c", "b"]},
    {"only": ["a", "c"]},
    {"ignore": ["b"]},
    {"preferred_max_latency": 0.5},
]


def twice(at: Scene, wishes: dict[str, Any], **given: Any) -> list[str]:
    """Asked again, so that whatever is kept of it is what answers."""
    order(wishes, at=at, **given)
    return order(wishes, at=at, **given)


def test_a_new_catalog_decides_at_once() -> None:
    at = Scene(TRIO)
    assert twice(at, {"sort": "price"}) == ["a", "b", "c"]
    assert set(twice(at, {"max_price": {"prompt": 2}})) == {"a", "b"}
    assert set(twice(at, {"data_collection": "allow"})) == {"a", "b", "c"}
    at.data = {"b": DataPolicy(trains=False, retains=False, zdr=True)}
    at.show(model_of([endpoint("a", 5.0), endpoint("b", 2.0), endpoint("c", 1.0)]))
    assert order({"sort": "price"}, at=at) == ["c", "b", "a"]
    assert set(order({"max_price": {"prompt": 2}}, at=at)) == {"b", "c"}
    assert order({"data_collection": "deny"}, at=at) == ["b"]
    at.show(model_of([endpoint("a", 5.0), endpoint("c", 1.0)]))
    assert order({"sort": "price"}, at=at) == ["c", "a"]
    assert order({"order": ["a"]}, at=at) == ["a", "c"]
    with pytest.raises(NoEndpointMatches):
        order({"data_collection": "deny"}, at=at)


def test_rules_of_an_account_that_change_decide_at_once() -> None:
    at = scene()
    for wishes in ({"sort": "price"}, {"order": ["west"]}, {"ignore": ["south/eu"]}):
        assert set(twice(at, wishes)) == ALL - set(wishes.get("ignore", ()))
        assert "north" not in order(wishes, at=at, rules=AccountRules(train_free=True))  # it trains
        assert order(wishes, at=at, rules=AccountRules(train_paid=True, ignored=("south",), allowed=("south", "west"))) == ["west"]
        assert set(order(wishes, at=at, rules=AccountRules(train_paid=True, train_free=True))) == set(twice(at, wishes))
        with pytest.raises(NoEndpointMatches):
            order(wishes, at=at, rules=AccountRules(train_paid=True, allowed=("east",)))


@pytest.mark.parametrize("wishes", KEPT, ids=json.dumps)
def test_an_endpoint_that_breaks_is_out_of_the_next_decision_and_back_after_its_probe(wishes: dict[str, Any]) -> None:
    at = Scene(TRIO)
    whole = twice(at, wishes)
    for _ in range(5):
        assert set(order(wishes, at=at)) == set(whole)
        at.fail("a")
    assert set(twice(at, wishes)) == set(whole) - {"a"}
    at.now_s += 6.0  # ejected for five seconds: then one request may find out
    assert any("a" in order(wishes, at=at) for _ in range(50))
    at.call("a")
    assert set(twice(at, wishes)) == set(whole)


@pytest.mark.parametrize("wishes", KEPT, ids=json.dumps)
def test_an_endpoint_that_says_when_to_come_back_is_left_alone_until_then(wishes: dict[str, Any]) -> None:
    at = Scene(TRIO)
    whole = twice(at, wishes)
    for tag in whole:
        at.throttle(tag, retry_after_s=3.0)
        at.now_s += 0.001
    with pytest.raises(Throttled):
        order(wishes, at=at)
    at.now_s += 3.1
    assert set(twice(at, wishes)) == set(whole)


def test_figures_that_change_sort_anew_as_soon_as_traffic_is_shared_out_anew() -> None:
    at = Scene(TRIO)
    at.warm({"a": 0.2, "b": 0.3, "c": 0.4})
    assert twice(at, {"sort": "latency"}) == ["a", "b", "c"]
    for _ in range(30):
        at.call("a", 2.0)
        at.now_s += 0.02
    assert order({"sort": "latency"}, at=at) == ["b", "c", "a"]


def test_an_endpoint_that_gets_too_slow_for_a_wish_goes_to_the_end() -> None:
    at, wishes = Scene(TRIO), {"preferred_max_latency": 0.5}
    at.warm({"a": 0.2, "b": 0.3, "c": 0.4})
    assert any(twice(at, wishes)[-1] != "a" for _ in range(20))
    for _ in range(60):
        at.call("a", 0.9)
    at.now_s += 6.0  # percentiles are worked out every five seconds
    assert all(twice(at, wishes)[-1] == "a" for _ in range(20))
    assert twice(at, {**wishes, "sort": "price"}) == ["b", "c", "a"]


def test_what_a_request_needs_is_looked_at_each_time() -> None:
    at = scene()
    wishes = {"require_parameters": True}
    assert set(twice(at, wishes, needs=Needs(parameters=frozenset({"seed"})))) == {"south", "south/eu"}
    assert set(order(wishes, at=at, needs=Needs(parameters=frozenset({"tools"})))) == {"north", "west"}
    assert set(order(wishes, at=at, needs=Needs(prompt_tokens=3000))) == ALL - {"south"}
    assert set(order({"only": ["south", "north"]}, at=at, needs=Needs(max_tokens=5000))) == {"south/eu"}
    assert set(order({"only": ["south", "north"]}, at=at)) == {"north", "south", "south/eu"}


def test_a_variant_has_its_own_tiers_whatever_was_asked_before() -> None:
    at = scene()
    assert set(twice(at, {})) == ALL
    assert set(order({}, "acme/large:nitro", at=at)) == ALL | {"west/priority"}
    assert order({}, "acme/large:floor", at=at) == ["north", "south", "south/eu", "west"]
    assert set(order({}, at=at)) == ALL


def test_what_is_kept_decides_as_if_nothing_were() -> None:
    """Whatever happens between decisions: the same order as a router has that has forgotten all it kept."""
    rng, at = random.Random(11), Scene(TRIO)
    asked = [wishes for wishes in KEPT if {"sort", "order"} & wishes.keys()]
    compared = 0
    for _ in range(3000):
        step, tag = rng.random(), rng.choice("abc")
        if step < 0.45:
            at.call(tag, rng.choice((0.2, 0.5, 1.5)))
        elif step < 0.6:
            at.fail(tag)
        elif step < 0.63:
            at.throttle(tag, rng.choice((None, 0.5)))
        elif step < 0.64:
            at.show(model_of([endpoint(each, rng.choice((1.0, 2.0, 3.0))) for each in "abc"]))
        at.now_s += rng.choice((0.001, 0.1, 1.0))
        wishes = rng.choice(asked)
        try:
            kept = order(wishes, at=at)
        except Throttled:
            kept = []
        known = at.router.wishes
        at.router.wishes = _Forgetful()
        try:
            found = order(wishes, at=at)
        except Throttled:
            found = []
        at.router.wishes = known
        assert kept == found
        compared += len(found) > 1
    assert compared > 1000


class _Forgetful(KnownWishes):
    """Nothing is kept for what it finds."""

    def find(self, raw: Any, route: str | None = None) -> Any:
        found = super().find(raw, route)
        found.number = 0
        return found


def test_no_variety_of_wishes_takes_more_than_its_place() -> None:
    at = Scene(TRIO, model_of([endpoint("a", 1.0, model="acme/small")]))
    for number in range(2 * KEPT_MAX):
        kind = number % 3
        wishes = (
            {"ignore": [f"x{number}"]} if kind == 0 else {"order": [f"x{number}"]} if kind == 1 else {"preferred_max_latency": number + 1}
        )
        order(wishes, at=at, rules=AccountRules(train_paid=True, ignored=(f"y{number}",)))
    router = at.router
    assert len(router.wishes) == KNOWN_MAX
    assert KNOWN_MAX < len(router._masks) <= KEPT_MAX and KNOWN_MAX < len(router._arrangements) <= 2 * KEPT_MAX
    before = len(router._masks), len(router._arrangements)
    for number in range(100):
        long = {"ignore": [f"{'x' * 100}{number}.{each}" for each in range(KNOWN_BYTES_MAX // 100)]}
        assert len(order({**long, "sort": "price"}, at=at)) == 3
    assert len(router.wishes) == KNOWN_MAX and (len(router._masks), len(router._arrangements)) == before
    at.show(TRIO, MODEL)
    assert not len(router._masks) and not len(router._arrangements)
