"""Request bodies put together from parts, and what became of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.domain.errors import BadRequest
from gateway.wire.envelope import Kind, parse

M = b'"model":"acme/sage-1"'
MESSAGES = b'"messages":[{"role":"user","content":"hi"}]'
PLAIN = b"{" + M + b"," + MESSAGES + b"}"


def body_with(member: bytes) -> bytes:
    return b"{" + M + b"," + MESSAGES + b"," + member + b"}"


def sent(body: bytes, kind: Kind = "chat", upstream_model: str = "sage-1") -> dict[str, Any]:
    """What the provider reads, and that no key stands in it twice."""
    forwarded = parse(body, kind).body_for(upstream_model)
    pairs: list[tuple[str, Any]] = json.loads(forwarded, object_pairs_hook=list, parse_int=str)
    names = [name for name, _ in pairs]
    assert len(set(names)) == len(names), names
    return loads(forwarded)


def loads(body: bytes) -> dict[str, Any]:
    """Integers of any length, which Python's own limit forbids."""
    found: dict[str, Any] = json.loads(body, parse_int=lambda digits: int(digits) if len(digits) < 1000 else digits)
    return found


def refusal(body: bytes, kind: Kind = "chat") -> str:
    with pytest.raises(BadRequest) as refused:
        parse(body, kind)
    assert refused.value.http_status == 400
    return refused.value.message
