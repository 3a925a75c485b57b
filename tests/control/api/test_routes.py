"""Who may do what: every route against every kind of credential, read from the table of routes."""

from __future__ import annotations

import ast
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from gateway.control.api.application import CORS
from gateway.control.api.route import Access, Call, Nothing, Route
from gateway.control.api.workspace import workspace_of
from gateway.domain.keys import digest, new_secret
from tests.control.api.premises import DAY, NOW, Browser, Premises, spent

OPEN = {"public", "visitor"}
# Which credentials a class is for; all others are refused.
OPENED_BY: dict[Access, set[str]] = {
    "public": {"nobody", "key", "management", "session", "disabled", "expired", "unknown"},
    "visitor": {"nobody", "key", "management", "session", "disabled", "expired", "unknown"},
    "key": {"key", "management"},
    "either": {"key", "management", "session"},
    "management": {"management", "session"},
    "session": {"session"},
}
FIXED = {"hash": "0" * 64, "author": "acme", "slug": "sage-1", "name": "plain.css"}


def path_of(route: Route) -> str:
    path = route.bases[0] + route.path
    for name, value in FIXED.items():
        path = path.replace(f"{{{name}}}", value)
    return path


def test_every_route_has_a_class_and_no_path_is_made_elsewhere(premises: Premises) -> None:
    assert set(OPENED_BY) == set(get_args(Access))
    assert all(route.access in OPENED_BY for route in premises.routes)
    with pytest.raises(TypeError):
        Route(method="GET", path="/x", handler=premises.routes[0].handler, summary="")  # type: ignore[call-arg]
    served = {(each.method, each.resource.canonical) for each in premises.http.server.app.router.routes() if each.resource}  # type: ignore[attr-defined]
    declared = {(route.method, base + route.path) for route in premises.routes for base in route.bases}
    assert {one for one in served if one[0] != "HEAD"} == declared


def test_only_the_table_registers_routes() -> None:
    api = Path(__file__).parents[3] / "gateway" / "control" / "api"
    registering = {
        source.name
        for source in api.glob("*.py")
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in {"add_route", "add_routes", "add_get", "add_post", "RouteTableDef"}
    }
    assert registering == {"application.py", "admin.py"}  # the latter: of the admin socket, which no caller reaches


def test_handlers_take_the_structs_that_the_table_says(premises: Premises) -> None:
    for route in premises.routes:
        call = typing.get_type_hints(route.handler)["call"]
        assert typing.get_origin(call) is Call
        assert typing.get_args(call) == (route.query, route.body), route.path


def test_read_only_methods_take_no_body_and_no_struct_takes_what_is_not_a_callers_to_set(premises: Premises) -> None:
    forbidden = {"hash", "digest", "account_id", "balance", "usage", "is_admin", "management", "created_at", "is_management_key"}
    for route in premises.routes:
        assert route.method != "GET" or route.body is Nothing
        assert not forbidden & {field.name for field in msgspec.structs.fields(route.body)}, route.path


def credentials(premises: Premises, browser: Browser) -> Iterator[tuple[str, dict[str, str]]]:
    def bearer(secret: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {secret}"}

    yield "nobody", {}
    yield "key", bearer(premises.ada)
    yield "management", bearer(premises.ada_management)
    yield "unknown", bearer(new_secret())
    yield "session", browser.headers


async def test_AUT_04_each_credential_opens_its_own_routes_and_no_other(premises: Premises) -> None:
    browser = await premises.browser()
    disabled, expired = new_secret(), new_secret()
    await premises.store.create_key(premises.stored(disabled, "user_ada", "x", disabled=True, management=True))
    await premises.store.create_key(premises.stored(expired, "user_ada", "x", expires_at_s=int(NOW.timestamp()), management=True))
    tried = [
        *credentials(premises, browser),
        ("disabled", {"Authorization": f"Bearer {disabled}"}),
        ("expired", {"Authorization": f"Bearer {expired}"}),
    ]
    # Signing out ends the session, so it comes last. A body that is no object is refused after who sent it is known, before it acts.
    for route in sorted(premises.routes, key=lambda route: (route.path, route.method) == ("/session", "DELETE")):
        for kind, headers in tried:
            sent: dict[str, Any] = {"json": []} if route.body is not Nothing else {}
            async with premises.http.request(route.method, path_of(route), headers=headers, **sent) as answer:
                opened = answer.status not in (401, 403)
                assert opened == (kind in OPENED_BY[route.access]), f"{route.method} {route.path} for {kind}: {answer.status}"
                assert answer.status < 500
                if not opened:
                    assert (await answer.json())["error"]["code"] == answer.status


async def test_AUT_03_foreign_and_absent_objects_are_one_answer(premises: Premises) -> None:
    generation = spent(premises.ada, 1)
    await premises.journal(generation)
    secrets = {"ada": digest(premises.ada), "ada's management key": digest(premises.ada_management), "nobody": "f" * 64}
    odd = {"short": "abc", "upper": digest(premises.ada).upper(), "sql": "' OR 1=1 --", "like": "%", "traversal": "..%2f..%2fcredits"}
    for method in ("GET", "PATCH", "DELETE"):
        sent: dict[str, Any] = {"json": {"disabled": True}} if method == "PATCH" else {}
        bodies = [
            await premises.ask(method, f"/api/v1/keys/{sought}", premises.eve_management, 404, **sent)
            for sought in (*secrets.values(), *odd.values())
        ]
        assert all(body == bodies[0] for body in bodies[:-1])
    for path in ("generation", "generation/content"):
        foreign, absent = [
            await premises.ask("GET", f"/api/v1/{path}?id={sought}", premises.eve, 404)
            for sought in (generation.id, "gen-1764031697-00000000000000000009")
        ]
        assert foreign == absent
    assert (await premises.ask("GET", "/api/v1/activity", premises.eve_management))["data"] == []
    filtered = await premises.ask("GET", f"/api/v1/activity?api_key_hash={digest(premises.ada)}", premises.eve_management)
    assert filtered["data"] == []
    found = await premises.store.find_key(digest(premises.ada))
    assert found is not None and not found.disabled


# Where a caller may name an object: the field, and what stands for one that is somebody else's and for one that never was.
NAMED: dict[str, tuple[str, str]] = {
    "hash": (digest("ada's"), digest("nobody's")),
    "id": ("gen-1764031697-00000000000000000001", "gen-1764031697-00000000000000000009"),
    "api_key_hash": (digest("ada's"), digest("nobody's")),
    "user_id": ("user_ada", "user_none"),
    "creator_user_id": ("user_ada", "user_none"),
    "workspace_id": (workspace_of("user_ada"), workspace_of("user_none")),
}
REQUIRED: dict[str, Any] = {"name": "x", "disabled": True}  # so that nothing but the name of the object is at fault
PUBLIC_NAMES = {"author", "slug", "model", "name"}  # of what is everybody's to see


def naming(route: Route) -> set[str]:
    """The fields in which this route takes the name of an object."""
    path = {part[1:-1] for part in route.path.split("/") if part.startswith("{")}
    assert path <= NAMED.keys() | PUBLIC_NAMES, route.path
    fields = {field.name for kind in (route.query, route.body) for field in msgspec.structs.fields(kind)}
    return (path | fields) & NAMED.keys()


async def test_AUT_03_no_route_tells_a_foreign_name_from_one_that_never_was(premises: Premises) -> None:
    for secret, management in (("ada's", False), ("ada's boss", True)):
        await premises.store.create_key(premises.stored(secret, "user_ada", "x", management=management))
    generation = spent("ada's", 1, NOW - DAY)
    await premises.journal(generation)
    assert NAMED["id"][0] == generation.id
    before = await premises.store.page_of_keys(
        "user_ada", management=False, include_disabled=True, expired_by_s=-1, offset=0, limit=100
    )  # fmt: skip
    eve = await premises.browser("eve@example.com")
    asked = set()
    for route in premises.routes:
        for name in naming(route):
            told = []
            for value in NAMED[name] if not route.path.startswith("/management-keys/") else (digest("ada's boss"), digest("nobody's")):
                path = route.bases[0] + route.path.replace(f"{{{name}}}", value)
                query = {name: value} if name in route.query.__struct_fields__ else {}
                fields = {field for field in REQUIRED if field in route.body.__struct_fields__}
                body = {field: REQUIRED[field] for field in fields} | ({name: value} if name in route.body.__struct_fields__ else {})
                sent: dict[str, Any] = {"params": query, **({"json": body} if route.body is not Nothing else {})}
                headers = eve.headers if route.access != "key" else {"Authorization": f"Bearer {premises.eve}"}
                if "{hash}" in path:  # of a key of hers, where it is not the hash that is tried
                    path = path.replace("{hash}", digest(premises.eve))
                async with premises.http.request(route.method, path, headers=headers, **sent) as answer:
                    told.append((answer.status, await answer.text()))
            assert told[0] == told[1] and told[0][0] < 500, f"{route.method} {route.path} {name}"
            assert told[0][0] in (400, 404) or told[0] == (200, '{"data":[]}'), f"{route.method} {route.path} {name}: {told[0]}"
            asked.add((route.method, route.path, name))
    assert len(asked) >= 17
    after = await premises.store.page_of_keys(
        "user_ada", management=False, include_disabled=True, expired_by_s=-1, offset=0, limit=100
    )  # fmt: skip
    assert after == before and (await premises.store.generation(generation.id)) is not None


PAYLOADS = ("'", "''--", "1;DROP TABLE keys", '" OR ""="', "%", "_", "\\", "${7*7}", "{{7*7}}", "\u2028", "\x00", "a" * 4000)


async def test_AUT_07_input_is_never_sql(premises: Premises) -> None:
    for payload in PAYLOADS:
        for path, name in (
            ("models", "q"), ("models", "sort"), ("models", "providers"), ("activity", "api_key_hash"), ("activity", "user_id"),
            ("activity", "date"), ("keys", "offset"), ("keys", "workspace_id"), ("generation", "id"),
        ):  # fmt: skip
            async with premises.http.get(
                f"/api/v1/{path}", params={name: payload}, headers={"Authorization": f"Bearer {premises.ada_management}"}
            ) as answer:
                assert answer.status in (200, 400, 404)
    assert len((await premises.ask("GET", "/api/v1/keys", premises.ada_management))["data"]) == 1


@pytest.mark.parametrize(
    "target",
    ["/api/v1//keys", "/api/v1/./keys", "/api/v1/x/../keys", "/api/v1/%6beys/", "/API/V1/KEYS", "/api/v1/keys/", "/keys"],
)
async def test_AUT_08_paths_that_look_like_another_open_nothing(premises: Premises, target: str) -> None:
    for headers in ({}, {"X-HTTP-Method-Override": "GET"}, {"X-Forwarded-Host": "localhost"}, {"X-Original-URL": "/api/v1/models"}):
        async with premises.http.get(target, headers=headers) as answer:
            assert answer.status in (401, 404)
    async with premises.http.post("/api/v1/models", headers={"X-HTTP-Method-Override": "GET"}) as answer:
        assert answer.status == 405


async def test_WEB_04_no_origin_is_ever_named_together_with_credentials(premises: Premises) -> None:
    for route in premises.routes:
        for origin in ("https://evil.example", "null"):
            for method in (route.method, "OPTIONS"):
                async with premises.http.request(method, path_of(route), headers={"Origin": origin}) as answer:
                    allowed = answer.headers.get("Access-Control-Allow-Origin")
                    assert "Access-Control-Allow-Credentials" not in answer.headers
                    own = route.access in ("visitor", "session") or route.bases == ("",)
                    assert allowed == (None if own else CORS["Access-Control-Allow-Origin"]), f"{method} {route.path}"


async def test_WEB_05_every_answer_carries_protective_headers(premises: Premises) -> None:
    for route in premises.routes:
        for headers in ({}, {"Authorization": f"Bearer {premises.ada_management}"}):
            async with premises.http.request(route.method, path_of(route), headers=headers) as answer:
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert answer.headers["Referrer-Policy"] == "no-referrer"
                policy = answer.headers["Content-Security-Policy"]
                assert "frame-ancestors 'none'" in policy and "unsafe" not in policy
                assert route.access == "public" or answer.headers["Cache-Control"] == "no-store"
