"""Request bodies: what is understood, what is refused, and that it costs no more than its size."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.domain.errors import BadRequest
from gateway.wire.envelope import parse
from gateway.wire.media import MEDIA_TOKENS_MAX, UNKNOWN_TOKENS
from tests.decisions.bodies import MESSAGES, PLAIN, M, body_with, loads, refusal, sent
from tests.timing import again_if_untimely, in_time


def nested(levels: int) -> bytes:
    """A member whose deepest array stands at `levels`, the body's own object being the first."""
    return b'"z":' + b"[" * (levels - 1) + b"]" * (levels - 1)


NOT_JSON = "the body is not valid JSON"
NOT_OBJECT = "the body must be a JSON object"
NOT_UTF8 = "the body is not valid UTF-8"
TOO_DEEP = "the body is nested deeper than 128 levels"
REPEATS = "the body repeats a top-level key"

# INP-05. None: understood, and sent as it came.
BODIES: dict[str, tuple[bytes, str | None]] = {
    "nothing": (b"", NOT_JSON),
    "only spaces": (b"  \r\n", NOT_JSON),
    "null": (b"null", NOT_OBJECT),
    "true": (b"true", NOT_OBJECT),
    "number": (b"5", NOT_OBJECT),
    "string": (b'"model"', NOT_OBJECT),
    "array": (b"[" + PLAIN + b"]", NOT_OBJECT),
    "array of pairs": (b'[["model","a/b"]]', NOT_OBJECT),
    "no members": (b"{}", "model is required: a string such as author/name"),
    "byte order mark": (b"\xef\xbb\xbf" + PLAIN, NOT_JSON),
    "UTF-16": (PLAIN.decode().encode("utf-16"), NOT_UTF8),
    "UTF-16 without mark": (PLAIN.decode().encode("utf-16-le"), NOT_JSON),
    "trailing comma": (body_with(b'"z":1,'), NOT_JSON),
    "trailing brace": (PLAIN + b"}", NOT_JSON),
    "second object": (PLAIN + PLAIN, NOT_JSON),
    "trailing NUL": (PLAIN + b"\x00", NOT_JSON),
    "trailing word": (PLAIN + b" x", NOT_JSON),
    "trailing newline": (PLAIN + b"\r\n", None),
    "leading space": (b" \t\r\n" + PLAIN, None),
    "unfinished": (PLAIN[:-1], NOT_JSON),
    "unfinished string": (PLAIN[:-4], NOT_JSON),
    "comment": (body_with(b'"z":/* */1'), NOT_JSON),
    "single quotes": (b"{'model':'a/b'}", NOT_JSON),
    "bare key": (body_with(b"z:1"), NOT_JSON),
    "NaN": (body_with(b'"temperature":NaN'), NOT_JSON),
    "NaN within": (body_with(b'"z":[{"y":NaN}]'), NOT_JSON),
    "Infinity": (body_with(b'"temperature":Infinity'), NOT_JSON),
    "minus Infinity": (body_with(b'"z":-Infinity'), NOT_JSON),
    "1e999 where we act on it": (body_with(b'"temperature":1e999'), "temperature: Number out of range"),
    "1e999 elsewhere": (body_with(b'"z":1e999'), None),
    "minus zero": (body_with(b'"z":-0.0'), None),
    "leading zero": (body_with(b'"z":01'), NOT_JSON),
    "plus sign": (body_with(b'"z":+1'), NOT_JSON),
    "bare point": (body_with(b'"z":1.'), NOT_JSON),
    "no integer part": (body_with(b'"z":.5'), NOT_JSON),
    "bare exponent": (body_with(b'"z":1e'), NOT_JSON),
    "hexadecimal": (body_with(b'"z":0x1'), NOT_JSON),
    "5,000 digits where we act on them": (body_with(b'"max_tokens":' + b"9" * 5000), "max_tokens: Integer value out of range"),
    "5,000 digits elsewhere": (body_with(b'"z":' + b"9" * 5000), None),
    "5,000 decimals": (body_with(b'"temperature":0.' + b"1" * 5000), None),
    "2^53 + 1": (body_with(b'"z":9007199254740993'), None),
    "model twice": (b'{"model":"a/b",' + M + b"," + MESSAGES + b"}", REPEATS),
    "model twice, the same": (b"{" + M + b"," + M + b"," + MESSAGES + b"}", REPEATS),
    "model twice, escaped": (body_with(b'"mod\\u0065l":"c/d"'), REPEATS),
    "model twice, spaced": (b'{"model": "a/b", "model": "c/d", ' + MESSAGES + b"}", REPEATS),
    "model twice, pretty": (b'{\n  "model" : "a/b",\n  "model" : "c/d",\n  ' + MESSAGES + b"\n}", REPEATS),
    "messages twice": (body_with(MESSAGES), REPEATS),
    "a value that begins like the kept one": (b'{"max_tokens":12, "max_tokens":1,' + M + b"," + MESSAGES + b"}", REPEATS),
    "one that begins like it and goes on": (b'{"z":12 , "z":1,' + M + b"," + MESSAGES + b"}", REPEATS),
    "unknown key twice": (body_with(b'"z":1,"z":1'), REPEATS),
    "empty key twice": (body_with(b'"":1,"":2'), REPEATS),
    "key of another alphabet twice": (body_with('"ключ":1,"\\u043a\\u043b\\u044e\\u0447":2'.encode()), REPEATS),
    "keys alike but for case": (body_with(b'"Model":"c/d"'), None),
    "keys alike but for form": (body_with('"\u00e9":1,"e\u0301":2'.encode()), None),
    "a key within a string": (body_with(b'"z":"\\",\\"model\\":\\"c/d"'), None),
    "twice, but deeper": (body_with(b'"z":{"a":1,"a":2}'), None),
    "escaped keys once each": (body_with(b'"a\\"b":1, "a\\\\b" : 2'), None),
    "lone surrogate in the model": (b'{"model":"\\ud800",' + MESSAGES + b"}", NOT_JSON),
    "lone surrogate in the prompt": (b"{" + M + b',"messages":[{"role":"user","content":"\\udc00"}]}', NOT_JSON),
    "lone surrogate elsewhere": (body_with(b'"z":["\\ud800x"]'), NOT_JSON),
    "lone surrogate in a key": (body_with(b'"\\ud800":1'), NOT_JSON),
    "surrogate pair": (body_with(b'"z":"\\ud83d\\ude00"'), None),
    "surrogate as UTF-8": (body_with(b'"z":"\xed\xa0\x80"'), NOT_UTF8),
    "bad UTF-8 in the model": (b'{"model":"\xff",' + MESSAGES + b"}", NOT_UTF8),
    "bad UTF-8 elsewhere": (body_with(b'"z":[{"y":"\xc3("}]'), NOT_UTF8),
    "over-long UTF-8": (body_with(b'"z":"\xc0\xaf"'), NOT_UTF8),
    "half a character": (body_with(b'"z":"\xe4\xbd"'), NOT_UTF8),
    "bad UTF-8 in a key": (body_with(b'"\xff":1'), NOT_UTF8),
    "bare newline in a string": (body_with(b'"z":"a\nb"'), NOT_JSON),
    "NUL in a string": (body_with(b'"z":"\x00"'), NOT_JSON),
    "escaped NUL in a string": (body_with(b'"z":"\\u0000"'), None),
    "escape that is none": (body_with(b'"z":"\\x41"'), NOT_JSON),
    "no-break space": (body_with('"z":\u00a01'.encode()), NOT_JSON),
    "128 levels": (body_with(nested(128)), None),
    "129 levels": (body_with(nested(129)), TOO_DEEP),
    "129 levels, objects": (body_with(b'"z":' + b'{"a":' * 127 + b"{}" + b"}" * 127), TOO_DEEP),
    "128 levels, objects": (body_with(b'"z":' + b'{"a":' * 126 + b"{}" + b"}" * 126), None),
    "250 levels, mixed": (body_with(b'"z":' + b'[{"a":' * 124 + b"1" + b"}]" * 124), TOO_DEEP),
    "128 levels, mixed": (body_with(b'"z":' + b'[{"a":' * 63 + b"[]" + b"}]" * 63), None),
    "100,000 levels": (body_with(nested(100_000)), TOO_DEEP),
    "100,000 levels, not closed": (b"{" + M + b',"z":' + b"[" * 100_000, TOO_DEEP),
    "100,000 levels, objects": (b'{"z":' * 100_000, TOO_DEEP),
    "brackets in a string": (body_with(b'"z":"' + b"[{" * 100_000 + b'"'), None),
    "brackets in strings with escapes": (body_with(b'"z":["\\\\",' + b'"\\"[[[\\\\\\"{{{\\\\",' * 500 + b'"\\\\\\\\"]'), None),
    "depth hidden between strings": (body_with(b'"z":' + b'["\\"]]]]\\\\",' * 127 + b"[]" + b"]" * 127), TOO_DEEP),
    "1,024 keys": (body_with(b",".join([b'"%d":1' % i for i in range(1022)])), None),
    "1,025 keys": (body_with(b",".join([b'"%d":1' % i for i in range(1023)])), "the body has more than 1024 top-level keys"),
    "many, but side by side": (body_with(b'"z":[' + b"[[]]," * 10_000 + b"[]]"), None),
}


@pytest.mark.parametrize("name", BODIES)
def test_inp_05_json_means_one_thing(name: str) -> None:
    body, message = BODIES[name]
    if message is not None:
        assert refusal(body) == message
        return
    envelope = parse(body, "chat")
    assert envelope.model == "acme/sage-1"
    expected = loads(body)
    expected["model"] = "sage-1"
    assert sent(body) == expected


@settings(max_examples=200, deadline=None)
@given(
    names=st.lists(st.sampled_from(["model", "messages", "a", "b", "", 'q"', "\\", "é", "max_tokens"]), max_size=7),
    values=st.lists(st.sampled_from(["1", "12", '"a/b"', '"x"', "[]", '", "a": 1', "null"]), min_size=7, max_size=7),
    comma=st.sampled_from([",", ", ", " ,\n"]),
    colon=st.sampled_from([":", ": ", " :\t"]),
    ascii_keys=st.booleans(),
)
def test_a_repeated_key_is_refused_and_only_that(names: list[str], values: list[str], comma: str, colon: str, ascii_keys: bool) -> None:
    values = [value if value != '", "a": 1' else json.dumps(value) for value in values]
    members = [f"{json.dumps(name, ensure_ascii=ascii_keys)}{colon}{value}" for name, value in zip(names, values, strict=False)]
    body = ("{" + comma.join(members) + "}").encode()
    try:
        parse(body, "chat")
        message = ""
    except BadRequest as refused:
        message = refused.message
    assert (message == REPEATS) == (len(set(names)) < len(names))


@settings(max_examples=150, deadline=None)
@given(body=st.binary(max_size=60) | st.text(alphabet='{}[]",:\\u0d8 model1eE+-.', max_size=60).map(str.encode))
def test_inp_12_noise_is_a_bad_request_and_nothing_worse(body: bytes) -> None:
    for kind in ("chat", "text"):
        with contextlib.suppress(BadRequest):
            parse(body, kind)


@settings(max_examples=100, deadline=None)
@given(
    value=st.recursive(
        st.none() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    )
)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_unknown_members_pass_byte_for_byte(value: object, separators: tuple[str, str]) -> None:
    raw = json.dumps(value, separators=separators).encode()
    found: dict[str, msgspec.Raw] = msgspec.json.decode(parse(body_with(b'"z": ' + raw), "chat").body_for("m"), type=dict[str, msgspec.Raw])
    assert bytes(found["z"]) == raw
    assert bytes(found["messages"]) == MESSAGES.partition(b":")[2]


@pytest.mark.parametrize(
    "value", [b"1e999", b"9" * 5000, b"0.10000000000000000001", b'{"a":1,"a":2}', b"[ 1 , 2 ]", b'"\\u0041"', b"-0.0", b"1E5"]
)
def test_unknown_values_are_not_rewritten(value: bytes) -> None:
    assert b'"z":' + value + b"}" in parse(body_with(b'"z":' + value), "chat").body_for("m")


# What is understood.


def test_models_are_tried_in_order_and_once() -> None:
    envelope = parse(body_with(b'"models":["c/d","acme/sage-1","e/f","c/d"]'), "chat")
    assert (envelope.model, envelope.models) == ("acme/sage-1", ("c/d", "e/f"))
    envelope = parse(b'{"models":["c/d","e/f"],' + MESSAGES + b"}", "chat")
    assert (envelope.model, envelope.models) == ("c/d", ("e/f",))


@pytest.mark.parametrize(
    ("members", "tokens"),
    [
        (b'"z":1', None),
        (b'"max_tokens":5', 5),
        (b'"max_completion_tokens":7', 7),
        (b'"max_tokens":null,"max_completion_tokens":7', 7),
        (b'"max_tokens":9,"max_completion_tokens":7', 9),  # a provider that knows only one of them may make so many
        (b'"max_tokens":2147483647', 2147483647),
    ],
)
def test_max_tokens_is_the_most_that_any_provider_may_make_of_it(members: bytes, tokens: int | None) -> None:
    assert parse(body_with(members), "chat").max_tokens == tokens


def test_reasoning_is_noticed() -> None:
    assert not parse(PLAIN, "chat").reasoning
    assert parse(body_with(b'"reasoning":{"effort":"high"}'), "chat").reasoning
    assert parse(body_with(b'"reasoning_effort":"low"'), "chat").reasoning


IMAGE = "data:image/png;base64," + "iVBORw0KGgo" * 1000


@pytest.mark.parametrize(
    ("messages", "text_bytes", "images"),
    [
        ([{"role": "user", "content": "hello"}], 5, 0),
        ([{"role": "system", "content": "é€😀"}, {"role": "user", "content": "a"}], 10, 0),
        ([{"role": "assistant", "content": None}, {"role": "user"}], 0, 0),
        ([{"role": "user", "content": [{"type": "text", "text": "ab"}, {"type": "image_url", "image_url": {"url": IMAGE}}]}], 2, 1),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a/b.png"}}] * 3}], 0, 3),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x" * 900, "format": "wav"}}]}], 0, 0),
        ([{"role": "user", "content": []}], 0, 0),
        ([{"role": "user", "content": [{"type": "text", "text": None}, {"type": "text"}]}], 0, 0),
        ([{"role": "user", "content": "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")}], 4, 0),
    ],
)
def test_the_prompt_is_counted_in_bytes_of_text_and_data_urls_are_images(
    messages: list[dict[str, Any]], text_bytes: int, images: int
) -> None:
    for ascii_only in (True, False):
        envelope = parse(json.dumps({"model": "a/b", "messages": messages}, ensure_ascii=ascii_only).encode(), "chat")
        assert (envelope.prompt_text_bytes, envelope.images, envelope.messages) == (text_bytes, images, len(messages))


TEXT = "x" * 1000


@pytest.mark.parametrize(
    "beside",
    [
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": TEXT}}]}],
        [{"role": "assistant", "content": "", "reasoning_content": TEXT}],
        [{"role": "user", "content": "", "name": TEXT}],
        [{"role": "user", "content": [{"type": "input_text", "text": TEXT}]}],
        [{"role": "user", "content": [{"type": "thinking", "thinking": TEXT}]}],
    ],
)
def test_an_image_hides_no_text_from_the_hold(beside: list[dict[str, Any]]) -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}]}
    alone, together = (parse(json.dumps({"model": "a/b", "messages": each}).encode(), "chat") for each in ([image], [image, *beside]))
    assert alone.prompt_bytes_max < MEDIA_TOKENS_MAX + 200
    assert together.prompt_bytes_max >= alone.prompt_bytes_max + len(TEXT)


DATA = "data:application/pdf;base64," + "A" * 20_000


@pytest.mark.parametrize(
    "part",
    [
        {"type": "file", "file": {"filename": "a.pdf", "file_data": DATA}},
        {"type": "input_audio", "input_audio": {"data": "A" * 20_000, "format": "wav"}},
        {"type": "video_url", "video_url": {"url": DATA.replace("application/pdf", "video/mp4")}},
    ],
)
def test_a_file_that_is_here_is_held_for_by_its_bytes(part: dict[str, Any]) -> None:
    body = json.dumps({"model": "a/b", "messages": [{"role": "user", "content": [part]}]}).encode()
    assert 20_000 < parse(body, "chat").prompt_bytes_max < len(body)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "https://example.com/a.pdf"}},
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "video_url", "video_url": {"url": "https://example.com/a.mp4"}},
    ],
)
def test_what_is_only_referred_to_may_be_as_long_as_any_prompt(part: dict[str, Any]) -> None:
    body = json.dumps({"model": "a/b", "messages": [{"role": "user", "content": [part]}]}).encode()
    assert parse(body, "chat").prompt_bytes_max >= UNKNOWN_TOKENS


@pytest.mark.parametrize(
    ("prompt", "text_bytes"), [(b'"hello"', 5), (b'"\\u00e9"', 2), (b'["abcd"]', 8), (b"[1,2,3]", 7), (b"[[1,2]]", 7), (b'""', 0)]
)
def test_a_legacy_prompt_is_text_or_a_list(prompt: bytes, text_bytes: int) -> None:
    assert parse(b"{" + M + b',"prompt":' + prompt + b"}", "text").prompt_text_bytes == text_bytes


@pytest.mark.parametrize("prompt", [b"null", b"5", b"{}", b'[{"a":1}]', b"[1.5]", b"[null]"])
def test_a_legacy_prompt_of_another_shape_is_refused(prompt: bytes) -> None:
    assert refusal(b"{" + M + b',"prompt":' + prompt + b"}", "text").startswith("prompt")


@pytest.mark.parametrize("prompt", [b'["ab","cd"]', b"[[1],[2]]", b'["a",1]', b'["",""]'])
def test_several_prompts_at_once_are_refused(prompt: bytes) -> None:
    """Each is an answer of its own, as long as `max_tokens` allows, where credit is held for one."""
    assert refusal(b"{" + M + b',"prompt":' + prompt + b"}", "text").startswith("prompt: one a request")


def test_a_field_that_we_do_not_know_counts_as_prompt() -> None:
    functions = b'[{"name":"f","description":"' + b"x" * 1000 + b'"}]'
    plain, more = (parse(b"{" + M + b"," + MESSAGES + rest + b"}", "chat") for rest in (b"", b',"functions":' + functions))
    assert more.prompt_bytes_max == plain.prompt_bytes_max + len(functions)
    assert more.prompt_text_bytes == plain.prompt_text_bytes


def test_a_tier_of_service_stays_here() -> None:
    """Its price would be another than the one that is charged."""
    assert b"service_tier" not in parse(b"{" + M + b"," + MESSAGES + b',"service_tier":"priority"}', "chat").body_for("m")


def test_a_prompt_is_required() -> None:
    assert refusal(b"{" + M + b"}", "chat").startswith("messages is required")
    assert refusal(b"{" + M + b"," + MESSAGES + b"}", "text").startswith("prompt is required")
    assert parse(b"{" + M + b',"prompt":"hello"}', "chat").prompt_text_bytes == 5


# Speed, in relation to a full parse of the same bytes.


def seconds(call: Callable[[], object]) -> float:
    best = 1e9
    for _ in range(7):
        started = time.process_time()
        call()
        best = min(best, time.process_time() - started)
    return best


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_a_large_image_costs_less_than_a_full_parse(separators: tuple[str, str]) -> None:
    content = [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * (5 << 20)}},
    ]
    body = json.dumps({"model": "a/b", "messages": [{"role": "user", "content": content}]}, separators=separators).encode()
    assert seconds(lambda: parse(body, "chat").body_for("m")) < 3 * seconds(lambda: orjson.loads(body))


HOSTILE = {
    "escaped quotes without end": b"[" * 200 + b'"' + b'\\"' * 500_000,
    "backslashes": b"[" * 200 + b'"' + b"\\\\" * 500_000,
    "flat arrays": b"{" + M + b"," + MESSAGES + b',"z":[' + b"[]," * 300_000 + b"[]]}",
    "groups of 120 levels": b"{" + M + b"," + MESSAGES + b',"z":[' + (b"[" * 120 + b"]" * 120 + b",") * 4_000 + b"[]]}",
    "a huge key": b'{ "' + b"k" * 1_000_000 + b'":1}',
    "a huge escaped key": b'{ "' + b"\\n" * 500_000 + b'":1}',
    "spaces": b"{" + b" " * 1_000_000 + b"}",
    "many keys": b"{ " + b",".join([b'"%d":1' % i for i in range(100_000)]) + b"}",
}


@pytest.mark.parametrize("name", HOSTILE)
@again_if_untimely
def test_hostile_bodies_cost_no_more_than_their_size(name: str) -> None:
    body = HOSTILE[name]

    def read() -> None:
        with contextlib.suppress(BadRequest):
            parse(body, "chat")

    started = time.process_time()
    read()
    in_time(time.process_time() - started, 0.5)
