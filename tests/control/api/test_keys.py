"""Keys through the API: made, listed, read, changed, revoked, and every field held to its type and range."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openrouter import operations

from gateway.control.api.keys import CREATIONS_PER_MINUTE, KEYS_MAX
from gateway.control.api.workspace import workspace_of
from gateway.domain.keys import digest, label
from gateway.domain.money import NANOS_PER_USD
from tests.control.api.premises import DAY, NOW, Premises, spent

KEYS = "/api/v1/keys"
WORKSPACE = workspace_of("user_ada")


async def create(premises: Premises, status: int = 201, headers: dict[str, str] | None = None, **body: Any) -> Any:
    return await premises.ask("POST", KEYS, premises.ada_management, status, json={"name": "ci", **body}, headers=headers)


async def test_a_key_is_made_with_every_field_of_the_contract_and_told_to_edges(premises: Premises) -> None:
    body = await create(
        premises, limit=25.5, limit_reset="monthly", include_byok_in_limit=True, expires_at="2027-01-31T00:00:00Z", workspace_id=WORKSPACE
    )
    operations.CreateKeysResponse.model_validate(body)
    secret = body["key"]
    assert re.fullmatch("sk-or-v1-[0-9a-f]{64}", secret)
    assert body["data"] == {
        "hash": digest(secret), "name": "ci", "label": label(secret), "disabled": False, "limit": 25.5, "limit_remaining": 25.5,
        "limit_reset": "monthly", "include_byok_in_limit": True, "usage": 0.0, "usage_daily": 0.0, "usage_weekly": 0.0,
        "usage_monthly": 0.0, "byok_usage": 0, "byok_usage_daily": 0, "byok_usage_weekly": 0, "byok_usage_monthly": 0,
        "created_at": "2026-11-25T12:00:00.000Z", "updated_at": None, "expires_at": "2027-01-31T00:00:00.000Z", "last_used_at": None,
        "creator_user_id": "user_ada", "external_user": None, "workspace_id": WORKSPACE,
    }  # fmt: skip
    [(changed, record)] = premises.changed
    assert record is not None and (changed, record.limit_nanos) == (digest(secret), int(25.5 * NANOS_PER_USD))
    assert (await premises.ask("GET", "/api/v1/key", secret))["data"]["limit_reset"] == "monthly"
    assert (await premises.ask("GET", f"{KEYS}/{digest(secret)}", premises.ada_management))["data"] == body["data"]


@pytest.mark.parametrize(
    ("usd", "nanos"),
    [
        ("0", 0),
        ("0.1", 100_000_000),
        ("0.30000000000000004", 300_000_000),
        ("1e-9", 1),
        ("1E2", 10**11),
        ("0.0000000019", 1),
        ("null", None),
    ],
)
async def test_a_limit_is_exact_and_no_float(premises: Premises, usd: str, nanos: int | None) -> None:
    body = await premises.ask("POST", KEYS, premises.ada_management, 201, data=f'{{"name": "x", "limit": {usd}}}')
    key = await premises.store.find_key(body["data"]["hash"])
    assert key is not None and key.limit_nanos == nanos


BAD_VALUES: dict[str, list[Any]] = {
    "name": [None, 5, "", " ", "x" * 201, "a\nb", "a\u0000", ["x"], {}],
    "limit": [-1, -1e-9, 1e300, 5e9, True, "much", "NaN", "Infinity", "-5", [], {}],
    "limit_reset": ["hourly", "", 1, True, ["daily"]],
    "include_byok_in_limit": [None, "true", 1, []],
    "expires_at": [
        "2026-11-25T12:00:00Z", "2020-01-01T00:00:00Z", "2027-01-01", "2027-01-01T00:00:00", "2027-01-01T00:00:00+02:00", "soon",
        1_795_000_000, True,
    ],
    "creator_user_id": ["user_eve", "user_nobody", 5],
    "workspace_id": [None, 5],
}  # fmt: skip
BAD = [(field, value) for field, values in BAD_VALUES.items() for value in values]
PATCHED = ("name", "limit", "limit_reset", "include_byok_in_limit")


@pytest.mark.parametrize(("field", "value"), BAD)
async def test_every_bad_field_is_refused_by_name(premises: Premises, field: str, value: Any) -> None:
    message = (await create(premises, 400, **{field: value}))["error"]["message"]
    assert message.startswith(f"{field}: "), message
    assert not premises.changed and len(await premises.store.list_keys("user_ada")) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [*((field, value) for field, value in BAD if field in PATCHED), ("disabled", None), ("disabled", "yes"), ("disabled", 1)],
)
async def test_every_bad_change_is_refused_by_name(premises: Premises, field: str, value: Any) -> None:
    body = await premises.ask("PATCH", f"{KEYS}/{digest(premises.ada)}", premises.ada_management, 400, json={field: value})
    assert body["error"]["message"].startswith(f"{field}: ")
    assert not premises.changed


async def test_a_missing_name_and_a_body_that_is_none_are_told(premises: Premises) -> None:
    assert (await premises.ask("POST", KEYS, premises.ada_management, 400, json={}))["error"]["message"] == "name: is required"
    for data in (b"", b"{", b"\xff", b"[" * 5000, b"null", b'"x"', b"[]"):
        await premises.ask("POST", KEYS, premises.ada_management, 400, data=data)


async def test_a_foreign_workspace_is_like_an_absent_one(premises: Premises) -> None:
    for workspace in (workspace_of("user_eve"), "7d0f4a8e-9a55-4a63-8a37-0b8d8b8c1c11", "x"):
        await create(premises, 404, workspace_id=workspace)
        await premises.ask("GET", f"{KEYS}?workspace_id={workspace}", premises.ada_management, 404)
        await premises.ask("PATCH", f"{KEYS}/{digest(premises.ada)}", premises.ada_management, 404, json={"workspace_id": workspace})
    assert len((await premises.ask("GET", f"{KEYS}?workspace_id={WORKSPACE}", premises.ada_management))["data"]) == 1


async def test_AUT_05_what_is_not_a_callers_to_set_is_never_set(premises: Premises, tmp_path: Path) -> None:
    foreign: dict[str, Any] = {
        "hash": "0" * 64, "digest": "0" * 64, "key": "sk-or-v1-mine", "account_id": "user_eve", "owner": "user_eve", "management": True,
        "is_management_key": True, "is_provisioning_key": True, "usage": -100, "balance": 10**9,
        "created_at": "2000-01-01", "created_at_ms": 5, "label": "x", "limit_nanos": 5, "expires_at_s": 5, "updated_at": None,
    }  # fmt: skip
    made = await create(premises, **foreign)
    key = await premises.store.find_key(made["data"]["hash"])
    assert key is not None and (key.account_id, key.management, key.limit_nanos, key.expires_at_s) == ("user_ada", False, None, None)
    assert made["key"] != "sk-or-v1-mine" and key.label == label(made["key"])
    before = await premises.store.find_key(digest(premises.ada))
    patch = foreign | {"expires_at": "2030-01-01T00:00:00Z"}
    refused = await premises.ask("PATCH", f"{KEYS}/{digest(premises.ada)}", premises.ada_management, 400, json=patch)
    assert refused["error"]["message"] == "No update fields provided"
    await premises.ask("PATCH", f"{KEYS}/{digest(premises.ada)}", premises.ada_management, json={"disabled": False, **patch})
    after = await premises.store.find_key(digest(premises.ada))
    assert before is not None and after is not None and after.updated_at_ms == int(NOW.timestamp() * 1000)
    assert (before.digest, before.account_id, before.expires_at_s) == (after.digest, after.account_id, after.expires_at_s)


async def test_lists_are_newest_first_100_a_page_and_leave_out_disabled_and_management_keys(premises: Premises) -> None:
    for number in range(130):
        key = premises.stored(f"secret {number}", "user_ada", f"key {number}", disabled=number % 10 == 0)
        await premises.store.create_key(msgspec.structs.replace(key, created_at_ms=10 + number))
    body = await premises.ask("GET", KEYS, premises.ada_management)
    operations.ListResponse.model_validate(body)
    names = [row["name"] for row in body["data"]]
    assert names == [f"key {number}" for number in range(129, -1, -1) if number % 10][:100]
    second = (await premises.ask("GET", f"{KEYS}?offset=100", premises.ada_management))["data"]
    assert [row["name"] for row in second][-1] == "inference" and len(second) == 18
    everything = (await premises.ask("GET", f"{KEYS}?include_disabled=true&offset=100", premises.ada_management))["data"]
    assert len(everything) == 31 and not {"management"} & {row["name"] for row in everything}
    for query in ("offset=-1", "offset=x", "include_disabled=yes", "offset=1.5"):
        message = (await premises.ask("GET", f"{KEYS}?{query}", premises.ada_management, 400))["error"]["message"]
        assert message.startswith(query.partition("=")[0] + ": ")


async def test_expired_keys_are_listed_when_asked_for(premises: Premises) -> None:
    await premises.store.create_key(premises.stored("old", "user_ada", "old", expires_at_s=int(NOW.timestamp())))
    await premises.store.create_key(premises.stored("new", "user_ada", "new", expires_at_s=int(NOW.timestamp()) + 1))
    for query, names in (("", {"inference", "new"}), ("?include_expired=true", {"inference", "new", "old"})):
        assert {row["name"] for row in (await premises.ask("GET", KEYS + query, premises.ada_management))["data"]} == names


async def test_usage_is_per_key_and_window_and_equals_what_the_key_says_itself(premises: Premises) -> None:
    second = (await create(premises))["key"]
    await premises.journal(
        *(spent(premises.ada, days, NOW - days * DAY, 0.1) for days in (0, 2, 3, 30)),  # Monday is two days ago
        spent(second, 99, NOW, 0.25),
    )
    rows = {row["hash"]: row for row in (await premises.ask("GET", KEYS, premises.ada_management))["data"]}
    first = rows[digest(premises.ada)]
    assert [first[f"usage{window}"] for window in ("", "_daily", "_weekly", "_monthly")] == [0.4, 0.1, 0.2, 0.3]
    assert first["last_used_at"] == "2026-11-25T00:00:00.000Z"
    made_today = rows[digest(second)]
    assert made_today["usage"] == 0.25
    assert made_today["last_used_at"] == made_today["created_at"]  # not at a midnight before it was there
    own = (await premises.ask("GET", "/api/v1/key", premises.ada))["data"]
    shared = first.keys() & own.keys()
    assert len(shared) > 10 and {name: own[name] for name in shared} == {name: first[name] for name in shared}


async def test_a_change_reaches_the_store_the_answer_and_the_edges(premises: Premises) -> None:
    path = f"{KEYS}/{digest(premises.ada)}"
    body = await premises.ask("PATCH", path, premises.ada_management, json={"name": "new", "limit": 3, "limit_reset": "daily"})
    operations.UpdateKeysResponse.model_validate(body)
    assert (body["data"]["name"], body["data"]["limit"], body["data"]["updated_at"]) == ("new", 3.0, "2026-11-25T12:00:00.000Z")
    # Edges may hold some of the limit under its old window's name and under the new one.
    assert premises.limits_changed == [f"key:{digest(premises.ada)}:2026-11-25", f"key:{digest(premises.ada)}:"]
    kept = (await premises.ask("PATCH", path, premises.ada_management, json={"workspace_id": WORKSPACE}))["data"]
    assert (kept["name"], kept["limit"], kept["limit_reset"]) == ("new", 3.0, "daily")
    freed = (await premises.ask("PATCH", path, premises.ada_management, json={"limit": None, "limit_reset": None}))["data"]
    assert (freed["limit"], freed["limit_remaining"], freed["limit_reset"]) == (None, None, None)
    await premises.ask("PATCH", path, premises.ada_management, json={"disabled": True})
    record = premises.changed[-1][1]
    assert record is not None and record.disabled
    await premises.ask("GET", "/api/v1/key", premises.ada, 401)


async def test_a_revoked_key_is_gone_everywhere_and_its_spending_stays(premises: Premises) -> None:
    await premises.journal(spent(premises.ada, 1))
    path = f"{KEYS}/{digest(premises.ada)}"
    body = await premises.ask("DELETE", path, premises.ada_management)
    assert body == {"deleted": True}
    operations.DeleteKeysResponse.model_validate(body)
    assert premises.changed == [(digest(premises.ada), None)]
    for method in ("GET", "DELETE"):
        await premises.ask(method, path, premises.ada_management, 404)
    assert (await premises.ask("GET", "/api/v1/key", premises.ada, 401))["error"]["message"] == "User not found."
    assert (await premises.ask("GET", "/api/v1/credits", premises.ada_management))["data"]["total_usage"] == 0.5


async def test_WEB_06_a_secret_is_in_one_answer_only(premises: Premises, tmp_path: Path) -> None:
    body = await create(premises)
    secret = body["key"]
    assert str(body).count(secret) == 1 and secret not in str(body["data"])
    path = f"{KEYS}/{body['data']['hash']}"
    others = [
        await premises.ask("GET", KEYS, premises.ada_management),
        await premises.ask("GET", path, premises.ada_management),
        await premises.ask("PATCH", path, premises.ada_management, json={"name": "z"}),
        await premises.ask("GET", "/api/v1/key", secret),
    ]
    assert all(secret not in str(other) for other in others)
    # AUT-01: nor is it anywhere in the store.
    files = b"".join(file.read_bytes() for file in tmp_path.glob("gateway.db*"))
    assert secret.encode() not in files and secret.removeprefix("sk-or-v1-").encode() not in files
    assert digest(secret).encode() in files


async def test_a_repeated_creation_makes_one_key_and_tells_the_same(premises: Premises, tmp_path: Path) -> None:
    once = {"Idempotency-Key": "deploy-77"}
    answers = await asyncio.gather(*(create(premises, headers=once, limit=5) for _ in range(5)))
    assert all(one == answers[0] for one in answers)
    assert len(await premises.store.list_keys("user_ada")) == 3
    await premises.ask("GET", "/api/v1/key", answers[0]["key"])
    files = b"".join(file.read_bytes() for file in tmp_path.glob("gateway.db*"))
    assert answers[0]["key"].removeprefix("sk-or-v1-").encode() not in files
    # Another body, another asker, another name: not the same creation.
    assert "Idempotency-Key" in (await create(premises, 409, headers=once, limit=6))["error"]["message"]
    eve = await premises.ask("POST", KEYS, premises.eve_management, 201, json={"name": "ci", "limit": 5}, headers=once)
    other = await create(premises, headers={"Idempotency-Key": "deploy-78"}, limit=5)
    assert len({answers[0]["key"], eve["key"], other["key"]}) == 3
    await premises.ask("DELETE", f"{KEYS}/{answers[0]['data']['hash']}", premises.ada_management)
    await create(premises, 409, headers=once, limit=5)
    for bad in ("", "x" * 256, "a b"):
        await create(premises, 400, headers={"Idempotency-Key": bad})
    premises.now += 2 * DAY
    again = await create(premises, headers=once, limit=5)
    assert again["key"] != answers[0]["key"]  # a day later it is a new request


async def test_management_keys_are_a_signed_in_persons_to_make(premises: Premises) -> None:
    browser = await premises.browser()
    made = await browser.ask("POST", "/api/v1/management-keys", 201, json={"name": "boss"})
    assert (await premises.ask("GET", KEYS, made["key"]))["data"]
    listed = (await browser.ask("GET", "/api/v1/management-keys"))["data"]
    assert {row["name"] for row in listed} == {"boss", "management"}
    await browser.ask("GET", f"/api/v1/management-keys/{digest(premises.ada)}", 404)
    await browser.ask("DELETE", f"/api/v1/management-keys/{made['data']['hash']}")
    await premises.ask("GET", KEYS, made["key"], 401)


async def test_the_store_refuses_what_the_api_would_not_send(premises: Premises, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "gateway.db") as db, pytest.raises(sqlite3.IntegrityError):
        db.execute("UPDATE keys SET include_byok_in_limit = 2")


async def test_repeats_of_a_creation_tell_edges_nothing_that_may_be_older_than_a_change(premises: Premises) -> None:
    once = {"Idempotency-Key": "deploy-79"}
    answers = await asyncio.gather(*(create(premises, headers=once, limit=5) for _ in range(50)))
    assert all(one == answers[0] for one in answers)
    made = answers[0]["data"]["hash"]
    assert [changed for changed, _ in premises.changed] == [made]
    await premises.ask("PATCH", f"{KEYS}/{made}", premises.ada_management, json={"disabled": True})
    await create(premises, headers=once, limit=5)
    assert [(changed, record is not None and record.disabled) for changed, record in premises.changed] == [(made, False), (made, True)]


@pytest.mark.parametrize("moment", ["9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59Z"])
async def test_a_key_may_expire_in_the_last_second_that_there_is(premises: Premises, moment: str) -> None:
    made = await create(premises, expires_at=moment)
    assert made["data"]["expires_at"] == "9999-12-31T23:59:59.000Z"
    listed = (await premises.ask("GET", KEYS, premises.ada_management))["data"]
    assert made["data"]["hash"] in {row["hash"] for row in listed}


async def test_an_account_has_so_many_keys_and_no_more(premises: Premises, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "gateway.db") as db:
        rows = [(digest(str(number)), "user_ada", number % 2) for number in range(KEYS_MAX - 2)]  # the account has one already
        db.executemany("INSERT INTO keys (digest, account_id, name, label, created_at_ms, disabled) VALUES (?, ?, 'x', 'x', 5, ?)", rows)
    last = await create(premises)
    assert "10,000" in (await create(premises, 403))["error"]["message"]
    body = {"callback_url": "https://app.example/"}
    await premises.ask("POST", "/api/v1/auth/keys/code", premises.ada_management, 403, json=body)
    await premises.ask("POST", KEYS, premises.eve_management, 201, json={"name": "hers"})
    await premises.ask("DELETE", f"{KEYS}/{last['data']['hash']}", premises.ada_management)
    await create(premises)


async def test_keys_are_made_at_a_bounded_pace(premises: Premises) -> None:
    async def one(number: int) -> tuple[int, str | None]:
        headers = {"Authorization": f"Bearer {premises.ada_management}"}
        async with premises.http.post(KEYS, json={"name": f"n{number}"}, headers=headers) as answer:
            return answer.status, answer.headers.get("Retry-After")

    answers = [await one(number) for number in range(CREATIONS_PER_MINUTE + 3)]
    assert [status for status, _ in answers].count(429) == 3
    assert answers[-1][1] is not None and 1 <= int(answers[-1][1]) <= 60
    await premises.ask("POST", KEYS, premises.eve_management, 201, json={"name": "hers"})
