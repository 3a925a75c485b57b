"""What a careless server gives to who asked for a stream: another content type, the whole answer at once, no proper end (UPS-08)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import eventually
from tests.edge.stage import RAW, RAW_THEN_GOOD, ROLE, SSE_HEAD, RawCall, Stage, chunk, completion, event, plain, sse, stage_of
from tests.timing import again_if_untimely

pytestmark = pytest.mark.asyncio(loop_scope="module")

IDLE_S = 1.0
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
DONE = b"data: [DONE]\n\n"
EVENTS = event(ROLE) + event({"content": "a"}) + event({"content": "b"}) + event({}, finish="stop")
USAGE_EVENT = sse({"id": "up-1", "object": "chat.completion.chunk", "created": 7, "model": "raw", "choices": [], "usage": USAGE})
WHOLE = json.loads(completion("ab"))

stage = stage_of(settings={"timeouts": {"headers_s": 2.0, "first_token_s": 2.0, "idle_s": IDLE_S, "total_s": 10.0}})


def head(content_type: bytes) -> bytes:
    return SSE_HEAD.replace(b"Content-Type: text/event-stream\r\n", content_type)


@pytest.mark.parametrize("content_type", [b"", b"Content-Type: text/plain\r\n", b"Content-Type: application/json; charset=utf-8\r\n"])
@pytest.mark.parametrize("pieces", ["whole", "bytes"])
async def test_ups_08_a_stream_that_does_not_say_so_is_passed_on_as_it_comes(stage: Stage, content_type: bytes, pieces: str) -> None:
    body = b": hello\n\n" + EVENTS + USAGE_EVENT + DONE
    cut = [body] if pieces == "whole" else [body[at : at + 1] for at in range(len(body))]
    stage.raw.answers(head(content_type), *map(chunk, cut), b"0\r\n\r\n")
    answered = await stage.ask(RAW, stream=True)
    assert (answered.status, answered.text, answered.events[-1]) == (200, "ab", "[DONE]")
    assert answered.events[-2]["usage"]["cost"] == pytest.approx(9e-6)


async def test_str_02_its_tokens_are_not_held_back(stage: Stage) -> None:
    async def script(call: RawCall) -> None:
        await call.write(head(b""), chunk(event({"content": "a"})))
        await call.left()  # the caller leaves once it has the first token

    stage.raw.script = script
    async with stage.streaming(RAW) as caller:
        assert (await caller.head())[0] == 200
        assert b'"content":"a"' in await caller.chunk()


WHOLES: dict[str, bytes] = {
    "json": plain(completion("ab")),
    "with usage": plain(json.dumps({**WHOLE, "usage": USAGE}, indent=2).encode()),
    "without a content type": plain(completion("ab")).replace(b"Content-Type: application/json\r\n", b""),
    "said to be a stream": plain(completion("ab"), content_type=b"text/event-stream"),
    "after a mark": plain(b"\xef\xbb\xbf" + completion("ab")),
    "in chunks": head(b"Content-Type: application/json\r\n") + b"".join(chunk(b"%c" % byte) for byte in completion("ab")) + b"0\r\n\r\n",
    "until the connection ends": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + completion("ab"),
}


@pytest.mark.parametrize("name", WHOLES)
async def test_ups_08_a_whole_answer_to_a_stream_comes_as_events(stage: Stage, name: str) -> None:
    stage.raw.answers(WHOLES[name])
    answered = await stage.ask(RAW, stream=True)
    assert (answered.status, answered.headers["Content-Type"]) == (200, "text/event-stream")
    said, usage, end = answered.events
    assert (answered.text, said["choices"][0]["finish_reason"], end) == ("ab", "stop", "[DONE]")
    assert {said["object"], usage["object"]} == {"chat.completion.chunk"}
    assert usage["usage"]["completion_tokens"] == (2 if name == "with usage" else 1)  # an estimate: bytes / 4


async def test_led_11_a_long_answer_that_came_whole_is_no_single_token(stage: Stage) -> None:
    stage.raw.answers(plain(completion("x" * 20_000)))
    answered = await stage.ask(RAW, stream=True)
    assert len(answered.text) == 20_000
    assert answered.events[-2]["usage"]["completion_tokens"] == 5_000


@pytest.mark.parametrize("content_type", [b"application/json", b"text/event-stream"])
async def test_ups_08_an_error_in_place_of_the_stream_keeps_its_meaning(stage: Stage, content_type: bytes) -> None:
    stage.raw.answers(plain(b'{"error": {"message": "quota", "code": 429}}', content_type=content_type))
    assert (await stage.ask(RAW, stream=True)).status == 429
    served = await stage.ask(RAW_THEN_GOOD, stream=True)
    assert served.status == 200 and served.events[-1] == "[DONE]" and served.events[0]["provider"] == "Good"


@pytest.mark.parametrize(
    "body", [completion()[:-5], b" " * 70_000, b"<p>{}</p>", b'{"choices": []}', b"[]", b'{"id": "x"}', b'{"choices": [1]}']
)
async def test_ups_08_what_is_neither_is_tried_elsewhere(stage: Stage, body: bytes) -> None:
    stage.raw.answers(plain(body))
    assert (await stage.ask(RAW, stream=True)).status == 502
    served = await stage.ask(RAW_THEN_GOOD, stream=True)
    assert served.status == 200 and served.events[0]["provider"] == "Good"


async def test_str_01_an_event_that_only_the_end_of_the_answer_ends_is_read(stage: Stage) -> None:
    for body in (EVENTS.rstrip(b"\n"), EVENTS + USAGE_EVENT[:-1], EVENTS + USAGE_EVENT + b"data: [DONE]"):
        told = 5 if USAGE_EVENT[:-1] in body else 2  # or an estimate of the prompt
        stage.raw.answers(SSE_HEAD, chunk(body), b"0\r\n\r\n")
        answered = await stage.ask(RAW, stream=True)
        assert (answered.text, answered.events[-1]) == ("ab", "[DONE]")
        assert answered.events[-2]["usage"]["prompt_tokens"] == told


async def _reset(call: RawCall) -> None:
    call.reset()


async def _stay_silent(call: RawCall) -> None:
    await call.left()


async def _never_end_a_line(call: RawCall) -> None:
    await call.write(chunk(b"x" * 1_200_000))


LOST_ENDS: dict[str, Any] = {"cut": None, "reset": _reset, "stalls": _stay_silent, "line without end": _never_end_a_line}


@pytest.mark.parametrize("name", LOST_ENDS)
@again_if_untimely
async def test_str_05_after_its_finish_reason_a_stream_is_whole_however_it_ends(stage: Stage, name: str) -> None:
    """Nothing is missing that a caller could use: an error would have it throw away a whole answer."""

    async def script(call: RawCall) -> None:
        await call.write(SSE_HEAD, chunk(EVENTS + USAGE_EVENT))
        if LOST_ENDS[name] is not None:
            await eventually(lambda: read)
            await LOST_ENDS[name](call)

    stage.raw.script, read = script, []
    async with stage.streaming(RAW) as caller:
        assert (await caller.head())[0] == 200
        read.append(await caller.chunk())
        while data := await caller.chunk():
            read.append(data)
    body = b"".join(read)
    assert body.endswith(DONE) and b'"error"' not in body
    assert b'"prompt_tokens":5' in body


async def test_str_05_an_error_event_after_the_finish_reason_is_still_told(stage: Stage) -> None:
    stage.raw.answers(SSE_HEAD, chunk(EVENTS + sse({"error": {"message": "moderated", "code": 403}})), b"0\r\n\r\n")
    answered = await stage.ask(RAW, stream=True)
    assert answered.text == "ab" and "[DONE]" not in answered.events
    assert answered.events[-1]["choices"][0]["finish_reason"] == "error"
