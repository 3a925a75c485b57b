"""Where the hot path takes a shorter way, it comes to what the long way comes to: each pair is run side by side."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.domain.errors import GatewayError
from gateway.edge.heads import HeadReader, RepeatedHead, RequestHead, body_length
from gateway.wire import answer, framing
from gateway.wire.framing import Dechunker, FramingError, whole_chunks
from tests.decisions.streams import GENERATION, MODEL, PROVIDER, by_the_book, outcome, spliced

# Heads that come again: what is recognised is what the parser would read.

BODY = b'{"model":"a/b"}'
HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: gw\r\nAuthorization: Bearer sk-or-v1-0123\r\n"
    b"Content-Type: application/json\r\nContent-Length: 15\r\nUser-Agent: x/1 (y; z)\r\n\r\n"
)
BYTES_MAX = 10**9
MUTANTS = [bytes((byte,)) for byte in b"\0\t\n\r +-.,:;0159AaTtx\x7f\x80\xff"]
LENGTHS = [
    b"0", b"1", b"16", b"0015", b"000000000015", b"0000000000015", b"+15", b"-15", b" 15", b"15 ", b"1 5", b"15,15", b"15\r", b"1e1",
    b"0x15", b"", b"\xd9\xa1", b"999999999", b"9999999999", b"99999999999", b"9" * 15, b"9" * 40,
]  # fmt: skip
LINES = [
    b"Content-Length: 15\r\n", b"Content-Length: 4\r\n", b"content-length: 4\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Expect: 100-continue\r\n", b"Connection: close\r\n", b" folded\r\n", b"\tContent-Length: 4\r\n",
    b"Content-Length : 4\r\n", b"Content-Length:\r\n 4\r\n",
    b"X\r\n", b"\r\n", b"Content-Encoding: gzip\r\n",
]  # fmt: skip


def mutants() -> Iterator[bytes]:
    for at in range(len(HEAD)):
        yield HEAD[:at] + HEAD[at + 1 :]
        for byte in MUTANTS:
            yield HEAD[:at] + byte + HEAD[at + 1 :]
            yield HEAD[:at] + byte + HEAD[at:]
    for length in LENGTHS:
        yield HEAD.replace(b": 15\r", b": %b\r" % length)
    borders = [at + 2 for at in range(len(HEAD)) if HEAD.startswith(b"\r\n", at)]
    for line in LINES:
        for at in borders:
            yield HEAD[:at] + line + HEAD[at:]
    for method in (b"HEAD", b"PUT", b"GET", b"OPTIONS", b"CONNECT"):
        yield HEAD.replace(b"POST", method)
    for version in (b"1.0", b"1.2", b"2.0"):
        yield HEAD.replace(b"/1.1", b"/" + version)


def parsed(data: bytes) -> tuple[RequestHead, int, int] | None:
    """By the parser alone: the head, its body's length, and where that begins; None when it is refused."""
    end = data.find(b"\r\n\r\n") + 4
    try:
        head = HeadReader(asyncio.Protocol()).read(data[:end])
        return head, body_length(head, BYTES_MAX), end
    except GatewayError:
        return None


def told(head: RequestHead) -> tuple[object, ...]:
    headers = [(name, value) for name, value in head.headers.items() if name.lower() != "content-length"]
    return head.method, head.target, head.path, headers, head.http10, head.keep_alive


async def test_a_repeated_head_is_what_the_parser_would_read() -> None:
    first = parsed(HEAD)
    assert first is not None
    repeated = RepeatedHead.of(first[0], HEAD)
    assert repeated is not None
    recognised = 0
    for data in (HEAD, *mutants()):
        length, at = repeated.match(data + BODY)
        if 0 < length <= BYTES_MAX:
            recognised += 1
            read = parsed(data + BODY)
            assert read is not None, data
            assert (told(repeated.head), length, at) == (told(read[0]), read[1], read[2]), data
    assert recognised > len(LENGTHS) // 4


@pytest.mark.parametrize(
    "data",
    [
        HEAD.replace(b"POST", b"HEAD"),  # whose answer has no body
        HEAD.replace(b"1.1", b"1.0"),
        HEAD.replace(b"Host", b"Connection: close\r\nHost"),
        HEAD.replace(b"Host", b"Expect: 100-continue\r\nHost"),
        HEAD.replace(b"Content-Length: 15", b"Transfer-Encoding: chunked"),
        HEAD.replace(b"Content-Length: 15", b"Content-Length:15"),
        HEAD.replace(b"Content-Length: 15", b"Content-Length: 15 "),
    ],
)
async def test_heads_that_ask_for_more_than_a_body_are_read_each_time(data: bytes) -> None:
    read = parsed(data)
    assert read is not None and RepeatedHead.of(read[0], data) is None


# Chunks.


def dechunked(pieces: list[bytes]) -> tuple[bytes, bytes, bool] | None:
    dechunker = Dechunker()
    payload = after = b""
    try:
        for piece in pieces:
            if dechunker.done:
                after += piece
            else:
                payload += dechunker.feed(piece)
    except FramingError:
        return None
    return payload, dechunker.rest + after, dechunker.done


@settings(max_examples=300, deadline=None)
@given(
    chunks=st.lists(st.sampled_from([b"a", b"ab", b"\r\n", b"a\r\nb", b"5\r\nhello", b"x" * 40, b"0\r\n\r\n"]), max_size=14),
    end=st.sampled_from([b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"00\r\n\r\n", b""]),
    cuts=st.lists(st.integers(0, 300), max_size=6),
)
def test_framing_weighs_alike_however_it_is_cut(chunks: list[bytes], end: bytes, cuts: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(framing, "CHUNK_OVERHEAD_BYTES_MAX", 40)
        coded = [b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks]
        data = b"".join(coded) + end
        at = sorted({cut for cut in cuts if 0 < cut < len(data)})
        by_bytes = dechunked([data[i : i + 1] for i in range(len(data))])
        assert dechunked([data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]) == by_bytes
        assert dechunked([*coded, end]) == dechunked([data]) == by_bytes
        for body in (data, data + b"more", data[:-1], data[1:]):
            at_once = whole_chunks(body)
            assert at_once is None or dechunked([body]) == (b"".join(at_once), b"", True)


def test_the_last_chunk_weighs_like_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "CHUNK_OVERHEAD_BYTES_MAX", 40)
    for count in range(1, 14):
        data = b"1\r\na\r\n" * count + b"0\r\n\r\n"
        ways = [[data], [data[i : i + 6] for i in range(0, len(data), 6)], [data[i : i + 1] for i in range(len(data))]]
        assert len({dechunked(way) for way in ways}) == 1, count


# Whole answers.

TEXTS = ["x", "m", "stop", '"id":"x"', '{"id":"x","model":"m"}', '"usage":null', '"finish_reason":"stop"', 'a\\","id":"x', "\u2028é"]
NESTED = st.recursive(
    st.sampled_from([*TEXTS, None, 5]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["id", "model", "usage", "finish_reason", "index", 'a"id', "z"]), inner, max_size=4)
    ),
    max_leaves=6,
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["assistant", "assistant", None]), "content": st.sampled_from([*TEXTS, None])},
    optional={
        "tool_calls": st.lists(NESTED, max_size=2) | st.none(),
        "annotations": st.lists(NESTED, max_size=2),
        **dict.fromkeys(("reasoning_details", "refusal", "reasoning", "audio", "id", "model", "usage", "finish_reason"), NESTED),
    },
)
CHOICES = st.fixed_dictionaries(
    {
        "index": st.just(0),
        "finish_reason": st.sampled_from(["stop", "length", "tool_calls", "error", None]),
        "message": MESSAGES,
    },
    optional=dict.fromkeys(("logprobs", "id", "model", "usage", "z"), NESTED),
)
COUNTS = st.sampled_from([None, {"prompt_tokens": 1, "completion_tokens": 2}, {"id": "x", "model": "m", "finish_reason": "stop"}])
ANSWERS = st.fixed_dictionaries(
    {
        "id": st.sampled_from(["x", "y", 'a"b']),
        "model": st.sampled_from(["m", "x"]),
        "choices": st.lists(CHOICES, min_size=1, max_size=1),
        "usage": COUNTS,
    },
    optional={**dict.fromkeys(("object", "system_fingerprint", "z", 'a"id'), NESTED), "provider": st.just("P")},
).flatmap(lambda fields: st.permutations(list(fields)).map(lambda names: {name: fields[name] for name in names}))


def read(way: Callable[..., answer.Answer | None], body: bytes) -> tuple[object, ...] | None:
    """What the caller gets, and what is known of it; None: not this way."""
    try:
        found = way(body, GENERATION, MODEL, PROVIDER)
    except Exception as error:
        return (type(error),)
    if found is None:
        return None
    shown = json.loads(found.render(b'"ours"'), object_pairs_hook=_once)
    return shown, found.upstream_id, found.finish_reason, found.native_finish_reason, found.usage, found.content_bytes


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), pairs
    return dict(pairs)


@settings(max_examples=400, deadline=None)
@given(body=ANSWERS, ascii_only=st.booleans(), separators=st.sampled_from([(",", ":"), (", ", ": "), (",\n", " : ")]))
def test_members_exchanged_in_place_read_like_an_answer_put_together(
    body: dict[str, Any], ascii_only: bool, separators: tuple[str, str]
) -> None:
    data = json.dumps(body, ensure_ascii=ascii_only, separators=separators).encode()
    short = read(answer._exchanged, data)
    assert short is None or short == read(answer._rewritten, data)


@pytest.mark.parametrize("spaced", ["id", "model", "finish_reason", "usage"])
def test_an_answer_that_is_spaced_unevenly_stays_json(spaced: str) -> None:
    """Its only compact member of that name stands within `usage`, which is exchanged as a whole."""
    members = {"id": "x", "model": "m", "finish_reason": "stop", "usage": None}
    usage = json.dumps({spaced: members[spaced]}, separators=(",", ":"))
    choices = '[{"index":0,"message":{"role":"assistant","content":"a"},"finish_reason":"stop"}]'
    text = f'{{"id":"x","model":"m","choices":{choices},"usage":{usage}}}'
    text = text.replace(f'"{spaced}":', f'"{spaced}" :', 1) if spaced != "usage" else text
    shown = json.loads(answer.rewrite(text.encode(), GENERATION, MODEL, PROVIDER).render(b'"ours"'))
    assert (shown["id"], shown["model"], shown["usage"]) == (GENERATION, MODEL, "ours")


# Events.

EVENT = '{"id":"%s","object":"c","created":1,"model":"m","choices":[{"index":0,"delta":{%s},"finish_reason":%s}]%s}'
SAID = [
    "x",
    "y",
    "Hello",
    " ",
    "id",
    "m",
    "模型",
    "\\n",
    '\\"',
    "\\\\",
    "\\u00e9",
    "\x7f",
    "}",
    "data: ",
    "],",
    "\u2028",
    "[DONE]",
    "a",
    "content",
]
DELTAS = st.sampled_from(SAID).map('"content":"{}"'.format) | st.sampled_from(
    ["", '"content":null', '"role":"assistant","content":"x"', '"content":"x","logprobs":{"content":[{"token":"x"}]}',
     '"tool_calls":[{"id":"a","function":{"name":"x"}}]', '"reasoning":"x","content":"x"']
)  # fmt: skip
EVENTS = st.builds(
    lambda *parts: ("data: " + EVENT % parts + "\n\n").encode(),
    st.sampled_from(["a", "a", "a", "b", "x"]),
    DELTAS,
    st.sampled_from(["null", "null", "null", '"stop"', '""']),
    st.sampled_from(["", "", "", ',"usage":null', ',"usage":{"total_tokens":3}', ',"error":null', ',"x":1', ',"provider":"Q"',
                     ',"system_fingerprint":null', ',"system_fingerprint":"f"']),
)  # fmt: skip
BARE = b'data: {%b"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]%b}\n\n'
OTHERS = st.sampled_from(
    [b": c\n\n", b"data: {}\n\n", b"\n\n", b"data: 5\n\n", b'data: {"choices":[]}\n\n', BARE % (b"", b""), BARE % (b'"id":"a",', b""),
     BARE % (b"", b',"id":"a","model":"m"'), BARE % (b"", b',"model":"m"'), BARE % (b'"id":"a",', b',"model":"m"')]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(events=st.lists(EVENTS | EVENTS | EVENTS | OTHERS, max_size=9))
def test_one_event_in_a_block_reads_as_it_does_among_others(events: list[bytes]) -> None:
    stream = b"".join(events)
    expected = by_the_book(stream)
    whole, splicer = spliced([stream])
    assert outcome(whole, splicer) == expected
    single, splicer = spliced(events)
    assert (single, outcome(single, splicer)) == (whole, expected)
