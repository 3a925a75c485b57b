"""The tree of errors: every class says status, code, type and fault, and all render in one form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from gateway.domain.errors import (
    BadRequest,
    Bug,
    CallerFault,
    GatewayError,
    OurFault,
    RateLimited,
    Rejected,
    Throttled,
    UpstreamFault,
    envelope,
)

# The contract's vocabulary, and the statuses each word may come with here.
ERROR_TYPES = {
    "invalid_request": {400, 405, 409, 414, 415, 431, 499},
    "authentication": {401},
    "payment_required": {402},
    "permission_denied": {403},
    "not_found": {404},
    "payload_too_large": {413},
    "context_length_exceeded": {400},
    "content_policy_violation": {400},
    "rate_limit_exceeded": {429},
    "server": {500},
    "provider_unavailable": {502},
    "provider_overloaded": {503},
    "timeout": {408, 502, 504},
}


def classes(of: type[GatewayError] = GatewayError) -> Iterator[type[GatewayError]]:
    for kind in of.__subclasses__():
        if kind.__module__ == "gateway.domain.errors":
            yield kind
            yield from classes(kind)


ALL = list(classes())
BASES = {CallerFault, UpstreamFault, OurFault}


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_each_class_is_sane(kind: type[GatewayError]) -> None:
    assert 400 <= kind.status <= 599
    assert re.fullmatch("[a-z]+(_[a-z]+)*", kind.code)
    assert kind.status in ERROR_TYPES[kind.error_type]
    assert kind.fault in ("caller", "upstream", "ours")
    if issubclass(kind, CallerFault):
        assert (kind.fault, kind.retryable) == ("caller", False) and kind.status < 500
    elif issubclass(kind, OurFault):
        assert (kind.fault, kind.retryable) == ("ours", False) and kind.status >= 500
    else:
        assert issubclass(kind, UpstreamFault)
        assert kind.fault == ("caller" if issubclass(kind, Rejected) else "upstream")


def test_codes_tell_classes_apart() -> None:
    # A base class is never raised for its own sake; BadRequest is the plain form of a caller's fault.
    codes = [kind.code for kind in ALL if kind not in BASES]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_each_renders_as_the_one_envelope(kind: type[GatewayError]) -> None:
    for error in (kind(), kind("what was wrong"), kind("x", retry_after_s=1.5, metadata={"provider_name": None, "raw": 'a"\n\u2028'})):
        body = json.loads(envelope(error))
        assert set(body) == {"error"}
        assert set(body["error"]) == {"code", "message", "metadata"}
        assert type(body["error"]["code"]) is int and body["error"]["code"] == error.http_status == kind.status
        assert isinstance(body["error"]["message"], str) and body["error"]["message"]
        assert body["error"]["metadata"]["error_type"] == kind.error_type
        assert b"\n" not in envelope(error)
    assert error.retry_after_s == 1.5
    assert body["error"]["metadata"]["raw"] == 'a"\n\u2028'


def test_metadata_may_say_more_and_is_not_shared() -> None:
    first, second = BadRequest("a"), BadRequest("b")
    first.metadata["x"] = 1
    assert second.metadata == {}
    assert first.body()["metadata"] == {"error_type": "invalid_request", "x": 1}
    assert BadRequest("c", metadata={"error_type": "invalid_prompt"}).body()["metadata"] == {"error_type": "invalid_prompt"}


def test_a_bug_says_nothing_of_itself() -> None:
    assert (Bug().message, Bug().body()["metadata"]) == ("Internal Server Error", {"error_type": "server"})


@pytest.mark.parametrize("status", [400, 405, 413, 422])
def test_a_rejection_carries_the_providers_status(status: int) -> None:
    error = Rejected("no", provider_status=status)
    assert (error.http_status, error.body()["code"]) == (status, status)


def test_the_word_for_a_log_line_is_the_message_or_the_class() -> None:
    assert [str(error) for error in (BadRequest("what"), BadRequest(), Throttled(), RateLimited("slow"))] == [
        "what",
        "BadRequest",
        "Provider returned error",
        "slow",
    ]
