"""Cutting streams at event borders: the events that leave do not depend on where the network cut those that came."""

from __future__ import annotations

import json
import random
import time
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.wire.chunk import error_event
from gateway.wire.cutter import EventCutter, LineTooLong
from tests.decisions.streams import GENERATION, MODEL, PROVIDER, Event, by_the_book, byte_by_byte, outcome, parsed, spliced
from tests.timing import again_if_untimely, in_time

STREAMS = 240

WORDS = [
    "Hel",
    "lo",
    " wörld",
    "模型",
    "😀",
    'say "hi"',
    "a\\b",
    "line\nbreak",
    "\r\n\r\n",
    "\u2028",
    "data: [DONE]\n\n",
    '"usage":{"x":1}',
    "\x00\x1b",
]


class Writer:
    """One upstream stream, made at random: its way to write JSON, its fields, its line ends."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.separators = self.rng.choice([(",", ":"), (", ", ": ")])
        self.ascii_only = self.rng.random() < 0.5
        self.ends = self.rng.choice([["\n"], ["\r\n"], ["\r"], ["\n", "\r\n", "\r"]])
        self.id = f"chatcmpl-{seed}"
        self.order = self.rng.choice([["id", "object", "created", "model", "choices"], ["choices", "created", "id", "model", "object"]])
        self.extra: dict[str, Any] = self.rng.choice(
            [{}, {"usage": None}, {"system_fingerprint": None}, {"service_tier": "x"}, {"provider": "P"}]
        )
        self.tricks = self.rng.random() < 0.6

    def chunk(self, delta: dict[str, Any] | None, finish: str | None = None, **more: Any) -> dict[str, Any]:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]
        values = {"id": self.id, "object": "chat.completion.chunk", "created": 1764031697, "model": "sage-1", "choices": choices}
        return {**{name: values[name] for name in self.order}, **self.extra, **more}

    def chunks(self) -> Iterator[dict[str, Any] | str]:
        rng = self.rng
        yield self.chunk({"role": "assistant", "content": ""})
        for _ in range(rng.randint(0, 6)):
            kind = rng.random()
            if kind < 0.6:
                yield self.chunk({"content": rng.choice(WORDS)})
            elif kind < 0.7:
                yield self.chunk({"content": None, "reasoning_content": rng.choice(WORDS)})
            elif kind < 0.8:
                call = {"index": 0, "id": rng.choice(["call_1", self.id]), "type": "function", "function": {"name": "f", "arguments": "{"}}
                yield self.chunk({"role": None, "tool_calls": [call]})
            elif kind < 0.9:
                yield self.chunk({"content": "", "tool_calls": None}, created=rng.randint(1, 3))
            else:
                self.id = rng.choice([self.id, "", "other"])
                yield self.chunk({"content": "x"})
            if self.tricks and rng.random() < 0.25:
                yield rng.choice(["null", "5", '"text"', "[]", "", "{", '{"id":', "NaN", '{"a":NaN}', "[DONE", "\ufffd"])
        if rng.random() < 0.1:
            yield self.chunk(None, error={"message": "down", "code": 503})
        yield self.chunk({}, finish=rng.choice(["stop", "length", "end_turn", "tool_calls"]))
        if rng.random() < 0.7:
            yield self.chunk(
                None if rng.random() < 0.5 else {"content": ""}, usage={"prompt_tokens": 1, "completion_tokens": rng.randint(1, 9)}
            )
        if rng.random() < 0.9:
            yield "[DONE]"
        if rng.random() < 0.2:
            yield self.chunk({"content": "after the end"})

    def stream(self) -> bytes:
        rng = self.rng
        out = "\ufeff" if rng.random() < 0.2 else ""
        for chunk in self.chunks():
            if self.tricks and rng.random() < 0.3:
                out += self.comment()
            out += self.event(chunk)
        if rng.random() < 0.2:
            out += 'data: {"id":"cut off'
        data = out.encode()
        return data.replace("\ufffd".encode(), b'{"a":"\xff"}') if self.tricks else data

    def event(self, chunk: dict[str, Any] | str) -> str:
        rng = self.rng
        indent = 1 if self.tricks and rng.random() < 0.15 else None
        text = (
            chunk if isinstance(chunk, str) else json.dumps(chunk, separators=self.separators, ensure_ascii=self.ascii_only, indent=indent)
        )
        space = "" if self.tricks and rng.random() < 0.3 else " "
        lines = [f"data:{space}{line}" for line in text.split("\n")]
        if self.tricks and rng.random() < 0.2:
            lines.insert(rng.randint(0, len(lines)), rng.choice(["event: message", "id: 7", "retry: 100", ": note", "unknown: x", "event"]))
        return "".join(line + self.end() for line in lines) + self.end() * (1 + (self.tricks and rng.random() < 0.1))

    def comment(self) -> str:
        text = self.rng.choice([": keep-alive", ":", ": a\r: b", "retry: 5", "id: 3", "event: ping", "", ':\t{"id":1}'])
        return "".join(line + self.end() for line in text.split("\r")) + self.end()

    def end(self) -> str:
        # Lone CRs only among themselves: a CR, then a LF that belongs to the next line, would be one line end.
        return self.rng.choice(self.ends) if "\r" not in self.ends or len(self.ends) == 1 else self.rng.choice(["\n", "\r\n"])


def test_str_01_the_corpus_has_all_there_is() -> None:
    streams = b"".join(Writer(seed).stream() for seed in range(STREAMS))
    for sign in (
        b"\r\n",
        b"\r\r",
        b"\xef\xbb\xbf",
        b"data:{",
        b"data: {\n",
        b"event: ",
        b"id: ",
        b"retry: ",
        b": keep",
        b"tool_calls",
        b"[]",
        b"\xff",
    ):
        assert sign in streams, sign


@pytest.mark.parametrize("seed", range(STREAMS))
def test_str_01_events_pass_unchanged_wherever_the_network_cuts(seed: int) -> None:
    stream = Writer(seed).stream()
    sent, splicer = spliced([stream])
    whole = outcome(sent, splicer)
    assert whole == by_the_book(stream)
    rng = random.Random(seed)
    for pieces in (byte_by_byte(stream), at_random(stream, rng, 3), at_random(stream, rng, 20)):
        again, splicer = spliced(pieces)
        assert (again, outcome(again, splicer)) == (sent, whole)


def at_random(data: bytes, rng: random.Random, cuts: int) -> list[bytes]:
    places = [0, *sorted(rng.randint(0, len(data)) for _ in range(cuts)), len(data)]
    return [data[a:b] for a, b in pairwise(places)]


@settings(max_examples=200, deadline=None)
@given(
    lines=st.lists(
        st.sampled_from([b"", b":", b"data", b"data:", b"data: a", b"data:{}", b'data: {"id":1}', b"id: 5", b"event:x", b"\xef\xbb\xbf"])
    ),
    ends=st.lists(st.sampled_from([b"\n", b"\r\n", b"\r"]), min_size=1, max_size=3),
    seed=st.integers(0, 2**32),
)
def test_inp_12_any_lines_are_read_alike_however_they_are_cut(lines: list[bytes], ends: list[bytes], seed: int) -> None:
    stream = b"".join(line + ends[i % len(ends)] for i, line in enumerate(lines))
    sent, splicer = spliced([stream])
    assert outcome(sent, splicer).events == by_the_book(stream).events
    for pieces in (byte_by_byte(stream), at_random(stream, random.Random(seed), 5)):
        assert outcome(*spliced(pieces)) == outcome(sent, splicer)


@settings(max_examples=100, deadline=None)
@given(stream=st.binary(max_size=100), seed=st.integers(0, 2**32))
def test_inp_12_noise_does_no_harm(stream: bytes, seed: int) -> None:
    sent, _ = spliced([stream])
    assert parsed(sent) == []
    assert spliced(at_random(stream, random.Random(seed), 5))[0] == sent


# The cutter alone.


def test_an_event_leaves_with_the_byte_that_ends_it() -> None:
    for end in (b"\n\n", b"\r\n\r\n", b"\r\r"):
        cutter = EventCutter(1000)
        data = b"data: a" + end
        held = [cutter.feed(data[i : i + 1]) for i in range(len(data))]
        # With CRLF the event is over at the CR: the LF that belongs to it need not be waited for.
        last = len(data) - 2 if end == b"\r\n\r\n" else len(data) - 1
        assert held[last] == b"data: a\n\n"
        assert b"".join(held) == b"data: a\n\n"


def test_a_whole_block_is_not_copied() -> None:
    block = b"data: a\n\ndata: b\n\n"
    assert EventCutter(1000).feed(block) is block


def test_what_is_incomplete_waits() -> None:
    cutter = EventCutter(1000)
    assert cutter.feed(b"data: a\n\ndata: b") == b"data: a\n\n"
    assert cutter.feed(b"b\n") == b""
    assert cutter.feed(b"\ndata: c\n\nda") == b"data: bb\n\ndata: c\n\n"
    assert cutter.feed(b"ta: d\n\n") == b"data: d\n\n"
    assert cutter.feed(b"") == b""


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b"\xef\xbb", b"\xef", b"\xef\xbb\xbf\xef\xbb\xbf"])
def test_one_mark_is_taken_off_and_only_at_the_start(mark: bytes) -> None:
    stream = mark + b"data: a\n\n" + b"\xef\xbb\xbfdata: b\n\n"
    expected = stream.removeprefix(b"\xef\xbb\xbf")
    for pieces in ([stream], byte_by_byte(stream), [b"", stream[:2], b"", stream[2:]]):
        cutter = EventCutter(1000)
        assert b"".join(cutter.feed(piece) for piece in pieces) == expected


def test_an_empty_read_between_cr_and_lf_makes_no_second_line_end() -> None:
    cutter = EventCutter(1000)
    assert [cutter.feed(piece) for piece in (b"data: a\r", b"", b"\ndata: b\r", b"\n\r", b"", b"\n")] == [
        b"",
        b"",
        b"",
        b"data: a\ndata: b\n\n",
        b"",
        b"",
    ]


@pytest.mark.parametrize("piece_bytes", [1, 7, 1448, 65536])
@pytest.mark.parametrize("filling", [b"x", b"data: x\n", b"\r\ndata"])
def test_an_event_that_does_not_end_is_cut_at_the_limit(piece_bytes: int, filling: bytes) -> None:
    limit = 1 << 16
    stream = filling * (2 * limit // len(filling))
    cutter = EventCutter(limit)
    fed = 0
    tracemalloc.start()
    try:
        with pytest.raises(LineTooLong):
            for start in range(0, len(stream), piece_bytes):
                fed += piece_bytes
                assert cutter.feed(stream[start : start + piece_bytes]) == b""
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert fed <= 1.2 * limit + 2 * piece_bytes
    assert peak < 3 * limit + 8 * piece_bytes


def test_the_limit_is_that_of_one_event_not_of_the_stream() -> None:
    cutter = EventCutter(1000)
    for _ in range(100):
        assert cutter.feed(b"data: " + b"x" * 900) == b""
        assert cutter.feed(b"\n\n")
    with pytest.raises(LineTooLong):
        cutter.feed(b"data: a\n\n" + b"x" * 1001)


@again_if_untimely
def test_many_tiny_pieces_cost_no_more_than_their_number() -> None:
    started = time.process_time()
    cutter = EventCutter(1 << 20)
    for _ in range(1 << 18):
        cutter.feed(b"ab")
    in_time(time.process_time() - started, 1.0)


# The event that ends a broken stream.


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_a_broken_stream_ends_with_one_event(kind: str) -> None:
    body = {"code": 502, "message": "Provider returned error\n\ndata: [DONE]\n\n", "metadata": {"error_type": "provider_unavailable"}}
    data = error_event(body, GENERATION, MODEL, PROVIDER, 1764031697, kind)
    (event,) = parsed(data)
    chunk = json.loads(event.data)
    assert (event.type, chunk["error"], chunk["id"], chunk["model"], chunk["provider"]) == ("message", body, GENERATION, MODEL, PROVIDER)
    (choice,) = chunk["choices"]
    assert (choice["index"], choice["finish_reason"]) == (0, "error")
    assert choice["text" if kind == "text" else "delta"] in ("", {"content": ""})


def test_the_reference_reads_the_examples_of_the_standard() -> None:
    assert parsed(b"data: YHOO\ndata: +2\ndata: 10\n\n") == [Event("message", None, "YHOO\n+2\n10")]
    assert [event.data for event in parsed(b"data\n\ndata\ndata\n\ndata:")] == ["", "\n"]
    assert [event.data for event in parsed(b"data:test\n\ndata: test\n\n")] == ["test", "test"]
    assert parsed(b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n") == [
        Event("message", "1", "first event"),
        Event("message", "", "second event"),
        Event("message", None, " third event"),
    ]
