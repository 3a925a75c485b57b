"""The OpenAPI document, made from the table of routes and the very structs that requests are decoded into, inference included."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from gateway import __version__
from gateway.control.api.route import API_BASES, Access, Nothing, Route
from gateway.domain.sessions import COOKIE, CSRF_HEADER
from gateway.routing.wishes import Wishes
from gateway.wire.envelope import RequestFields

Document = dict[str, Any]

_REF = "#/components/schemas/{name}"
_SECURITY: dict[Access, list[dict[str, list[str]]]] = {
    "public": [],
    "visitor": [],
    "key": [{"key": []}],
    "either": [{"key": []}, {"session": []}],
    "management": [{"managementKey": []}, {"session": []}],
    "session": [{"session": []}],
}
_BEARER = {"type": "http", "scheme": "bearer", "bearerFormat": "sk-or-v1-..."}
_SCHEMES = {
    "key": {**_BEARER, "description": "A key of either class"},
    "managementKey": {**_BEARER, "description": "A management key: refused on inference"},
    "session": {
        "type": "apiKey", "in": "cookie", "name": COOKIE,
        "description": f"A signed-in browser; changes need {CSRF_HEADER} as well, which GET /session tells",
    },
}  # fmt: skip
_ERROR: Document = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {
                "code": {"type": "integer", "description": "the HTTP status"},
                "message": {"type": "string"},
                "metadata": {"type": "object"},
            },
        }
    },
}
_FAILURE = {"description": "An error", "content": {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}}}
# Edges answer these, by the contract's own shapes. What they forward they do not know whole: other fields go to the provider.
_INFERENCE = (
    ("/chat/completions", "createChatCompletion", "Chat, streamed or not", "messages"),
    ("/completions", "createCompletion", "Legacy completion, streamed or not", "prompt"),
)


def openapi(routes: Sequence[Route]) -> Document:
    """OpenAPI 3.1. Paths are below `servers`, except those of pages, which are no part of it."""
    api = [route for route in routes if route.bases == API_BASES]
    structs = {kind for route in api for kind in (route.query, route.body, route.answer) if kind not in (None, Nothing)} | {
        RequestFields,
        Wishes,
    }
    _, components = msgspec.json.schema_components(sorted(structs, key=lambda kind: kind.__name__), ref_template=_REF)
    paths: dict[str, Document] = {}
    names: set[str] = set()
    for route in api:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, components, names)
    fields = components.pop(RequestFields.__name__)
    for path, name, summary, required in _INFERENCE:
        paths[path] = {"post": _inference(name, summary, required, fields)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "gateway", "version": __version__, "description": "One API in front of many model providers."},
        "servers": [{"url": API_BASES[0]}],
        "paths": paths,
        "components": {"schemas": {**components, "Error": _ERROR}, "securitySchemes": _SCHEMES},
    }


def _operation(route: Route, components: dict[str, Any], names: set[str]) -> Document:
    name = route.operation
    while name in names:
        name += "2"
    names.add(name)
    answer = {"$ref": _REF.format(name=route.answer.__name__)} if route.answer is not None else {"type": "object"}
    operation: Document = {
        "operationId": name,
        "summary": route.summary,
        "security": _SECURITY[route.access],
        "parameters": [*_path_parameters(route.path), *_query_parameters(route, components)],
        "responses": {
            str(route.status): {"description": "As asked", "content": {route.content_type: {"schema": answer}, **_others(route)}},
            "4XX": _FAILURE,
            "5XX": _FAILURE,
        },
    }
    if route.body is not Nothing:
        schema = {"$ref": _REF.format(name=route.body.__name__)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _others(route: Route) -> Document:
    return {kind: {"schema": {"type": "string"}} for kind in route.also}


def _path_parameters(path: str) -> Iterable[Document]:
    for name in re.findall(r"\{(\w+)\}", path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _query_parameters(route: Route, components: dict[str, Any]) -> Iterable[Document]:
    if route.query is Nothing:
        return
    schema = components[route.query.__name__]
    for name, kind in schema["properties"].items():
        described = {"description": kind["description"]} if "description" in kind else {}
        yield {"name": name, "in": "query", "required": name in schema["required"], "schema": kind, **described}


def _inference(name: str, summary: str, required: str, fields: Document) -> Document:
    """`fields` are those of all kinds; the prompt of the other kind is none of this one's."""
    prompts = {prompt for _, _, _, prompt in _INFERENCE}
    properties = {field: schema for field, schema in fields["properties"].items() if field == required or field not in prompts}
    properties["provider"] = {"anyOf": [{"$ref": _REF.format(name=Wishes.__name__)}, {"type": "null"}], "default": None}
    body = {"type": "object", "required": [required], "properties": properties, "additionalProperties": True}
    content = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}}
    return {
        "operationId": name,
        "summary": summary,
        "security": [{"key": []}],
        "parameters": [],
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": {"description": "As asked", "content": content}, "4XX": _FAILURE, "5XX": _FAILURE},
    }
