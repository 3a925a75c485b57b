"""What was said, read out of what is kept: plain answers, streams, legacy completions, errors, and what is cut or is no answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.control.content import Exchange
from gateway.control.content.said import Failure, Said, read_exchange

REQUEST = b'{"model": "acme/sage-1", "messages": [ {"role":"user","content":"H\\u00e9 \\ud83d\\ude00"} ], "stream": true}'


def read(answer: bytes | dict[str, Any], request: bytes | dict[str, Any] = REQUEST) -> Said:
    def encoded(value: bytes | dict[str, Any]) -> bytes:
        return value if isinstance(value, bytes) else json.dumps(value).encode()

    return read_exchange(Exchange(encoded(request), encoded(answer)))


def stream(*events: dict[str, Any] | bytes, end: bytes = b"data: [DONE]\n\n") -> bytes:
    return b"".join(event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + end


def delta(index: int = 0, **delta: Any) -> dict[str, Any]:
    return {"id": "gen-1", "choices": [{"index": index, "delta": delta, "finish_reason": None}]}


def test_messages_are_the_very_bytes_of_the_caller() -> None:
    said = read({"choices": []})
    assert said.messages is not None and bytes(said.messages) == b'[ {"role":"user","content":"H\\u00e9 \\ud83d\\ude00"} ]'


@pytest.mark.parametrize(
    ("prompt", "text"), [("Say hi", "Say hi"), (["Say", "hi"], "Say\nhi"), ([1, 2], "[1, 2]"), ([[1], [2]], "[[1], [2]]"), ("", "")]
)
def test_a_bare_prompt_is_text(prompt: Any, text: str) -> None:
    said = read({"choices": [{"index": 0, "text": "hi"}]}, {"model": "x", "prompt": prompt})
    assert (said.messages, said.prompt, said.completion) == (None, text, "hi")


def test_a_plain_answer() -> None:
    said = read({"choices": [{"index": 0, "message": {"role": "assistant", "content": "Rivers.", "reasoning": "Hm."}}], "usage": {}})
    assert (said.completion, said.reasoning, said.error) == ("Rivers.", "Hm.", None)


def test_a_streams_events_are_joined_and_its_comments_are_no_part_of_it() -> None:
    said = read(
        stream(
            b": OPENROUTER PROCESSING\n\n", delta(role="assistant", content=""), delta(reasoning="H"), delta(reasoning_content="m."),
            delta(content="Ri"), b"event: message\r\ndata:" + json.dumps(delta(content="ve")).encode() + b"\r\n\r\n",
            delta(1, content="other"), delta(content="rs."), {"choices": [], "usage": {"cost": 1}},
        )
    )  # fmt: skip
    assert (said.completion, said.reasoning, said.error) == ("Rivers.", "Hm.", None)


def test_half_a_surrogate_pair_an_event_is_one_character_and_a_lone_half_a_replacement() -> None:
    events = b'data: {"choices":[{"delta":{"content":"a\\ud83d"}}]}\n\ndata: {"choices":[{"delta":{"content":"\\ude00\\ud83d"}}]}\n\n'
    assert read(events).completion == "a\U0001f600\ufffd"


def test_a_legacy_stream() -> None:
    assert read(stream({"choices": [{"index": 0, "text": "Say"}]}, {"choices": [{"text": " hi"}]})).completion == "Say hi"


def test_content_in_parts_is_its_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}, {"type": "text", "text": "b"}]
    assert read({"choices": [{"message": {"content": parts}}]}).completion == "ab"


def test_an_answer_without_text_is_null() -> None:
    said = read({"choices": [{"message": {"content": None, "tool_calls": [{"id": "1"}]}}]})
    assert (said.completion, said.reasoning) == (None, None)


def test_an_error_is_told_with_what_came_before_it() -> None:
    error = {"code": 502, "message": "Provider returned error", "metadata": {"provider_name": "North", "raw": {"why": "tired"}}}
    failure = Failure(status=502, message="Provider returned error", provider_name="North", raw='{"why": "tired"}')
    assert read({"error": error}).error == failure
    said = read(stream(delta(content="Ri"), {"error": error, "choices": [{"delta": {"content": ""}, "finish_reason": "error"}]}, end=b""))
    assert (said.completion, said.error) == ("Ri", failure)


def test_what_was_cut_is_shown_as_far_as_it_goes() -> None:
    request = b'{"model": "acme/sage-1", "messages": [{"role": "user", "content": "Tell me ab\xc3'
    said = read(stream(delta(content="Ri"), delta(content="vers"), end=b'data: {"choices": [{"delta": {"con'), request)
    assert (said.messages, said.completion) == (None, "Rivers")
    assert said.prompt.startswith('{"model": "acme/sage-1"') and said.prompt.endswith("Tell me ab\ufffd")
    assert read(b'{"choices": [{"message": {"content": "Riv').completion == '{"choices": [{"message": {"content": "Riv'


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"\n\n", b"data: 1\n\n", b'{"choices": 1}', b'{"choices": [1, null]}', b'{"choices": [{"delta": 1, "message": []}]}',
        b'{"error": "no"}', b"data: " + b"[" * 100_000 + b"\n\n", b"data: {}", b'{"choices": [{"message": {"content": {"a": 1}}}]}',
    ],
)  # fmt: skip
def test_what_is_no_answer_says_nothing(answer: bytes) -> None:
    said = read(answer)
    assert (said.completion, said.reasoning, said.error) == (None, None, None)


@pytest.mark.parametrize("request_", [b"", b"\xff", b"[]", b'{"messages": 1}', b'{"messages": {"a": 1}}', b"[" * 100_000])
def test_what_is_no_request_is_shown_as_it_is(request_: bytes) -> None:
    said = read({"choices": []}, request_)
    assert said.messages is None and isinstance(said.prompt, str)
