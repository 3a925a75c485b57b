"""What a provider is sent of a request: its own model name, no field of ours, and nothing that steers a credential."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from gateway.wire.envelope import parse
from tests.decisions.bodies import MESSAGES, PLAIN, body_with, sent

GATEWAY_FIELDS = (
    "models provider route plugins transforms preset usage session_id trace debug cache_control_ttl max_tool_calls "
    "stop_server_tools_when image_config include_reasoning"
).split()  # fmt: skip
STEERING_FIELDS = (
    "api_base base_url api_key api_version api_type extra_headers extra_body extra_query headers organization custom_llm_provider "
    "custom_host deployment_id azure_endpoint vertex_credentials vertex_project aws_access_key_id aws_secret_access_key "
    "litellm_params user_config mock_response fallbacks"
).split()  # fmt: skip
SHAPES: dict[str, Any] = {"models": ["c/d"], "plugins": [], "preset": None, "transforms": [], "route": "fallback", "session_id": "s"}


@pytest.mark.parametrize("name", GATEWAY_FIELDS)
def test_fields_of_the_gateway_stay_here(name: str) -> None:
    value = json.dumps(SHAPES.get(name, {"a": 1})).encode()
    assert sent(body_with(b'"%b":%b,"z":1' % (name.encode(), value))) == {
        "model": "sage-1",
        "messages": [{"role": "user", "content": "hi"}],
        "z": 1,
    }


@pytest.mark.parametrize("name", STEERING_FIELDS)
@pytest.mark.parametrize("spelled", [lambda name: name, lambda name: "".join(f"\\u{ord(letter):04x}" for letter in name)])
def test_aut_10_callers_cannot_steer_our_credentials(name: str, spelled: Callable[[str], str]) -> None:
    key = spelled(name).encode()
    assert set(sent(body_with(b'"%b":"http://canary.invalid"' % key))) == {"model", "messages"}
    assert b"canary" not in parse(body_with(b'"%b" : {"url":"http://canary.invalid"}' % key), "chat").body_for("m")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (b"", {"include_usage": True}),
        (b',"stream_options":null', {"include_usage": True}),
        (b',"stream_options":{}', {"include_usage": True}),
        (b',"stream_options":{"include_usage":false}', {"include_usage": True}),
        (b',"stream_options":{"include\\u005fusage":false,"x":[1e999]}', None),
        (b',"stream_options":{"include_obfuscation":false}', {"include_usage": True, "include_obfuscation": False}),
    ],
)
def test_usage_is_always_asked_for(options: bytes, expected: dict[str, Any] | None) -> None:
    body = body_with(b'"stream":true' + options)
    if expected is None:
        assert b'"stream_options":{"include_usage":true,"x":[1e999]}' in parse(body, "chat").body_for("m")
    else:
        assert sent(body)["stream_options"] == expected
    assert sent(body)["stream"] is True
    assert parse(body, "chat").stream


@pytest.mark.parametrize("options", [b"", b',"stream_options":{"include_obfuscation":false}'])
def test_a_provider_that_takes_no_options_of_a_stream_gets_none(options: bytes) -> None:
    envelope = parse(body_with(b'"stream":true,"z":1' + options), "chat")
    found = json.loads(envelope.body_for("m", stream_options=False))
    assert (found["stream"], found["z"], "stream_options" in found) == (True, 1, False)
    assert json.loads(parse(PLAIN, "chat").body_for("sage-1", stream_options=False)) == {**json.loads(PLAIN), "model": "sage-1"}
    assert "stream_options" in json.loads(envelope.body_for("m"))


@pytest.mark.parametrize("stream", [b"false", b"null"])
def test_options_of_a_stream_are_not_sent_without_one(stream: bytes) -> None:
    found = sent(body_with(b'"stream":%b,"stream_options":{"include_usage":true}' % stream))
    assert set(found) == {"model", "messages"}


@pytest.mark.parametrize("upstream_model", ["sage-1", 'a"b', "a\\b", "模型/é", "a\nb", '","model":"other'])
def test_the_model_is_replaced_once_in_the_providers_words(upstream_model: str) -> None:
    for body in (PLAIN, b"{" + MESSAGES + b', "model" : "acme/sage-1" }', body_with(b'"z":{"model":"kept"}')):
        found = sent(body, upstream_model=upstream_model)
        assert found["model"] == upstream_model
        assert found.get("z", {"model": "kept"}) == {"model": "kept"}


def test_one_envelope_serves_many_attempts() -> None:
    envelope = parse(body_with(b'"z":1'), "chat")
    bodies = [json.loads(envelope.body_for(name)) for name in ("a", "b", "a")]
    assert [body.pop("model") for body in bodies] == ["a", "b", "a"]
    assert bodies[0] == bodies[1] == bodies[2]


@pytest.mark.parametrize(
    ("sent", "known", "forwarded"),
    [
        ("max_tokens", "max_completion_tokens", {"max_completion_tokens": 7}),
        ("max_completion_tokens", "max_tokens", {"max_tokens": 7}),
        ("max_tokens", "max_tokens", {"max_tokens": 7}),
        ("max_tokens", None, {"max_tokens": 7}),
    ],
)
def test_the_token_limit_goes_under_the_name_that_the_endpoint_knows(sent: str, known: str | None, forwarded: dict[str, int]) -> None:
    body = json.dumps({"model": "a/b", sent: 7, "messages": [{"role": "user", "content": "x"}]}).encode()
    found = json.loads(parse(body, "chat").body_for("b", known))
    assert {name: value for name, value in found.items() if name.startswith("max_")} == forwarded
