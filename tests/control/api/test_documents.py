"""The API's own documents: they come from the table and the structs, so they say what is there, all of it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from yarl import URL

from gateway.control.api.models_feed import feed
from gateway.control.api.openapi import openapi
from gateway.control.api.route import API_BASES, Nothing
from gateway.domain.catalog import Model
from gateway.routing.wishes import Wishes
from gateway.wire.envelope import RequestFields
from tests.control.api.premises import Premises


async def document(premises: Premises) -> Any:
    return await premises.ask("GET", "/openapi.json")


async def test_every_route_is_in_the_document_and_nothing_else_but_inference(premises: Premises) -> None:
    said = await document(premises)
    told = {(method.upper(), path) for path, methods in said["paths"].items() for method in methods}
    there = {(route.method, route.path) for route in premises.routes if route.bases == API_BASES}
    assert told - there == {("POST", "/chat/completions"), ("POST", "/completions")} and there <= told
    operations = [operation["operationId"] for methods in said["paths"].values() for operation in methods.values()]
    assert len(operations) == len(set(operations))


async def test_every_field_that_is_decoded_is_told_and_every_reference_leads_somewhere(premises: Premises) -> None:
    said = await document(premises)
    schemas = said["components"]["schemas"]
    for route in premises.routes:
        if route.bases != API_BASES:
            continue
        operation = said["paths"][route.path][route.method.lower()]
        assert {one["name"] for one in operation["parameters"] if one["in"] == "query"} == set(route.query.__struct_fields__)
        assert {one["name"] for one in operation["parameters"] if one["in"] == "path"} == set(re.findall(r"\{(\w+)\}", route.path))
        if route.body is not Nothing:
            name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            assert set(schemas[name]["properties"]) == {field.encode_name for field in msgspec.structs.fields(route.body)}
        assert bool(operation["security"]) == (route.access not in ("public", "visitor"))
    assert set(re.findall(r"#/components/schemas/(\w+)", str(said))) <= schemas.keys()


async def test_inference_tells_every_field_that_it_looks_at_with_its_range(premises: Premises) -> None:
    said = await document(premises)
    for path, own, other in (("/chat/completions", "messages", "prompt"), ("/completions", "prompt", "messages")):
        schema = said["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["properties"].keys() == set(RequestFields.__struct_fields__) - {other}
        assert (schema["required"], schema["additionalProperties"]) == ([own], True)
        assert {"type": "number", "minimum": 0, "maximum": 2} in schema["properties"]["temperature"]["anyOf"]
    assert said["components"]["schemas"]["Wishes"]["properties"].keys() == set(Wishes.__struct_fields__)
    async with premises.http.get("/docs") as answer:
        assert "<code>max_completion_tokens</code>" in await answer.text()


async def test_the_document_is_yaml_as_well(premises: Premises) -> None:
    async with premises.http.get("/openapi.yaml") as answer:
        assert (answer.status, answer.content_type) == (200, "application/yaml")
        assert json.loads(await answer.text()) == await document(premises)  # all JSON is YAML


async def test_a_new_field_shows_up_by_itself(premises: Premises) -> None:
    [create] = [route for route in premises.routes if (route.method, route.path) == ("POST", "/keys")]
    grown = msgspec.defstruct("Grown", [("name", str), ("colour", str, "red")])
    said = openapi([msgspec.structs.replace(create, body=grown)])
    assert said["components"]["schemas"]["Grown"]["properties"]["colour"] == {"type": "string", "default": "red"}


async def test_the_page_for_people_tells_every_operation(premises: Premises) -> None:
    said = await document(premises)
    async with premises.http.get("/docs") as answer:
        page = await answer.text()
        assert answer.content_type == "text/html"
    for path, methods in said["paths"].items():
        for method in methods:
            assert f"{method.upper()} /api/v1{path}</code>" in page
    assert "include_disabled" in page and "<script" not in page


LOOK_ALIKES = (
    "acme/Sage-1", "ACME/sage-1", "acme/sage-1.", "acme/sage-1/", "acme/s\u0430ge-1", "acme/sage\u200b-1", "acme/sage-1 ",
    "acme/sage\u20101", "\uff41cme/sage-1", "acme/sa\u0301ge-1", "acme/sage-1\x00", "acme//sage-1", "acme/sage-1:free", "acme/sage-1:NITRO",
)  # fmt: skip


@pytest.mark.parametrize("name", LOOK_ALIKES)
async def test_INP_06_names_match_exactly_or_not_at_all(premises: Premises, name: str) -> None:
    author, _, slug = name.partition("/")
    for path in (f"model/{author}/{slug}", f"models/{author}/{slug}", f"models/{author}/{slug}/endpoints"):
        url = premises.http.make_url(f"/api/v1/{'/'.join(quote(part, safe='/:') for part in path.split('/'))}")
        async with premises.http.session.get(URL(str(url), encoded=True)) as answer:
            assert answer.status == 404


@pytest.mark.parametrize("query", ["use_rss=true", "use_rss_chat_links=true", "use_rss=true&sort=newest&q=sage"])
async def test_the_feed_is_rss_newest_first(premises: Premises, query: str) -> None:
    async with premises.http.get(f"/api/v1/models?{query}") as answer:
        assert (answer.status, answer.content_type) == (200, "application/rss+xml")
        channel = ElementTree.fromstring(await answer.read()).find("channel")
    assert channel is not None
    items = [(item.findtext("title"), item.findtext("link")) for item in channel.findall("item")]
    links = {"Acme: Sage 1": "acme/sage-1", "Acme: Tiny": "acme/tiny%3Afree"}
    start = "/chat?models=" if "chat" in query else "/"
    expected = [(name, start + links[name]) for name in ("Acme: Tiny", "Acme: Sage 1") if "q=" not in query or "Sage" in name]
    assert items == expected
    assert (await premises.ask("GET", "/api/v1/models?use_rss=false"))["total_count"] == 2


def test_nothing_in_a_name_breaks_out_of_the_feed() -> None:
    model = Model(
        id="a/b?c&d", canonical_slug="a/b", name='</title><script>&"\x00\u0008\ud800', endpoints=(), context_length=1, description="]]>"
    )
    [item] = ElementTree.fromstring(feed([model], public_url="https://ai.example", to_chat=False)).iter("item")
    assert item.findtext("title") == '</title><script>&"'
    assert item.findtext("link") == "https://ai.example/a/b%3Fc%26d"
