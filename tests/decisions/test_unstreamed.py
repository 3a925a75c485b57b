"""Answers to requests for a stream that do not say that they are one: what they are, and the events of one that came whole."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from gateway.wire.unstreamed import as_events, kind_of
from tests.decisions.streams import outcome, parsed, spliced

WHOLE: dict[str, Any] = {
    "id": "x-1",
    "object": "chat.completion",
    "created": 7,
    "model": "raw",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "a\nb"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
}


@pytest.mark.parametrize(
    ("begun", "kind"),
    [
        (b"", ""),
        (b"\r\n ", ""),
        (b"\xef\xbb", ""),
        (b"\xef\xbb\xbf", ""),
        (b"d", ""),
        (b"\n\nretry", ""),
        (b"data:", "stream"),
        (b"\xef\xbb\xbfdata: {", "stream"),
        (b": a comment", "stream"),
        (b"\nevent: x", "stream"),
        (b"id:1", "stream"),
        (b"{", "whole"),
        (b"\xef\xbb\xbf\n{", "whole"),
        (b"<html>", "neither"),
        (b"[1]", "neither"),
        (b"date: x", "neither"),
        (b"\x1f\x8b", "neither"),
    ],
)
def test_what_an_answer_is_its_first_bytes_tell(begun: bytes, kind: str) -> None:
    assert kind_of(begun) == kind


@pytest.mark.parametrize("indent", [None, 2])
def test_a_whole_answer_is_one_event_and_the_end(indent: int | None) -> None:
    events = as_events(json.dumps(WHOLE, indent=indent).encode())
    said, end = parsed(events)
    assert end.data == "[DONE]"
    (choice,) = WHOLE["choices"]
    delta = {"index": 0, "delta": choice["message"], "finish_reason": "stop"}
    assert json.loads(said.data) == {**WHOLE, "object": "chat.completion.chunk", "choices": [delta]}


def test_tool_calls_of_a_whole_answer_are_numbered_as_those_of_a_stream() -> None:
    calls = [{"id": f"c{n}", "type": "function", "function": {"name": "f", "arguments": "{}"}} for n in range(2)]
    message = {"role": "assistant", "content": None, "tool_calls": calls, "function_call": None}
    body = json.dumps({**WHOLE, "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}).encode()
    told = outcome(*spliced([as_events(body)]))
    (choice,) = told.events[0][2]["choices"]
    assert [call["index"] for call in choice["delta"]["tool_calls"]] == [0, 1]
    assert "function_call" not in choice["delta"] and choice["finish_reason"] == "tool_calls"
    assert told.done and told.usage == WHOLE["usage"]


def test_legacy_completions_keep_their_shape() -> None:
    body = json.dumps({**WHOLE, "object": "text_completion", "choices": [{"index": 0, "text": "ab", "finish_reason": "length"}]}).encode()
    (_, _, event), *rest = outcome(*spliced([as_events(body)])).events
    assert (event["object"], event["choices"][0]["text"], rest) == ("text_completion", "ab", [])


def test_half_a_surrogate_pair_stays_what_it_is() -> None:
    body = json.dumps(WHOLE).replace("a\\nb", "\\ud83d").encode()
    assert b'"content": "\\ud83d"' in as_events(body)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"choices":1}', b'{"choices":[1]}', b'{"choices":[]} x'])
def test_what_is_no_completion_is_refused(body: bytes) -> None:
    with pytest.raises((msgspec.DecodeError, KeyError)):
        as_events(body)
