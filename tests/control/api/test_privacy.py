"""`/privacy`, what an account allows; and `/models/user`, what that leaves of the catalog."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gateway.domain.keys import digest
from gateway.domain.rules import AccountRules
from tests.control.api.premises import Premises
from tests.control.test_models_api import MODEL_KEYS

PATH = "/api/v1/privacy"
DEFAULTS = {
    "enable_paid_model_training": False, "enable_free_model_training": False, "enable_free_model_publication": False,
    "enforce_zdr": False, "log_prompts": False, "allowed_providers": [], "ignored_providers": [],
}  # fmt: skip


async def change(premises: Premises, status: int = 200, **patch: Any) -> Any:
    return await premises.ask("PATCH", PATH, premises.ada_management, status, json=patch)


async def models(premises: Premises, secret: str, query: str = "") -> list[str]:
    body = await premises.ask("GET", f"/api/v1/models/user?output_modalities=all&{query}", secret)
    assert body["total_count"] == len(body["data"])
    return [row["id"] for row in body["data"]]


async def test_what_is_named_changes_and_the_rest_stays(premises: Premises) -> None:
    assert (await premises.ask("GET", PATH, premises.ada_management))["data"] == DEFAULTS
    expected: dict[str, Any] = DEFAULTS
    for patch in (
        {"enable_paid_model_training": True}, {"enable_free_model_training": True, "enforce_zdr": True, "log_prompts": True},
        {"ignored_providers": ["south"]},
        {"allowed_providers": ["north", "south"], "enable_free_model_publication": True}, {"enforce_zdr": False}, {},
        {"allowed_providers": [], "enable_paid_model_training": False},
    ):  # fmt: skip
        expected = {**expected, **patch}
        assert (await change(premises, **patch))["data"] == expected
        assert (await premises.ask("GET", PATH, premises.ada_management))["data"] == expected
    assert (await change(premises, ignored_providers=None))["data"]["ignored_providers"] == []
    assert (await premises.ask("GET", PATH, premises.eve_management))["data"] == DEFAULTS


async def test_every_key_of_the_account_is_told_to_the_edges_with_its_new_rules(premises: Premises) -> None:
    await change(premises, enforce_zdr=True, ignored_providers=["South", "south "])
    told = {name: record.rules for name, record in premises.changed if record is not None}
    rules = AccountRules(zdr=True, ignored=("south",))
    assert told == {digest(premises.ada): rules, digest(premises.ada_management): rules}
    await change(premises, log_prompts=True)
    told = {name: record.rules for name, record in premises.changed if record is not None}
    assert set(told.values()) == {msgspec.structs.replace(rules, log_prompts=True)}


async def test_a_signed_in_person_may_change_it_and_from_pages_of_this_site_alone(premises: Premises) -> None:
    browser = await premises.browser()
    changed = await browser.ask("PATCH", PATH, json={"enforce_zdr": True})
    assert changed["data"] == {**DEFAULTS, "enforce_zdr": True} == (await browser.ask("GET", PATH))["data"]
    await browser.ask("PATCH", PATH, 403, json={"enforce_zdr": False}, headers={"X-CSRF-Token": ""})
    await browser.ask("PATCH", PATH, 403, json={"enforce_zdr": False}, headers={"Origin": "https://evil.example"})
    await premises.ask("PATCH", PATH, premises.ada, 403, json={"enforce_zdr": False})
    assert (await browser.ask("GET", PATH))["data"]["enforce_zdr"] is True


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("allowed_providers", ["west"]),
        ("ignored_providers", ["south", "south/fp8"]),
        ("ignored_providers", [""]),
        ("allowed_providers", ["north"] * 201),
        ("allowed_providers", "north"),
        ("ignored_providers", [1]),
        ("enforce_zdr", "true"),
        ("enable_paid_model_training", None),
        ("train_paid", True),
    ],
)
async def test_a_wrong_value_is_refused_by_the_name_of_its_field_and_changes_nothing(premises: Premises, field: str, value: Any) -> None:
    refused = await change(premises, 400, **{"enable_free_model_publication": True, field: value})
    assert field in refused["error"]["message"]
    assert (await premises.ask("GET", PATH, premises.ada_management))["data"] == DEFAULTS
    assert premises.changed == []


async def test_the_models_of_an_account_are_those_that_its_rules_leave(premises: Premises) -> None:
    """north retains nothing and serves sage; south, of which nobody knows, serves sage, the free tiny, and vectors."""
    browser = await premises.browser()
    for patch, expected in (
        ({}, ["acme/sage-1"]),
        ({"enable_free_model_training": True}, ["acme/sage-1", "acme/tiny:free"]),
        ({"enable_paid_model_training": True}, ["acme/sage-1", "acme/tiny:free", "zeta/vectors"]),
        ({"ignored_providers": ["north"]}, ["acme/sage-1", "acme/tiny:free", "zeta/vectors"]),
        ({"allowed_providers": ["north"]}, []),
        ({"ignored_providers": []}, ["acme/sage-1"]),
        ({"allowed_providers": [], "enforce_zdr": True}, ["acme/sage-1"]),
    ):
        await change(premises, **patch)
        for secret in (premises.ada, premises.ada_management):
            assert await models(premises, secret) == expected, patch
        assert [row["id"] for row in (await browser.ask("GET", "/api/v1/models/user?output_modalities=all"))["data"]] == expected
        assert await models(premises, premises.eve) == ["acme/sage-1"]
    await premises.ask("GET", "/api/v1/models/user", None, 401)


async def test_a_model_shows_the_price_and_the_limits_of_the_endpoints_that_are_left(premises: Premises) -> None:
    await change(premises, enable_paid_model_training=True)
    assert await premises.ask("GET", "/api/v1/models/user?providers=north", premises.ada) == await premises.ask(
        "GET", "/api/v1/models?providers=north"
    )
    await change(premises, ignored_providers=["north"])
    (row,) = (await premises.ask("GET", "/api/v1/models/user?q=sage", premises.ada))["data"]
    assert row["pricing"]["prompt"] == "0.000003" and row["top_provider"]["max_completion_tokens"] is None
    assert row.keys() >= MODEL_KEYS
    assert await models(premises, premises.ada, "max_price=2.5&q=sage") == []
    assert await models(premises, premises.ada, "zdr=true") == await models(premises, premises.ada, "providers=north") == []
