"""What real servers really sent: in our name, exactly counted, and the same wherever the network cuts it."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest

from gateway.domain.errors import ContextTooLong, Refused, Rejected, UpstreamFault
from gateway.domain.usage import Usage
from gateway.wire.answer import rewrite
from gateway.wire.refusal import from_answer
from gateway.wire.usage import read
from tests.decisions.streams import GENERATION, MODEL, PROVIDER, by_the_book, byte_by_byte, outcome, parsed, spliced
from tests.recordings import names, recording

SERVER = "llama_cpp"


class Said(NamedTuple):
    """What a recorded answer comes to, all choices together."""

    text: str
    reasoning: str
    calls: list[str]  # names and arguments of tools
    finish_reason: str
    usage: Usage | None


def used(prompt: int, completion: int, cached: int = 0) -> Usage:
    return Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached)


HELLO = "Say hello.<|im_"
TURN = "<|im_end|>\n<|im_start|>user\nWeather in %s?<|im_end|>\n<|im_start|>assistant\n\n"
CALL = 'get_weather{"city": "%s"}'
STREAMS: dict[str, Said] = {
    "stream": Said(HELLO, "", [], "length", used(26, 6)),
    "stream-letters": Said("😀模🧑", "", [], "length", used(29, 6, 1)),
    "stream-logprobs": Said("Say hello", "", [], "length", used(26, 2, 21)),
    "stream-pings": Said("<|", "", [], "length", used(424, 2)),
    "stream-prompt-progress": Said("<|", "", [], "length", used(624, 2)),
    "stream-reasoning": Said("10", "3 and 4 is 10.\n", [], "stop", used(184, 22)),
    "stream-schema": Said('{\n    "a": "hello, my', "", [], "length", used(26, 10)),
    "stream-stop-word": Said("Say hello", "", [], "stop", used(26, 3, 21)),
    "stream-text": Said(" you\u2019ve made", "", [], "length", used(2, 4, 1)),
    "stream-tool-calls": Said(TURN % "Stockholm", "", [CALL % "Stockholm"] * 2, "tool_calls", used(638, 93)),
    "stream-two-choices": Said("SaySay hello hello.<.<", "", [], "length", used(26, 3, 21)),  # it tells usage for each choice apart
    "stream-usage-not-asked": Said("Say hello.<|", "", [], "length", None),
}
WHOLE: dict[str, Said] = {
    "whole": Said(HELLO, "", [], "length", used(26, 6, 21)),
    "whole-reasoning": Said("10", "3 and 4 is 10.\n", [], "stop", used(184, 22, 179)),
    "whole-text": Said(" you\u2019ve made", "", [], "length", used(2, 4, 1)),
    "whole-tool-calls": Said(TURN % "Berlin", "", [CALL % "Berlin"] * 2, "tool_calls", used(638, 91, 637)),
}


def believed(reported: bytes | None) -> Usage | None:
    return read(reported, 2048, 2048, images=0)


def said(choices: list[dict[str, Any]], part: str, finish_reason: str | None, usage: Usage | None) -> Said:
    """Of the choices of all events, or of one answer."""
    parts = [choice.get(part) or {"content": choice.get("text")} for choice in choices]
    calls: dict[int, str] = {}
    for each in parts:
        for at, call in enumerate(each.get("tool_calls") or ()):
            index = call.get("index", at)
            calls[index] = calls.get(index, "") + call["function"].get("name", "") + call["function"]["arguments"]
    text, reasoning = ("".join([each.get(name) or "" for each in parts]) for name in ("content", "reasoning_content"))
    assert finish_reason is not None
    return Said(text, reasoning, list(calls.values()), finish_reason, usage)


def test_every_recording_is_told_of() -> None:
    assert (names(SERVER, "stream"), names(SERVER, "whole"), names(SERVER, "error")) == (sorted(STREAMS), sorted(WHOLE), sorted(ERRORS))


@pytest.mark.parametrize("name", STREAMS)
def test_a_recorded_stream_says_in_our_name_what_it_said(name: str) -> None:
    recorded = recording(SERVER, name)
    assert (recorded.status, recorded.headers["content-type"]) == (200, "text/event-stream")
    sent, splicer = spliced([recorded.body])
    events = [json.loads(event.data) for event in parsed(sent)]
    assert {(event["id"], event["model"], event["provider"]) for event in events} == {(GENERATION, MODEL, PROVIDER)}
    assert (splicer.done, splicer.dropped, splicer.error) == (True, 0, None)
    choices = [choice for event in events for choice in event["choices"]]
    found = said(choices, "delta", splicer.finish_reason, believed(splicer.usage))
    assert found == STREAMS[name]
    assert splicer.content_events == sum([any(value for name, value in _added(choice).items() if name != "role") for choice in choices])
    final = json.loads(parsed(splicer.final_event(b'{"cost":0}'))[0].data)
    assert (final["id"], final["choices"], final["usage"]) == (GENERATION, [], {"cost": 0})


def _added(choice: dict[str, Any]) -> dict[str, Any]:
    added: dict[str, Any] = choice.get("delta", {"text": choice.get("text")})
    return added


@pytest.mark.parametrize("name", STREAMS)
def test_a_recorded_stream_is_the_same_wherever_it_is_cut(name: str) -> None:
    recorded = recording(SERVER, name)
    whole, splicer = spliced([recorded.body])
    expected = by_the_book(recorded.body)
    assert outcome(whole, splicer) == expected
    for pieces in (recorded.chunks, byte_by_byte(recorded.body)):
        sent, splicer = spliced(pieces)
        assert sent == whole
        assert outcome(sent, splicer) == expected
    for at in range(1, len(recorded.body), 1 + len(recorded.body) // 4000):  # in two at every byte; at every few of the longest
        assert spliced([recorded.body[:at], recorded.body[at:]])[0] == whole, at


@pytest.mark.parametrize("name", WHOLE)
def test_a_recorded_answer_says_in_our_name_what_it_said(name: str) -> None:
    recorded = recording(SERVER, name)
    before = json.loads(recorded.body)
    answer = rewrite(recorded.body, GENERATION, MODEL, PROVIDER)
    after = json.loads(answer.render(b'{"cost":0}'))
    assert said(after["choices"], "message", answer.finish_reason, believed(answer.usage)) == WHOLE[name]
    assert answer.upstream_id == before["id"]
    ours = {"id": GENERATION, "model": MODEL, "provider": PROVIDER, "usage": {"cost": 0}}
    finish = before["choices"][0]["finish_reason"]
    assert after == {**before, **ours, "choices": [{**before["choices"][0], "native_finish_reason": finish}]}


ERRORS: dict[str, tuple[int, type[UpstreamFault], int, str]] = {
    "error-context-exceeded": (
        400,
        ContextTooLong,
        400,
        "request (4024 tokens) exceeds the available context size (2048 tokens), try increasing it",
    ),
    "error-loading": (503, Refused, 502, "Provider returned error"),
    "error-no-image-support": (500, Refused, 502, "Provider returned error"),
    "error-no-messages": (400, Rejected, 400, "'messages' is required"),
    "error-not-found": (404, Refused, 502, "Provider returned error"),
    "error-not-json": (400, Rejected, 400, "[json.exception.parse_error.101] parse error at line 1, column 2"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_recorded_error_is_told_apart_and_quoted(name: str) -> None:
    recorded = recording(SERVER, name)
    error = from_answer(recorded.status, recorded.body, provider=PROVIDER, secret="", retry_after=None, now_s=0.0)
    status, kind, caller_status, words = ERRORS[name]
    assert (recorded.status, type(error), error.http_status) == (status, kind, caller_status)
    assert error.message.startswith(words)
    assert error.metadata["raw"] == recorded.body.decode()
