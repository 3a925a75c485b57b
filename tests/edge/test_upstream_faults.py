"""What a provider does wrong stays between it and us (STR-05, UPS-08, UPS-10, AUT-10)."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import pytest

from bench.answers import text_of
from bench.behaviour import Behaviour
from tests.conftest import eventually
from tests.edge.stage import (
    FIRST,
    FIRST_THEN_GOOD,
    GOOD,
    HELLO,
    RAW,
    RAW_THEN_GOOD,
    ROLE,
    SSE_HEAD,
    Answered,
    RawCall,
    RawProvider,
    Stage,
    behaving,
    chunk,
    completion,
    event,
    plain,
    sse,
    stage_of,
)
from tests.timing import again_if_untimely, in_time

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRET = "sk-provider-0123456789abcdef"
IDLE_S = 1.0


stage = stage_of(
    settings={"timeouts": {"headers_s": 2.0, "first_token_s": 2.0, "idle_s": IDLE_S, "total_s": 10.0}, "upstream": {"inflight_max": 4000}},
    catalog=lambda text: text.replace('[[providers]]\nslug = "raw"', '[[providers]]\nslug = "raw"\napi_key_env = "RAW_SECRET"'),
    environ={"RAW_SECRET": SECRET},
)


# STR-05


def break_of(answered: Answered) -> dict[str, Any]:
    """Asserts a stream that ended in exactly one error event; returns it."""
    assert answered.status == 200
    *before, last = answered.events
    assert "[DONE]" not in answered.events
    assert not [part for part in before if "error" in part]
    assert not [part for part in before if part["choices"] and part["choices"][0]["finish_reason"]]
    assert {part["id"] for part in answered.events} == {answered.headers["X-Generation-Id"]}
    choice = last["choices"][0]
    assert (choice["delta"], choice["finish_reason"]) == ({"content": ""}, "error")
    assert type(last["error"]["code"]) is int and last["error"]["metadata"]["error_type"]
    assert (last["object"], last["model"]) == ("chat.completion.chunk", FIRST_THEN_GOOD)
    found: dict[str, Any] = last["error"]
    return found


BREAKS = {
    "error event": (Behaviour(error_event_after=4, error_message="the GPU is on fire"), 502, "provider_unavailable"),
    "reset": (Behaviour(reset_after_events=4), 502, "provider_unavailable"),
    "close": (Behaviour(close_after_events=4), 502, "provider_unavailable"),
    "clean end": (Behaviour(close_after_events=4, framing="close"), 502, "provider_unavailable"),
    "stall": (Behaviour(stall_after_events=4), 502, "timeout"),
}


@pytest.mark.parametrize("how", BREAKS)
async def test_str_05_a_break_after_the_first_content_is_told_once_in_the_stream(stage: Stage, how: str) -> None:
    behaviour, code, error_type = BREAKS[how]
    before = stage.good.books.requests
    with behaving(stage.first, behaviour):
        answered = await stage.ask(FIRST_THEN_GOOD, stream=True)
    error = break_of(answered)
    assert answered.text == text_of(3)
    assert (error["code"], error["metadata"]["error_type"], error["metadata"]["provider_name"]) == (code, error_type, "First")
    assert stage.good.books.requests == before
    if how == "error event":
        assert "the GPU is on fire" in error["metadata"]["raw"]


async def test_str_05_events_beside_the_error_still_arrive_and_none_after_it(stage: Stage) -> None:
    error = sse({"error": {"code": 429, "message": "slow down"}})
    stage.raw.answers(SSE_HEAD, chunk(event(ROLE) + event({"content": "a"}) + event({"content": "b"}) + error + event({"content": "c"})))
    answered = await stage.ask(RAW, stream=True)
    assert answered.text == "ab"
    assert "slow down" in answered.events[-1]["error"]["metadata"]["raw"]


async def test_str_05_the_end_of_the_framing_without_done_is_an_end_where_a_finish_reason_came(stage: Stage) -> None:
    body = event(ROLE) + event({"content": "a"}) + event({}, finish="stop")
    for answer in (SSE_HEAD + chunk(body) + b"0\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + body):
        stage.raw.answers(answer)
        answered = await stage.ask(RAW, stream=True)
        assert (answered.text, answered.events[-1]) == ("a", "[DONE]")


@again_if_untimely
async def test_a_provider_that_does_not_end_its_framing_after_done_holds_nobody(stage: Stage) -> None:
    async def script(call: RawCall) -> None:
        await call.write(SSE_HEAD, chunk(event({"content": "a"}, finish="stop") + b"data: [DONE]\n\n"))
        await call.left()

    stage.raw.script = script
    answered = await stage.ask(RAW, stream=True)
    assert answered.events[-1] == "[DONE]"
    in_time(answered.seconds, IDLE_S / 2)
    await eventually(lambda: stage.raw.open_connections == 0)


# UPS-08

OK = b"HTTP/1.1 200 OK\r\n"
WHOLE = plain(completion())
STREAM = chunk(event(ROLE) + event({"content": "a"}) + event({}, finish="stop") + b"data: [DONE]\n\n") + b"0\r\n\r\n"
GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "one byte": b"H",
    "bare CR in a header": WHOLE.replace(b"Content-Type: ", b"X-A: a\rX-Bad: b\r\nContent-Type: "),
    "NUL in a header": WHOLE.replace(b"Content-Type: ", b"X-A: a\0b\r\nContent-Type: "),
    "control bytes in a header's name": WHOLE.replace(b"Content-Type: ", b"X\x01A: a\r\nContent-Type: "),
    "a header of 1 MiB": OK + b"X-A: " + b"a" * (1 << 20) + b"\r\n\r\n",
    "headers of 1 MiB": OK + b"".join(b"X-%d: %b\r\n" % (n, b"a" * 1000) for n in range(1000)) + b"\r\n",
    "100,000 headers": OK + b"A: b\r\n" * 100_000 + b"\r\n",
    "a head without end": OK + b"X-A: b\r\n" * 5,
    "shorter than its length": WHOLE.replace(b"Content-Length: 1", b"Content-Length: 2"),
    "negative length": OK + b"Content-Length: -5\r\n\r\nhello",
    "length with a sign": OK + b"Content-Length: +5\r\n\r\nhello",
    "length in hex": OK + b"Content-Length: 0x5\r\n\r\nhello",
    "length over 64 bits": OK + b"Content-Length: 99999999999999999999999\r\n\r\nhello",
    "two lengths": OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "a list of lengths": OK + b"Content-Length: 5, 6\r\n\r\nhello!",
    "length and chunks": WHOLE.replace(b"Content-Type: ", b"Transfer-Encoding: chunked\r\nContent-Type: "),
    "another transfer coding": WHOLE.replace(b"Content-Type: ", b"Transfer-Encoding: gzip\r\nContent-Type: "),
    "two transfer codings": OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: gzip\r\n\r\n" + chunk(completion()) + b"0\r\n\r\n",
    "chunk sizes that are none": OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\nhello\r\n0\r\n\r\n",
    "negative chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
    "chunk without its end": OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n",
    "endless chunk size": OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"0" * 10_000,
    "1xx flood": b"HTTP/1.1 100 Continue\r\n\r\n" * 1000 + WHOLE,
    "switching protocols": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n" + WHOLE,
    "two status lines": OK + WHOLE,
    "status of two digits": WHOLE.replace(b" 200 ", b" 20 "),
    "status of four digits": WHOLE.replace(b" 200 ", b" 2000 "),
    "status in letters": WHOLE.replace(b" 200 ", b" yes "),
    "no status": WHOLE.replace(b" 200 OK", b""),
    "HTTP/0.9": b"<html>hello</html>",
    "HTTP/2.0": WHOLE.replace(b"HTTP/1.1", b"HTTP/2.0"),
    "HTTP/9.9": WHOLE.replace(b"HTTP/1.1", b"HTTP/9.9"),
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/2 settings": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + b"\x00\x03\x00\x00\x00\x80" * 3,
    "a TLS alert": b"\x15\x03\x01\x00\x02\x02\x46",
    "SSH": b"SSH-2.0-OpenSSH_9.2p1\r\n",
    "random bytes": bytes(range(256)) * 16,
    "lines ended by LF": WHOLE.replace(b"\r\n", b"\n"),
    "a page": plain(b"<html>it works</html>", content_type=b"text/html"),
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "partial content": WHOLE.replace(b"200 OK", b"206 Partial Content"),
    "empty": plain(b""),
    "not UTF-8": plain(completion("X").replace(b"X", b"\xff\xfe")),
    "truncated JSON": plain(completion()[:-9]),
    "JSON nested deeply": plain(b"[" * 100_000),
    "no object": plain(b"[1, 2]"),
    "no choices": plain(b'{"id": "x", "object": "chat.completion", "choices": []}'),
    "choices of another kind": plain(b'{"id": "x", "choices": "many"}'),
    "choices of numbers": plain(b'{"id": "x", "choices": [1]}'),
    "a finish reason of another kind": plain(b'{"choices": [{"index": 0, "finish_reason": {"a": 1}, "message": {}}]}'),
    "gzip": OK
    + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b" % (len(gzip.compress(completion())), gzip.compress(completion())),
    "unknown coding": WHOLE.replace(b"Content-Type: ", b"Content-Encoding: rot13\r\nContent-Type: "),
    "a stream of nothing": SSE_HEAD + b"0\r\n\r\n",
    "a stream of done": SSE_HEAD + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n",
    "a stream of comments": SSE_HEAD + chunk(b": a\n\n" * 100) + b"0\r\n\r\n",
    "a stream of junk": SSE_HEAD + chunk(b"data: {\n\ndata: 1\n\nfoo\n\n\xff\n\n") + b"0\r\n\r\n",
}
OURS = {
    "access-control-allow-origin", "access-control-expose-headers", "content-type", "content-length", "x-content-type-options",
    "x-generation-id",
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
async def test_ups_08_garbage_is_a_502_or_tried_elsewhere(stage: Stage, stream: bool) -> None:
    async def script(call: RawCall) -> None:
        call.writer.write(GARBAGE[json.loads(call.body)["user"]])
        await call.writer.drain()
        if json.loads(call.body)["user"] in ("random bytes", "HTTP/2 settings", "HTTP/0.9", "SSH"):
            await call.left()  # the first bytes tell: nobody is to wait for more

    stage.raw.script = script
    names = [name for name in GARBAGE if stream or "a stream of" not in name]
    alone = await asyncio.gather(*(stage.ask(RAW, stream=stream, user=name) for name in names))
    assert {name: answered.status for name, answered in zip(names, alone, strict=True) if answered.status != 502} == {}
    for name, answered in zip(names, alone, strict=True):
        assert answered.error["code"] == 502, name
        assert {header.lower() for header in answered.headers} == OURS, name
    for name, answered in zip(
        names, await asyncio.gather(*(stage.ask(RAW_THEN_GOOD, stream=stream, user=name) for name in names)), strict=True
    ):
        assert answered.status == 200 and b'"Good"' in answered.body, (name, answered)


@pytest.mark.parametrize("stream", [False, True])
async def test_ups_08_oddities_that_harm_nobody_are_read(stage: Stage, stream: bool) -> None:
    whole = SSE_HEAD + STREAM if stream else WHOLE
    odd = {
        "continue first": b"HTTP/1.1 100 Continue\r\n\r\n" + whole,
        "early hints": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 3 + whole,
        "no reason": whole.replace(b"200 OK", b"200 "),
        "bytes after the answer": whole + b"HTTP/1.1 200 OK\r\n\r\nsmuggled",
        "an answer after the answer": whole + whole,
        "a header twice": whole.replace(b"Content-Type: ", b"X-A: 1\r\nX-A: 2\r\nContent-Type: "),
        "a folded header": whole.replace(b"Content-Type: ", b"X-A: a\r\n folded\r\nContent-Type: "),
    }
    for name, answer in odd.items():
        stage.raw.answers(answer)
        answered = await stage.ask(RAW, stream=stream)
        assert answered.status == 200, (name, answered)
        assert b"smuggled" not in answered.body
        assert (answered.text if stream else answered.json["choices"][0]["message"]["content"]) in ("a", "fine"), name


@pytest.mark.parametrize("stream", [False, True])
async def test_inp_10_none_of_a_providers_headers_reaches_the_caller(stage: Stage, stream: bool) -> None:
    hostile = (
        b"Set-Cookie: a=b\r\nServer: x\r\nVia: y\r\nAlt-Svc: h3\r\nLocation: /z\r\nX-RateLimit-Remaining: 3\r\nopenai-organization: o\r\n"
    )
    stage.raw.answers((SSE_HEAD + STREAM if stream else WHOLE).replace(b"Content-Type: ", hostile + b"Content-Type: "))
    answered = await stage.ask(RAW, stream=stream)
    assert answered.status == 200
    streams = {"cache-control", "x-accel-buffering", "transfer-encoding"}
    assert {header.lower() for header in answered.headers} == ((OURS | streams) - {"content-length"} if stream else OURS)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_follows_an_answer_is_never_part_of_the_next(stage: Stage, stream: bool) -> None:
    evil = plain(completion("evil"))

    async def script(call: RawCall) -> None:
        call.keep = True
        answer = SSE_HEAD + STREAM if stream else WHOLE
        if call.number % 2:
            await call.write(answer + evil)
        else:
            await call.write(answer)
            await asyncio.sleep(0.005)
            await call.write(evil)

    stage.raw.script = script
    for _ in range(30):
        answered = await stage.ask(RAW, stream=stream)
        assert answered.status == 200 and b"evil" not in answered.body


# UPS-10


async def test_ups_10_a_connection_closed_at_the_moment_of_reuse_is_invisible(stage: Stage) -> None:
    executed: list[str] = []

    async def script(call: RawCall) -> None:
        if call.number == 2:  # read, never executed
            if len(executed) % 2:
                call.reset()
            return
        executed.append(json.loads(call.body)["user"])
        call.keep = True
        await call.write(WHOLE)

    stage.raw.script = script
    before = stage.raw.connections
    statuses = [(await stage.ask(RAW, user=f"{number}")).status for number in range(300)]
    assert statuses == [200] * 300
    assert executed == [f"{number}" for number in range(300)]
    assert stage.raw.connections - before >= 299  # every second use was one too many


async def test_ups_10_a_request_that_was_answered_in_part_is_not_sent_again(stage: Stage) -> None:
    seen: list[str] = []

    async def script(call: RawCall) -> None:
        seen.append(json.loads(call.body)["user"])
        call.keep = call.number == 1
        await call.write(WHOLE if call.number == 1 else b"HTTP/1.1 2")

    stage.raw.answers(WHOLE)
    await stage.ask(RAW)  # no connection of another test is kept
    stage.raw.script = script
    statuses = [(await stage.ask(RAW, user=f"{number}")).status for number in range(20)]
    assert sorted(seen, key=int) == [f"{number}" for number in range(20)]
    assert statuses == [200, 502] * 10


async def test_ups_10_a_fresh_connection_that_gives_nothing_is_not_tried_twice(stage: Stage) -> None:
    with behaving(stage.first, Behaviour(refuse=True)):
        before = len(stage.first.books.entries)
        assert (await stage.ask(FIRST)).status == 502
        assert 1 <= len(stage.first.books.entries) - before <= 2  # 2: the first one met a kept connection


# AUT-10


async def test_aut_10_a_caller_cannot_steer_where_our_credentials_go(stage: Stage) -> None:
    stage.raw.answers(WHOLE)
    async with RawProvider() as canary:
        host = canary.url.removesuffix("/v1")
        names = "api_base base_url api_key api_version api_type azure_endpoint custom_host custom_llm_provider organization".split()
        fields: dict[str, Any] = dict.fromkeys(names, host)
        fields |= {
            "extra_headers": {"Host": host},
            "extra_body": {"api_base": host},
            "headers": {"X": host},
            "litellm_params": {"api_base": host},
        }
        before = len(stage.raw.calls)
        for name, value in fields.items():
            answered = await stage.ask(RAW, **{name: value})
            assert answered.status == 200, name
        sent = ["Host", "X-Forwarded-Host", "X-Api-Base", "OpenAI-Organization", "api-key", "X-Portkey-Custom-Host", "X-Original-URL"]
        for header in sent:
            assert (await stage.ask(RAW, headers={header: host})).status == 200
        assert canary.connections == 0
    for call in stage.raw.calls[before:]:
        assert host.encode() not in call.head + call.body
        assert call.head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
        assert f"Authorization: Bearer {SECRET}\r\n".encode() in call.head
        assert stage.gateway.key.encode() not in call.head + call.body


async def test_aut_10_a_providers_key_is_seen_by_that_provider_alone_and_never_told(stage: Stage) -> None:
    stage.raw.answers(plain(json.dumps({"error": {"message": f"bad key {SECRET}", "code": SECRET}}).encode()).replace(b"200 OK", b"401 No"))
    answered = await stage.ask(RAW_THEN_GOOD, headers={"Cookie": "a=b", "X-Caller": "c"})
    assert answered.status == 200
    headers = dict(stage.good.books.entries[-1].headers)
    assert "Authorization" not in headers
    assert set(headers) == {"Host", "User-Agent", "Accept", "Accept-Encoding", "Content-Type", "Content-Length"}
    for status in (b"401 No", b"400 Bad", b"500 Oops"):
        stage.raw.answers(
            plain(json.dumps({"error": {"message": f"bad key {SECRET}", "code": SECRET}}).encode()).replace(b"200 OK", status)
        )
        assert SECRET not in (await stage.ask(RAW)).body.decode()
    assert SECRET not in json.dumps(stage.gateway.log)


async def test_fields_of_the_gateway_stay_here_and_unknown_ones_pass(stage: Stage) -> None:
    ours: dict[str, Any] = {
        "models": [GOOD],
        "provider": {"sort": "price"},
        "route": "fallback",
        "transforms": [],
        "plugins": [],
        "usage": {"include": True},
    }
    await stage.ask(GOOD, **ours, future_field={"a": [1, 2]}, temperature=0.5)
    sent = json.loads(stage.good.books.entries[-1].body)
    assert sent == {"model": "good", "messages": HELLO, "future_field": {"a": [1, 2]}, "temperature": 0.5}
