"""A stream that goes on elsewhere, as bytes: wherever it broke and however it was written, the text is whole and comes once."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire.cutter import EventCutter
from gateway.wire.envelope import parse
from gateway.wire.prefill import continued, spelled
from gateway.wire.shape import Shape
from gateway.wire.transcript import TEXT_BYTES_MAX, TranscribingSplicer, Transcript

TEXTS = st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=8)


def escaped(text: str, *, is_ascii: bool) -> str:
    """As it stands in JSON, between the quotes."""
    return json.dumps(text, ensure_ascii=is_ascii)[1:-1]


def pieces_of(texts: list[str], *, is_ascii: bool, halves: bool) -> list[str]:
    """The texts as events have them; `halves`: each surrogate pair is cut in two."""
    pieces = [escaped(text, is_ascii=is_ascii) for text in texts]
    if not halves:
        return pieces
    out: list[str] = []
    for piece in pieces:
        begin = 0
        for at in range(len(piece) - 11):
            if piece[at : at + 2] == "\\u" and piece[at + 2 : at + 4] in ("d8", "d9", "da", "db") and piece[at + 6 : at + 8] == "\\u":
                out.append(piece[begin : at + 6])
                begin = at + 6
        out.append(piece[begin:])
    return out


def events(pieces: list[str], *, spaced: bool = False, created: int = 7) -> bytes:
    gap = " " if spaced else ""
    start = '{"id":"u","object":"chat.completion.chunk","created":CREATED,"model":"m","choices":[{"index":0,"delta":{'
    start = start.replace(":", ":" + gap).replace("CREATED", str(created))
    lines = [start + f'"role":"assistant","content":"{piece}"' + '},"finish_reason":null}]}' for piece in ["", *pieces]]
    lines.append(start + '},"finish_reason":"stop"}]}')
    return b"".join(f"data: {line}\n\n".encode() for line in lines)


def spliced(splicer: TranscribingSplicer, data: bytes, cuts: list[int]) -> bytes:
    """What the caller gets of a stream that came in these pieces."""
    cutter, out, begin = EventCutter(1 << 20), b"", 0
    for cut in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
        block = cutter.feed(data[begin:cut])
        begin = cut
        if block:
            out += splicer.splice(block)
    return out


def text_in(data: bytes) -> str:
    halves = "".join(said["choices"][0]["delta"].get("content", "") for said in map(json.loads, data.decode().split("data: ")[1:]) if said)
    return halves.encode("utf-16", "surrogatepass").decode("utf-16")


@given(TEXTS, st.booleans(), st.booleans(), st.booleans(), st.integers(0), st.lists(st.integers(0), max_size=4), st.booleans())
def test_a_stream_cut_anywhere_and_gone_on_with_has_each_character_once(
    texts: list[str], is_ascii: bool, halves: bool, spaced: bool, at: int, cuts: list[int], repeats: bool
) -> None:
    if halves:  # an event with a NUL and half a pair is dropped: the two cannot be told apart once it is read
        texts = [text.replace("\0", "0") for text in texts]
    whole, transcript = "".join(texts), Transcript()
    data = events(pieces_of(texts, is_ascii=is_ascii, halves=halves and is_ascii), spaced=spaced)
    first = TranscribingSplicer("gen-1", "acme/a", "North", Shape(), transcript, goes_on=False, repeats=False)
    sent = spliced(first, data[: at % (len(data) + 1)], cuts)
    said = text_in(sent)
    assert transcript.plain() == said and whole.startswith(said) and transcript.can_go_on
    if first.finish_reason is not None:
        assert said == whole
        return
    body = json.dumps({"model": "a/b", "stream": True, "messages": [{"role": "user", "content": "x"}]}).encode()
    request = continued(parse(body, "chat"), bytes(transcript.text), 3)
    assert request is not None
    asked = json.loads(request.body_for("m"))["messages"]
    assert asked[1:] == ([{"role": "assistant", "content": said}] if said else [])
    second = TranscribingSplicer("gen-1", "acme/a", "South", Shape(), transcript, goes_on=True, repeats=repeats)
    rest = [said, *whole[len(said) :]] if repeats else [whole[len(said) :]]
    answer = events([escaped(each, is_ascii=not is_ascii) for each in rest if each], spaced=spaced, created=9)
    more = spliced(second, answer, cuts)
    assert said + text_in(more) == whole
    told = [json.loads(each) for each in (sent + more).decode().split("data: ")[1:]]
    assert len({each["created"] for each in told}) == 1 or not sent
    assert not any("role" in json.loads(each)["choices"][0]["delta"] for each in more.decode().split("data: ")[1:])


@pytest.mark.parametrize(
    ("answer", "new"),
    [
        (["Once upon", " a time"], " a time"),  # the very text, then more
        (["On", "ce", " upon a time"], " a time"),  # in pieces, the last of them with more
        ([" a time"], " a time"),  # not at all
        (["On", "set"], "Onset"),  # seemed to
        (["Once"], "Once"),  # began to, and ended
    ],
)
def test_what_repeats_the_text_before_is_left_out_and_nothing_else(answer: list[str], new: str) -> None:
    transcript = Transcript()
    transcript.read(b"Once upon")
    splicer = TranscribingSplicer("gen-1", "acme/a", "South", Shape(), transcript, goes_on=True, repeats=True)
    assert text_in(spliced(splicer, events(answer), [])) == new
    assert transcript.plain() == "Once upon" + new


@pytest.mark.parametrize(
    ("delta", "goes_on"),
    [
        ({"content": "a"}, True),
        ({"content": "a", "tool_calls": None, "refusal": None, "annotations": []}, True),
        ({"reasoning": "hm"}, False),
        ({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}, False),
        ({"refusal": "no"}, False),
        ({"content": [{"type": "text", "text": "a"}]}, False),
        ({"content": "a" * (TEXT_BYTES_MAX + 1)}, False),
        ({"content": "\ud83da"}, False),  # half a character, and something else after it
    ],
)
def test_only_what_is_text_can_be_gone_on_with(delta: dict[str, Any], goes_on: bool) -> None:
    transcript = Transcript()
    splicer = TranscribingSplicer("gen-1", "acme/a", "North", Shape(), transcript, goes_on=False, repeats=False)
    chunk = {"id": "u", "object": "chat.completion.chunk", "created": 7, "model": "m", "choices": [{"index": 0, "delta": delta}]}
    assert splicer.splice(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    assert transcript.can_go_on is goes_on


def test_a_request_is_gone_on_with_by_what_it_says_and_no_more() -> None:
    asked = {
        "model": "a/b",
        "max_tokens": 9,
        "max_completion_tokens": 12,
        "seed": 4,
        "stream": True,
        "continue_final_message": False,
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Well, ", "prefix": False}],
    }
    envelope = parse(json.dumps(asked).encode(), "chat")
    more = continued(envelope, b'it\\u00fc \\"is\\"', 5)
    assert more is not None and (more.max_tokens, more.messages) == (7, 3)
    assert more.prompt_text_bytes == envelope.prompt_text_bytes + len('itü "is"'.encode()) <= more.prompt_bytes_max
    for prefill, said, told in (
        ("assistant", {}, {"continue_final_message": False}),
        ("mistral", {"prefix": True}, {"continue_final_message": False}),
        ("moonshot", {"partial": True}, {"continue_final_message": False}),
        ("vllm", {}, {"continue_final_message": True, "add_generation_prompt": False}),
    ):
        body = msgspec.json.decode(spelled(more, prefill).body_for("m"))
        assert body["messages"] == [asked["messages"][0], {"role": "assistant", "content": 'Well, itü "is"', **said}]  # type: ignore[index]
        assert {name: body[name] for name in body if ("message" in name and name != "messages") or name.startswith("add")} == told
        assert (body["max_tokens"], body["max_completion_tokens"], body["seed"]) == (4, 7, 4)


@pytest.mark.parametrize(
    "more",
    [
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"guided_grammar": "root ::= x"},
        {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": []}]},
    ],
)
def test_what_a_second_part_cannot_fit_is_not_asked_for(more: dict[str, Any]) -> None:
    body = {"model": "a/b", "stream": True, "messages": [{"role": "user", "content": "x"}], **more}
    assert continued(parse(json.dumps(body).encode(), "chat"), b"a", 1) is None
