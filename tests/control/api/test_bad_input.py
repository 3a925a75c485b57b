"""INP-05, AUT-02: what bodies and queries of the API mean is one thing, and a refusal names the field and repeats nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.control.api.application import BODY_BYTES_MAX
from tests.control.api.premises import PASSWORD, Premises

KEYS = "/api/v1/keys"
PRIVACY = "/api/v1/privacy"
JSON = {"Content-Type": "application/json"}
SECRET = "sk-or-v1-" + "5" * 64


async def refused(premises: Premises, method: str, path: str, body: str | bytes | None = None) -> str:
    """The message of a 400."""
    answer = await premises.ask(method, path, premises.ada_management, 400, data=body, headers=JSON if body is not None else None)
    message: str = answer["error"]["message"]
    assert len(message) < 200
    return message


@pytest.mark.parametrize(
    "body",
    [
        '{"name":"x","limit":1,"limit":null}',
        '{"name":"x","limit":1,"limit":1}',
        '{"name":"x","lim\\u0069t":1,"limit":100}',
        '{ "name" : "x" , "limit" : 1 , "limit" : 100 }',
        '{"name":"x","z":1,"z":2}',
        '{"name":"x","":1,"":2}',
    ],
)
async def test_a_repeated_key_is_refused_and_nothing_is_made(premises: Premises, body: str) -> None:
    assert json.loads(body)["name"] == "x"
    before = await premises.ask("GET", KEYS, premises.ada_management)
    assert await refused(premises, "POST", KEYS, body) == "the body repeats a key"
    assert await premises.ask("GET", KEYS, premises.ada_management) == before


async def test_a_privacy_rule_that_is_said_twice_changes_nothing(premises: Premises) -> None:
    assert await refused(premises, "PATCH", PRIVACY, '{"enforce_zdr":true,"enforce_zdr":false}') == "the body repeats a key"
    body = f'{{"email":"ada@example.com","password":"wrong","password":"{PASSWORD}"}}'
    answer = await premises.ask("POST", "/api/v1/session", None, 400, data=body, headers=JSON)
    assert answer["error"]["message"] == "the body repeats a key"
    assert not premises.changed


async def test_a_body_of_very_many_keys_is_refused(premises: Premises) -> None:
    body = json.dumps({"name": "x", **dict.fromkeys(map(str, range(20_000)), 1)})
    assert len(body) < BODY_BYTES_MAX
    assert await refused(premises, "POST", KEYS, body) == "the body has more than 1024 keys"


async def test_what_is_repeated_deeper_or_within_a_text_is_no_repeat(premises: Premises) -> None:
    for body in (
        '{"name":"a \\"name\\": b","z":{"a":1,"a":2}}',
        '\n{ "name" :\t"x" , "limit" : 5.50 }\r\n',
        '{"name":"x","z":[[{"name":1}]]}',
    ):
        await premises.ask("POST", KEYS, premises.ada_management, 201, data=body, headers=JSON)


@pytest.mark.parametrize(
    ("path", "query", "name"),
    [
        ("keys", "offset=0&offset=1", "offset"),
        ("keys", "include_disabled=true&include_disabled=false", "include_disabled"),
        ("activity", "date=2026-11-24&date=2026-11-23", "date"),
        ("models", "supported_parameters=tools&supported_parameters=seed", "supported_parameters"),
        ("models", "max_price=1&max%5Fprice=1", "max_price"),
    ],
)
async def test_a_parameter_that_is_given_twice_is_refused(premises: Premises, path: str, query: str, name: str) -> None:
    assert await refused(premises, "GET", f"/api/v1/{path}?{query}") == f"{name}: is given more than once"


async def test_unknown_parameters_are_ignored_however_often_they_come(premises: Premises) -> None:
    await premises.ask("GET", f"{KEYS}?x=1&x=2&offset=0", premises.ada_management)


@pytest.mark.parametrize(
    ("method", "path", "name", "words"),
    [
        ("POST", KEYS, "limit_reset", "daily, weekly, monthly"),
        ("POST", "/api/v1/auth/keys/code", "code_challenge_method", "S256, plain"),
        ("POST", "/api/v1/auth/keys/code", "usage_limit_type", "daily, weekly, monthly"),
    ],
)
async def test_a_word_that_is_none_of_those_is_not_repeated_and_those_are_named(
    premises: Premises, method: str, path: str, name: str, words: str
) -> None:
    for value in (SECRET, "x" * 10_000, "a` - at `$.name`", "Daily", ""):
        message = await refused(premises, method, path, json.dumps({"name": "x", name: value}))
        assert message.startswith(f"{name}: must be one of ")
        assert set(message.partition("one of ")[2].split(", ")) == set(words.split(", "))


async def test_words_of_a_query_are_told_the_same_way(premises: Premises) -> None:
    assert await refused(premises, "GET", f"/api/v1/activity?format={SECRET}") == "format: must be one of csv, json"
    assert await refused(premises, "GET", "/api/v1/models?region=mars") == "region: must be one of eu, us"
    assert (await refused(premises, "GET", f"{KEYS}?include_disabled=1")).startswith("include_disabled: must be one of ")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("enforce_zrd", "the body has a field enforce_zrd that is not known"),
        (SECRET, "the body has a field that is not known"),
        ("<script>", "the body has a field that is not known"),
        ("k" * 5000, "the body has a field that is not known"),
        ("", "the body has a field that is not known"),
        ("a - at `$.b`", None),
    ],
)
async def test_a_field_that_nobody_knows_is_named_where_it_has_the_form_of_one(premises: Premises, name: str, told: str | None) -> None:
    message = await refused(premises, "PATCH", PRIVACY, json.dumps({name: True}))
    assert told is None or message == told
    assert "has a field" in message and SECRET not in message


@pytest.mark.parametrize("method", ["POST", "PATCH"])
async def test_a_body_longer_than_any_of_ours_is_413(premises: Premises, method: str) -> None:
    path: dict[str, Any] = {"POST": KEYS, "PATCH": PRIVACY}
    body = json.dumps({"name": "x", "z": "x" * BODY_BYTES_MAX})
    answer = await premises.ask(method, path[method], premises.ada_management, 413, data=body, headers=JSON)
    assert answer["error"]["code"] == 413
