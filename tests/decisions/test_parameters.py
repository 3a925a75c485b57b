"""Parameters in range, or a refusal that names the field and does not repeat the value."""

from __future__ import annotations

import pytest

from gateway.wire.envelope import parse
from tests.decisions.bodies import MESSAGES, M, body_with, refusal

# INP-07. Each is refused with the field's name, and without an echo.
WRONG: list[tuple[str, bytes]] = [
    *(("max_tokens", value) for value in (b"-1", b"0", b"9223372036854775808", b"2147483648", b"true")),
    *(("max_tokens", value) for value in (b'"5"', b"1.5", b"1e3", b"[1]", b"{}")),
    *(("max_completion_tokens", value) for value in (b"-1", b"0", b"18446744073709551616", b"false", b'"5"', b"0.5")),
    *(("n", value) for value in (b"0", b"2", b"-1", b"1000000", b"true", b'"1"', b"1.0")),
    *(("best_of", value) for value in (b"0", b"2", b"true", b'"1"')),
    *(("temperature", value) for value in (b"1e308", b"-0.1", b"2.1", b'"1"', b"true", b"[]", b"-1e308", b"1e999")),
    *(("top_p", value) for value in (b"-0.1", b"1.1", b'"x"', b"true")),
    *(("top_k", value) for value in (b"-1", b"1.5", b'"x"', b"2147483648")),
    *(("min_p", value) for value in (b"-1", b"2", b"{}")),
    *(("top_a", value) for value in (b"-1", b"2")),
    *(("frequency_penalty", value) for value in (b"-2.1", b"2.1", b'"x"')),
    *(("presence_penalty", value) for value in (b"-2.1", b"2.1", b"[]")),
    *(("repetition_penalty", value) for value in (b"-0.1", b"2.1")),
    *(("seed", value) for value in (b"1.5", b'"x"', b"9223372036854775808", b"-9223372036854775809")),
    *(("stop", value) for value in (b"5", b"[5]", b"[" + b'"sekret",' * 100_000 + b'"x"]', b"{}", b'"' + b"s" * 65537 + b'"')),
    *(("logprobs", value) for value in (b'"x"', b"21", b"-1")),
    *(("top_logprobs", value) for value in (b"21", b"-1", b"true")),
    *(("logit_bias", value) for value in (b'{"5":101}', b'{"5":-101}', b'{"5":"x"}', b"[]")),
    *(("tools", value) for value in (b"{}", b'["x"]', b"5")),
    *(("tool_choice", value) for value in (b"5", b"[]", b"true")),
    *(("parallel_tool_calls", value) for value in (b"1", b'"true"')),
    *(("response_format", value) for value in (b'"json"', b"[]")),
    *(("stream", value) for value in (b"1", b'"true"', b"[]")),
    *(("stream_options", value) for value in (b"true", b"[]")),
    *(("user", value) for value in (b"5", b'"' + b"u" * 1025 + b'"')),
    *(("session_id", value) for value in (b"5", b'"' + b"s" * 257 + b'"')),
    *(("metadata", value) for value in (b'"x"', b'{"a":5}', b"[]")),
    *(("models", value) for value in (b'"a/b"', b"[5]", b'[""]', b"[" + b'"a/b",' * 32 + b'"a/b"]')),
    *(("provider", value) for value in (b'"x"', b"[]")),
    *(("route", value) for value in (b'"sekret"', b"5", b'"fallback\\n"', b'"sekret - at `x`"')),
    *(("plugins", value) for value in (b"{}", b'["x"]')),
    *(("transforms", value) for value in (b'"x"', b"[5]")),
    *(("reasoning", value) for value in (b'"high"', b"[]")),
    *(("usage", value) for value in (b"true", b"[]")),
]  # fmt: skip


def test_inp_07_the_table_is_long_enough() -> None:
    assert len(WRONG) >= 80


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}={value[:24].decode()}" for name, value in WRONG])
def test_inp_07_parameters_are_in_range(name: str, value: bytes) -> None:
    message = refusal(body_with(b'"%b":%b' % (name.encode(), value)))
    assert message.startswith(f"{name}: ")
    assert len(message) < 200
    assert "sekret" not in message
    for echo in (b"1e308", b"9223372036854775808", b"1000000", b"2.1"):
        assert echo not in value or echo.decode() not in message


@pytest.mark.parametrize(
    "messages",
    [
        b"null", b"[]", b"{}", b'"hi"', b"[5]", b"[[]]", b"[{}]", b'[{"role":"sekret","content":"x"}]', b'[{"role":"user","content":5}]',
        b'[{"role":"user","content":{}}]', b'[{"role":"user","content":["sekret"]}]', b'[{"role":"user","content":[{"text":"x"}]}]',
        b'[{"role":"user","content":[{"type":"text","text":5}]}]', b'[{"role":5,"content":"x"}]', b'[{"content":"x"}]',
        b'[{"role":"sekret - at `$[9].role`","content":"x"}]',
    ],
)  # fmt: skip
def test_messages_of_another_shape_are_refused(messages: bytes) -> None:
    message = refusal(b"{" + M + b',"messages":' + messages + b"}")
    assert message.startswith("messages")
    assert "sekret" not in message


def test_a_wrong_role_is_told_where_and_what_is_right() -> None:
    message = refusal(b"{" + M + b',"messages":[{"role":"user"},{"role":"me"}]}')
    assert message == "messages: a role must be one of system, developer, user, assistant, tool, function - at `$[1].role`"


@pytest.mark.parametrize("model", [b"null", b'""', b"5", b'["a/b"]', b'"' + b"m" * 257 + b'"', b"true"])
def test_a_model_is_a_name(model: bytes) -> None:
    assert refusal(b'{"model":' + model + b"," + MESSAGES + b"}").startswith("model")


@pytest.mark.parametrize("null", ["model", "models", "max_tokens", "stop", "temperature", "stream", "tools", "route", "stream_options"])
def test_null_is_as_good_as_absent(null: str) -> None:
    models = b',"models":["acme/sage-1"]' if null == "model" else b""
    model = b"" if null == "model" else M + b","
    assert parse(b"{" + model + MESSAGES + b',"' + null.encode() + b'":null' + models + b"}", "chat").model == "acme/sage-1"
