"""What an account allows, through the API: told, changed, checked, and seen in the models that are left."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.domain.keys import digest
from tests.control.api.premises import Premises

PATH = "/api/v1/privacy"
NOTHING_SAID = {"train_paid": False, "train_free": False, "zdr": False, "allowed_providers": [], "ignored_providers": []}


async def models(premises: Premises, secret: str, query: str = "") -> list[str]:
    return [row["id"] for row in (await premises.ask("GET", f"/api/v1/models/user{query}", secret))["data"]]


async def test_what_is_changed_is_told_and_the_rest_stays(premises: Premises) -> None:
    ada = premises.ada_management
    assert (await premises.ask("GET", PATH, ada))["data"] == NOTHING_SAID
    changed = await premises.ask("PATCH", PATH, ada, json={"train_free": True, "ignored_providers": ["South", "south"]})
    assert changed["data"] == {**NOTHING_SAID, "train_free": True, "ignored_providers": ["south"]}
    changed = await premises.ask("PATCH", PATH, ada, json={"zdr": True, "ignored_providers": []})
    assert changed["data"] == {**NOTHING_SAID, "train_free": True, "zdr": True}
    assert await premises.ask("GET", PATH, ada) == changed
    assert (await premises.ask("GET", PATH, premises.eve_management))["data"] == NOTHING_SAID


async def test_every_key_of_the_account_is_told_to_the_edges(premises: Premises) -> None:
    await premises.ask("PATCH", PATH, premises.ada_management, json={"zdr": True})
    told = dict(premises.changed)
    assert {digest(premises.ada), digest(premises.ada_management)} <= told.keys()
    assert all(record is not None and record.rules.zdr and record.account_id == "user_ada" for record in told.values())


async def test_aut_04_an_inference_key_changes_nothing(premises: Premises) -> None:
    for method, sent in (("GET", None), ("PATCH", {"train_paid": True})):
        await premises.ask(method, PATH, premises.ada, 403, json=sent)
        await premises.ask(method, PATH, None, 401, json=sent)
    assert (await premises.ask("GET", PATH, premises.ada_management))["data"] == NOTHING_SAID


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"ignored_providers": ["south", "soth"]}, "ignored_providers[1]"), ({"allowed_providers": [""]}, "allowed_providers"),
        ({"allowed_providers": "south"}, "allowed_providers"), ({"allowed_providers": ["x"] * 201}, "allowed_providers"),
        ({"train_paid": 1}, "train_paid"), ({"zdr": None}, "zdr"), ({"account_id": "user_eve"}, "account_id"), ([], ""),
    ],
)  # fmt: skip
async def test_aut_05_what_is_no_rule_is_refused_by_name(premises: Premises, body: Any, named: str) -> None:
    refused = await premises.ask("PATCH", PATH, premises.ada_management, 400, json=body)
    assert named in refused["error"]["message"]
    assert (await premises.ask("GET", PATH, premises.ada_management))["data"] == NOTHING_SAID


async def test_models_of_an_account_are_those_that_its_rules_leave(premises: Premises) -> None:
    """South has not said what it does with prompts; north retains nothing."""
    everything = [row["id"] for row in (await premises.ask("GET", "/api/v1/models"))["data"]]
    for secret in (premises.ada, premises.ada_management):
        assert await models(premises, secret) == ["acme/sage-1"]
    await premises.ask("PATCH", PATH, premises.ada_management, json={"train_free": True})
    assert await models(premises, premises.ada) == everything
    assert await models(premises, premises.ada, "?q=tiny") == ["acme/tiny:free"]
    await premises.ask("PATCH", PATH, premises.ada_management, json={"zdr": True})
    assert await models(premises, premises.ada) == ["acme/sage-1"]
    await premises.ask("PATCH", PATH, premises.ada_management, json={"ignored_providers": ["north"]})
    assert await models(premises, premises.ada) == []
    assert await models(premises, premises.eve) == ["acme/sage-1"]
    await premises.ask("GET", "/api/v1/models/user", None, 401)
