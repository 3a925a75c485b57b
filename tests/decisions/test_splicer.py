"""Events of real providers, as they write them: always in our name, exactly counted, whatever shape and however cut."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from gateway.wire.completion import normal_finish
from gateway.wire.shape import Shape
from gateway.wire.sse import Splicer
from tests.decisions.shapes import OPENAI, SHAPES
from tests.decisions.streams import GENERATION, MODEL, PROVIDER, by_the_book, byte_by_byte, outcome, parsed, spliced
from tests.timing import again_if_untimely, in_time


def stream_of(lines: list[str]) -> bytes:
    return "".join(f"{line}\n\n" if line.startswith(":") else f"data: {line}\n\n" for line in lines).encode()


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_leaves_in_our_name_and_exactly_counted(name: str) -> None:
    shape = SHAPES[name]
    stream = stream_of(shape.lines)
    whole, splicer = spliced([stream])
    assert splicer.content_events == shape.content_events
    assert splicer.finish_reason == shape.finish_reason
    assert splicer.upstream_id == shape.upstream_id
    assert (splicer.usage is None) == (shape.total_tokens is None)
    if splicer.usage is not None:
        assert json.loads(splicer.usage)["total_tokens"] == shape.total_tokens
    if normal_finish(shape.finish_reason) == "error":  # the provider gave up: nothing passes from there on
        assert json.loads(splicer.error or b"{}") == {"message": f"finish_reason: {shape.finish_reason}"}
        assert (splicer.done, splicer.dropped) == (False, 0)
        assert not any(json.loads(event.data)["choices"][0].get("finish_reason") for event in parsed(whole))
        return
    assert (splicer.done, splicer.dropped, splicer.error) == (shape.lines[-1] == "[DONE]", 0, None)
    chunks = [json.loads(event.data) for event in parsed(whole)]
    assert {(chunk["id"], chunk["model"], chunk["provider"]) for chunk in chunks} == {(GENERATION, MODEL, PROVIDER)}
    usage_only = [line for line in shape.lines if ('"choices":[]' in line or '"choices":null' in line) and '"usage":{' in line]
    assert len(chunks) == len([line for line in shape.lines if line.startswith("{") and line not in usage_only])
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_by_the_book_however_it_comes(name: str) -> None:
    lines = SHAPES[name].lines
    stream = stream_of(lines)
    expected = by_the_book(stream)
    whole, splicer = spliced([stream])
    assert outcome(whole, splicer) == expected
    for pieces in (byte_by_byte(stream), [stream_of([line]) for line in lines], [stream_of(lines[:2]), stream_of(lines[2:])]):
        sent, splicer = spliced(pieces)
        assert sent == whole
        assert outcome(sent, splicer) == expected
    for ends in (b"\r\n", b"\r"):
        assert spliced([stream.replace(b"\n", ends)])[0] == whole


@pytest.mark.parametrize("name", SHAPES)
def test_no_key_stands_twice(name: str) -> None:
    for event in parsed(spliced([stream_of(SHAPES[name].lines)])[0]):
        json.loads(event.data, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), pairs
    return dict(pairs)


def test_extras_of_providers_pass_on() -> None:
    for name, extra in (
        ("groq", "x_groq"), ("llama.cpp", "timings"), ("azure", "prompt_filter_results"), ("openai", "obfuscation"),
        ("cerebras", "time_info"), ("mistral, which thinks in parts", "p"), ("azure, filter beside the stream", "service_tier"),
    ):  # fmt: skip
        before = [json.loads(line).get(extra) for line in SHAPES[name].lines if line[0] == "{"]
        sent, splicer = spliced([stream_of(SHAPES[name].lines)])
        after = [json.loads(event.data).get(extra) for event in parsed(sent + splicer.final_event(b"{}"))]
        assert [value for value in after if value is not None] == [value for value in before if value is not None], name


def test_calls_that_gemini_does_not_number_are_numbered_and_end_as_calls() -> None:
    sent, splicer = spliced([stream_of(SHAPES["gemini, calls without a number"].lines)])
    choices = [json.loads(event.data)["choices"][0] for event in parsed(sent)]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
    assert [(call["index"], call["function"].get("name"), call["function"]["arguments"]) for call in calls] == [
        (0, "look", '{"city":'), (0, None, '"Oslo"}'), (1, "look", "{}"), (2, "listen", "{}"),
    ]  # fmt: skip
    assert calls[0]["extra_content"] == {"google": {"thought_signature": "Eo4="}}
    assert (choices[-1]["finish_reason"], choices[-1]["native_finish_reason"], splicer.finish_reason) == ("tool_calls", "stop", "stop")


@pytest.mark.parametrize("name", SHAPES)
def test_the_final_event_is_ours_and_carries_usage(name: str) -> None:
    _, splicer = spliced([stream_of(SHAPES[name].lines)])
    (event,) = parsed(splicer.final_event(b'{"total_tokens":3,"cost":0.1}'))
    chunk = json.loads(event.data, object_pairs_hook=_once)
    assert (chunk["id"], chunk["model"], chunk["provider"]) == (GENERATION, MODEL, PROVIDER)
    assert (chunk["choices"], chunk["usage"]) == ([], {"total_tokens": 3, "cost": 0.1})
    first = json.loads(SHAPES[name].lines[-2] if name == "azure" else next(line for line in SHAPES[name].lines if line[0] == "{"))
    assert {"object", "created"} & set(first) <= set(chunk)
    assert chunk.get("object") in (first.get("object"), "chat.completion.chunk")
    assert chunk.get("error", chunk.get("system_fingerprint", "")) is not None


def test_the_common_event_is_exchanged_in_one_run_of_bytes() -> None:
    _, *content, _, _, _ = [stream_of([line]) for line in OPENAI.lines]
    splicer = Splicer(GENERATION, MODEL, PROVIDER, Shape())
    splicer.splice(stream_of(OPENAI.lines[:1]))
    for block in content:
        assert splicer.splice(block).endswith(block.partition(b'"choices"')[2].replace(b',"usage":null', b""))


CHUNK = '{"id":"a","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":%s,"finish_reason":null}]}'

# Events of plain text pass in runs; what ends a run must not be mistaken for one of it.
NOT_PLAIN = [
    CHUNK % '{"content":""}',
    CHUNK % '{"content":"a\\nb"}',
    CHUNK % '{"content":"say \\"hi\\""}',
    CHUNK % '{"content":"\\\\"}',
    CHUNK % '{"content":"x","role":"assistant"}',
    (CHUNK % '{"content":"x"}').replace("null", '"stop"'),
    (CHUNK % '{"content":"x"}').replace('"a"', '"b"'),
    (CHUNK % '{"content":"x"}').replace('"created":1', '"created":2'),
    (CHUNK % '{"content":"x"}')[:-1] + ',"usage":{"total_tokens":3}}',
    (CHUNK % '{"content":"x"}')[:-1] + ',"error":null}',
    (CHUNK % '{"content":"x"}') + " ",
    (CHUNK % '{"content":"x"}')[:-1],
    (CHUNK % '{"content":"x"}').replace(":", ": "),
    CHUNK % '{"content":"\x01"}',
    CHUNK % '{"content":"\x7f\u2028模型"}',
    ": a comment",
    "5",
]


@pytest.mark.parametrize("other", NOT_PLAIN)
@pytest.mark.parametrize("plain", ["x", "模型", " data: {", "}", "\x7f"])
def test_runs_of_plain_text_end_where_something_else_begins(other: str, plain: str) -> None:
    texts = [CHUNK % f'{{"content":"{plain}"}}', CHUNK % '{"content":"y"}']
    for lines in ([*texts, other, *texts], [texts[0], other, other, *texts * 2, other], [other, *texts, other], [*texts * 3, other]):
        stream = stream_of(lines)
        expected = by_the_book(stream)
        assert outcome(*spliced([stream])) == expected
        assert outcome(*spliced([stream_of([line]) for line in lines])) == expected
        assert outcome(*spliced([stream_of(lines[:1]), stream_of(lines[1:])])) == expected


def test_bytes_that_are_not_utf8_end_a_run() -> None:
    good = stream_of([CHUNK % '{"content":"x"}'])
    for bad in (b"\xff", b"\xe6\xa8", b"\xa8"):
        stream = good * 3 + good.replace(b'"x"', b'"' + bad + b'"') + good * 2
        for pieces in ([stream], [good, stream[len(good) :]], byte_by_byte(stream)):
            sent, splicer = spliced(pieces)
            assert (len(parsed(sent)), splicer.content_events, splicer.dropped) == (5, 5, 1)
            sent.decode()


@pytest.mark.parametrize("others", [1, 2, 10, 1000])
@again_if_untimely
def test_a_long_block_of_changing_events_costs_no_more_than_its_length(others: int) -> None:
    plain, other = stream_of([CHUNK % '{"content":"word"}']), stream_of([CHUNK % '{"content":"x","role":"assistant"}'])
    escaped = stream_of([CHUNK % '{"content":"\\n"}'])
    for ending in (other, escaped):
        block = (plain * others + ending) * (2000 // (others + 1) + 1)
        splicer = Splicer(GENERATION, MODEL, PROVIDER, Shape())
        splicer.splice(plain)
        started = time.process_time()
        splicer.splice(block)
        in_time(time.process_time() - started, 0.15)  # 2,000 events decoded one by one take 5 ms
        assert splicer.content_events == block.count(b"\n\n") + 1


@pytest.mark.parametrize(
    ("delta", "adds"),
    [
        ("{}", False), ("null", False), ('{"role":"assistant"}', False), ('{"content":""}', False), ('{"content":null}', False),
        ('{"content":[]}', False), ('{"content":"x"}', True), ('{"content":[{"type":"text","text":"x"}]}', True), ('{"content":" "}', True),
        ('{"reasoning":"x"}', True), ('{"reasoning":""}', False), ('{"reasoning_content":"x","content":null}', True),
        ('{"reasoning_details":[{"type":"reasoning.encrypted","data":"x"}]}', True), ('{"reasoning_details":[]}', False),
        ('{"tool_calls":[{"index":0}]}', True), ('{"tool_calls":[]}', False), ('{"tool_calls":null}', False),
        ('{"function_call":{"name":"f"}}', True), ('{"function_call":null}', False), ('{"refusal":"no"}', True),
        ('{"refusal":null}', False),
        ('{"images":[{"type":"image_url"}]}', True), ('{"audio":{"id":"x"}}', True), ('{"audio":null}', False),
        ('{"annotations":[{"type":"url_citation","url_citation":{"content":"x"}}]}', False), ('{"content":"\\u0000"}', True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("learned", [False, True])
def test_what_counts_as_output(delta: str, adds: bool, learned: bool) -> None:
    splicer = Splicer(GENERATION, MODEL, PROVIDER, Shape())
    if learned:
        splicer.splice(stream_of([CHUNK % '{"content":"x"}', CHUNK % '{"content":"y"}']))
    before = splicer.content_events
    assert splicer.splice(stream_of([CHUNK % delta]))
    assert splicer.content_events - before == adds


@pytest.mark.parametrize(
    "odd",
    [
        CHUNK % '{"content":5}',
        CHUNK % '{"content":"x","tool_calls":{}}',
        CHUNK % '"x"',
        '{"id":{"a":1},"model":5,"choices":[{"index":"0","delta":{"content":"x"},"finish_reason":7}]}',
        '{"id":1.5,"choices":{"index":0}}',
        '{"choices":[5, 6]}',
    ],
)
@pytest.mark.parametrize("learned", [False, True])
def test_an_object_of_unusual_types_passes_and_counts(odd: str, learned: bool) -> None:
    splicer = Splicer(GENERATION, MODEL, PROVIDER, Shape())
    if learned:
        splicer.splice(stream_of([CHUNK % '{"content":"x"}']))
    before = splicer.content_events
    (event,) = parsed(splicer.splice(stream_of([odd])))
    added = {"object": "chat.completion.chunk", "created": int(GENERATION.split("-")[1])}
    expected = {**added, **json.loads(odd), "id": GENERATION, "model": MODEL, "provider": PROVIDER}
    assert json.loads(event.data) == expected
    assert (splicer.content_events - before, splicer.dropped) == (1, 0)


@pytest.mark.parametrize(
    ("member", "object_"),
    [('"delta":{"content":"%s"}', "chat.completion.chunk"), ('"text":"%s"', "text_completion")],
)
@pytest.mark.parametrize(
    "told", ["", '"object":null,"created":null,', '"object":"","created":1.5,', '"object":"chat.completion","created":"1",']
)
def test_every_event_has_an_object_and_a_time_whatever_the_provider_says(told: str, member: str, object_: str) -> None:
    event = '{"id":"up-1",%s"model":"m","choices":[{"index":0,%s,"finish_reason":%s}]}'
    lines = [event % (told, member % text, "null") for text in "abc"] + [event % (told, member % "", '"stop"'), "[DONE]"]
    sent, splicer = spliced([stream_of(lines)])
    events = [json.loads(each.data) for each in parsed(sent + splicer.final_event(b'{"total_tokens":5}'))]
    assert len(events) == 5
    assert {(each["object"], each["created"]) for each in events} == {(object_, int(GENERATION.split("-")[1]))}


def test_an_unusual_event_still_brings_usage_and_errors() -> None:
    splicer = Splicer(GENERATION, MODEL, PROVIDER, Shape())
    splicer.splice(stream_of(['{"choices":[5],"usage":{"total_tokens":3}}', '{"choices":[5],"error":{"code":500}}', CHUNK % "{}"]))
    assert (splicer.usage, splicer.error) == (b'{"total_tokens":3}', b'{"code":500}')


NO_EVENT = [
    b"null", b"5", b'"text"', b"[]", b"[1]", b"true", b"", b" ", b"{", b'{"id":"a"', b'{"id":"a"}}', b"NaN", b'{"a":NaN}', b"{'a':1}",
    b"[DONE", b"DONE", b'{"a":"\xff"}', b'{"\xc3":1}', b'{"a":"\n"}', b"{" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("data", NO_EVENT)
@pytest.mark.parametrize("alone", [True, False])
def test_what_is_no_object_is_dropped_and_counted(data: bytes, alone: bool) -> None:
    bad = b"data: " + data.replace(b"\n", b"\ndata: ") + b"\n\n"
    good = [stream_of([CHUNK % '{"content":"x"}'])] * 3
    splicer = Splicer(GENERATION, MODEL, PROVIDER, Shape())
    pieces = [good[0], bad, *good[1:]] if alone else [b"".join((good[0], bad, *good[1:]))]
    sent = b"".join(map(splicer.splice, pieces))
    assert len(parsed(sent)) == 3
    assert (splicer.content_events, splicer.dropped) == (3, 1)


@pytest.mark.parametrize("error", ['{"message":"down","code":503}', '"down"', '{"code":"x"}', "true", "1", '["x"]'])
@pytest.mark.parametrize("together", [True, False])
def test_nothing_passes_after_an_error(error: str, together: bool) -> None:
    lines = [CHUNK % '{"content":"a"}', f'{{"id":"a","error":{error}}}', CHUNK % '{"content":"b"}', "[DONE]"]
    splicer = Splicer(GENERATION, MODEL, PROVIDER, Shape())
    blocks = [stream_of(lines)] if together else [stream_of([line]) for line in lines]
    sent = b"".join(map(splicer.splice, blocks))
    assert [json.loads(event.data)["choices"][0]["delta"]["content"] for event in parsed(sent)] == ["a"]
    assert (splicer.error, splicer.content_events, splicer.done) == (error.encode(), 1, False)


@pytest.mark.parametrize("none", ["null", "false", "{}", '""', "[]"])
def test_an_error_that_is_none_is_left_out(none: str) -> None:
    lines = [CHUNK[:-1] % '{"content":"a"}' + f',"error":{none}}}'] * 2
    sent, splicer = spliced([stream_of(lines)])
    assert ["error" in json.loads(event.data) for event in parsed(sent)] == [False, False]
    assert (splicer.error, splicer.content_events) == (None, 2)


@pytest.mark.parametrize("done", ["data: [DONE]", "data:[DONE]", "data: [DONE] ", "event: done\ndata: [DONE]", ": c\ndata: [DONE]"])
def test_nothing_passes_after_done(done: str) -> None:
    block = stream_of([CHUNK % '{"content":"a"}']) + done.encode() + b"\n\n" + stream_of([CHUNK % '{"content":"b"}'])
    for pieces in ([block], byte_by_byte(block)):
        sent, splicer = spliced(pieces)
        assert len(parsed(sent)) == 1 and b"DONE" not in sent
        assert (splicer.done, splicer.content_events, splicer.dropped) == (True, 1, 0)


# An emoji cut in two.


@pytest.mark.parametrize("high", ["\\ud83d", "\\uD83D"])
@pytest.mark.parametrize("learned", [False, True])
def test_half_a_surrogate_pair_passes(high: str, learned: bool) -> None:
    splicer = Splicer(GENERATION, MODEL, PROVIDER, Shape())
    if learned:
        splicer.splice(stream_of([CHUNK % '{"content":"x"}']))
    lines = [CHUNK % f'{{"content":"a{high}"}}', CHUNK % '{"content":"\\ude00 \\\\ud800 \\ud83d\\ude00"}']
    sent = splicer.splice(stream_of(lines))
    texts = [json.loads(event.data)["choices"][0]["delta"]["content"] for event in parsed(sent)]
    assert "".join(texts).encode("utf-16", "surrogatepass").decode("utf-16") == "a😀 \\ud800 😀"
    assert splicer.dropped == 0


# INP-09: text cannot become an event.

FORGERIES = [
    "\n\ndata: {\"forged\":1}\n\n",
    "\r\n\r\ndata: [DONE]\r\n\r\n",
    "\rdata: x\r\r",
    "\u2028\u2028data: x\u2028\u2029",
    "\x85\x0b\x0cdata: x",
    '"}\n\ndata: {"id":"x"}',
    'a","model":"b',
    "id: 5\nretry: 1\nevent: error",
    "\ufeffdata: x",
    "\x00\n\n",
]  # fmt: skip


@pytest.mark.parametrize("text", FORGERIES)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_inp_09_text_cannot_forge_events(text: str, ascii_only: bool) -> None:
    def line(content: str, finish: str | None = None) -> str:
        choices = [{"index": 0, "delta": {"content": content}, "finish_reason": finish}]
        return json.dumps(
            {"id": text, "object": "c", "created": 1, "model": text, "x": {text: text}, "choices": choices}, ensure_ascii=ascii_only
        )

    stream = stream_of([line(text), line(text), line("x"), line(text, text), "[DONE]"])
    for pieces in ([stream], byte_by_byte(stream)):
        sent, splicer = spliced(pieces, model=text, provider=text)
        events = parsed(sent)
        assert [event.type for event in events] == ["message"] * 4
        chunks = [json.loads(event.data) for event in events]
        assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == [text, text, "x", text]
        assert {(chunk["id"], chunk["model"], chunk["provider"]) for chunk in chunks} == {(GENERATION, text, text)}
        assert chunks[3]["choices"][0] == {
            "index": 0, "delta": {"content": text}, "finish_reason": "stop", "native_finish_reason": text,
        }  # fmt: skip
        assert splicer.content_events == 4
        assert not {len(part) for part in sent.split(b"\n\n")[:-1]} & {0}
        assert b"\r" not in sent and sent.count(b"\n") == 8


@pytest.mark.parametrize("line", [b": \xff", b"event: \xc3", b"id: \x80a", b"retry: \xfe"])
def test_a_line_that_no_client_could_decode_is_left_out(line: bytes) -> None:
    """Clients decode all lines, those that they skip as well."""
    event = stream_of(OPENAI.lines[:1])
    for stream in (line + b"\n\n" + event, line + b"\n" + event, ": ä\n".encode() + line + b"\n" + event):
        sent, splicer = spliced([stream, b"data: [DONE]\n\n"])
        assert sent.decode().count("data: {") == 1 and splicer.done
        assert line not in sent


@pytest.mark.parametrize("member", ["id", "model"])
def test_a_name_that_stands_twice_is_ours_all_the_same(member: str) -> None:
    twice = f'"{member}":"theirs","created":7,'
    choices = '"choices":[{"index":0,"delta":{"content":"a"}}]'
    first = '{"id":"x","object":"chat.completion.chunk","created":7,"model":"m",' + twice + choices + "}"
    sent, _ = spliced([stream_of([first, first, "[DONE]"])])
    for event in parsed(sent):
        (told,) = [value for name, value in json.loads(event.data, object_pairs_hook=list) if name == member]
        assert told in (GENERATION, MODEL)


@pytest.mark.parametrize(
    "line", ['{"type":"ping"}', "{}", '{"id":"x","model":"m","choices":null}', '{"prompt_progress":{"total":9},"usage":null}']
)
def test_an_event_without_choices_has_an_empty_list_of_them(line: str) -> None:
    """Clients look into `choices` of every event without asking whether it is there."""
    first, *rest = OPENAI.lines
    sent, splicer = spliced([stream_of([line, first, line, *rest])])
    chunks = [json.loads(event.data) for event in parsed(sent)]
    assert [chunk["choices"] for chunk in chunks[:3:2]] == [[], []]
    assert splicer.content_events == 2 and splicer.done
