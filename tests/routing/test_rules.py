"""What a request needs, and what its account allows, hold whatever else is wished."""

from __future__ import annotations

import pytest

from gateway.domain.errors import NoEndpointMatches
from gateway.domain.rules import AccountRules
from gateway.routing.filters import Needs
from tests.routing.market import ALL, DATA, FORGETS, TRAINING, order, scene
from tests.routing.scene import Scene, endpoint, model_of


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        (Needs(parameters=frozenset({"tools"})), {"north", "west"}),
        (Needs(parameters=frozenset({"tools", "tool_choice"})), {"north", "west"}),
        (Needs(parameters=frozenset({"tools", "tool_choice"}), forces_tool=True), {"north"}),
        (Needs(parameters=frozenset({"response_format"})), {"south"}),
        (Needs(parameters=frozenset({"verbosity"})), ALL),  # nobody has it: dropped, not refused
        (Needs(parameters=frozenset({"temperature", "seed"})), ALL),  # sampling parameters are never a reason
        (Needs(prompt_tokens=3000), ALL - {"south"}),
        (Needs(max_tokens=5000), ALL - {"north", "south"}),
        (Needs(max_tokens=2048), ALL),
        (Needs(modalities=frozenset({"image"})), ALL),
    ],
)
def test_what_a_request_needs_filters_with_wishes_and_without(needs: Needs, expected: set[str]) -> None:
    at = scene()
    assert set(at.rank(needs=needs)) == expected
    assert set(order({}, at=at, needs=needs)) == expected


def test_required_parameters_are_all_of_those_sent() -> None:
    assert set(order({"require_parameters": True}, needs=Needs(parameters=frozenset({"seed", "max_tokens"})))) == {"south", "south/eu"}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (TRAINING, ALL),
        (AccountRules(), ALL - {"north"}),  # training is off unless it was switched on
        (AccountRules(train_free=True), ALL - {"north"}),
        (AccountRules(train_paid=True), ALL),
        (AccountRules(zdr=True), {"west"}),
        (AccountRules(allowed=("south", "west")), ALL - {"north"}),
        (AccountRules(ignored=("south",), train_paid=True), {"north", "west"}),
        (AccountRules(allowed=("south", "west"), ignored=("west",)), {"south", "south/eu"}),
    ],
)
def test_account_rules_hold_for_every_request(rules: AccountRules, expected: set[str]) -> None:
    at = scene()
    assert set(at.rank(rules=rules)) == expected
    assert set(order({}, at=at, rules=rules)) == expected


def test_a_request_can_tighten_an_accounts_rules_and_never_relax_them() -> None:
    rules = AccountRules(zdr=True, allowed=("west", "south"))
    assert order({"zdr": False, "data_collection": "allow"}, rules=rules) == ["west"]
    with pytest.raises(NoEndpointMatches):
        order({"only": ["north"]}, rules=rules)


def test_a_provider_that_says_nothing_is_taken_to_train_and_retain() -> None:
    at = Scene(model_of([endpoint("silent"), endpoint("west")]), data={"silent": None, "west": FORGETS})
    assert at.rank() == ["west"]


def test_free_endpoints_that_train_have_a_toggle_of_their_own() -> None:
    at = Scene(model_of([endpoint("north", 0.0)]), data=DATA)
    assert at.rank(rules=AccountRules(train_free=True)) == ["north"]
    with pytest.raises(NoEndpointMatches, match=r"\(Free model training\)"):
        at.rank(rules=AccountRules(train_paid=True))


def test_endpoints_that_declare_no_parameters_are_not_refused() -> None:
    at = Scene(model_of([endpoint("local")]))
    assert at.rank(needs=Needs(parameters=frozenset({"tools", "tool_choice"}), forces_tool=True)) == ["local"]
