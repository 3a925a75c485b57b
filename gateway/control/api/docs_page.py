"""The OpenAPI document as a page for people: every operation, who may use it, and what it takes. No script, no template engine."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

Document = dict[str, Any]

_WHO = {"key": "a key", "managementKey": "a management key", "session": "a signed-in browser"}


def docs_page(document: Document) -> str:
    """HTML without anything from outside of it but its style sheet."""
    base = document["servers"][0]["url"]
    sections = "".join(
        _section(base + path, method, operation, document)
        for path, methods in sorted(document["paths"].items())
        for method, operation in methods.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>API</title><meta name="viewport" content="width=device-width">
<link rel="icon" href="/pages/icon.svg"><link rel="stylesheet" href="/pages/plain.css"></head><body><main>
<h1>API</h1>
<p>Keys go in <code>Authorization: Bearer sk-or-v1-...</code>. Errors are
<code>{{"error": {{"code", "message", "metadata"}}}}</code> with the HTTP status as code.
For machines: <a href="/openapi.json">openapi.json</a>.</p>
{sections}</main></body></html>
"""


def _section(path: str, method: str, operation: Document, document: Document) -> str:
    who = " or ".join(_WHO[name] for scheme in operation["security"] for name in scheme) or "anybody"
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    fields = _resolved(body, document)
    rows = [
        *(_row(one["name"], one["in"], one["required"], one["schema"], document) for one in operation["parameters"]),
        *(_row(name, "body", name in fields.get("required", ()), kind, document) for name, kind in fields.get("properties", {}).items()),
    ]
    table = f"<table><tr><th>name</th><th>in</th><th>type</th><th></th></tr>{''.join(rows)}</table>" if rows else ""
    return f"""<section id="{escape(operation["operationId"])}"><h2><code>{method.upper()} {escape(path)}</code></h2>
<p>{escape(operation["summary"])}. For {who}.</p>{table}</section>
"""


def _row(name: str, place: str, required: bool, kind: Document, document: Document) -> str:
    note = "required" if required else f"default {escape(str(kind['default']))}" if kind.get("default") not in (None, "") else ""
    cells = (f"<code>{escape(name)}</code>", place, escape(" or ".join(_kinds(kind, document))), note)
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _kinds(kind: Document, document: Document) -> Iterable[str]:
    kind = _resolved(kind, document)
    if "anyOf" in kind:
        for each in kind["anyOf"]:
            yield from _kinds(each, document)
    elif "enum" in kind:
        yield ", ".join(map(str, kind["enum"]))
    else:
        types = kind.get("type", "any")
        text = " or ".join(types) if isinstance(types, list) else str(types)
        limits = [f"{word} {kind[key]}" for key, word in (("minimum", "from"), ("maximum", "to"), ("maxLength", "up to")) if key in kind]
        yield " ".join([text, *limits])


def _resolved(kind: Document, document: Document) -> Document:
    reference = kind.get("$ref")
    found: Document = document["components"]["schemas"][reference.rpartition("/")[2]] if reference else kind
    return found
