"""STR-08: callers who are odd but legal are served, and those who leave or do not read cost nothing.

HTTP/1.0, HEAD, preflights, `Expect`, half-closed connections, reuse after errors, slow readers.
"""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from bench.behaviour import Behaviour
from tests.conftest import eventually
from tests.edge.stage import FIRST, GOOD, HELLO, Stage, behaving, roomy, stage_of
from tests.provider_caller import datas
from tests.timing import again_if_untimely, in_time

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROUTE = "/api/v1/chat/completions"
MIB = 1024 * 1024
WRITE_STALL_S = 1.0


stage = stage_of(settings={"server": {"write_stall_s": WRITE_STALL_S}}, catalog=roomy)


def body(model: str = GOOD, **fields: object) -> bytes:
    return json.dumps({"model": model, "messages": HELLO, **fields}).encode()


def head(stage: Stage, *lines: str, length: int, version: str = "1.1", key: str = "") -> bytes:
    key = f"Authorization: Bearer {key or stage.gateway.key}"
    return "\r\n".join((f"POST {ROUTE} HTTP/{version}", "Host: gw", key, f"Content-Length: {length}", *lines, "", "")).encode()


def request(stage: Stage, data: bytes, *lines: str, version: str = "1.1") -> bytes:
    return head(stage, *lines, length=len(data), version=version) + data


def is_whole_stream(data: bytes) -> bool:
    *events, done = datas(data)
    return len(events) > 2 and done == "[DONE]" and any(event["choices"][0]["finish_reason"] for event in events if event["choices"])


# HTTP/1.0


@pytest.mark.parametrize("lines", [(), ("Connection: keep-alive",), ("Connection: close",)], ids=["plain", "keep-alive", "close"])
@pytest.mark.parametrize("stream", [True, False])
async def test_str_08_http_1_0_gets_no_chunks_and_the_end_of_the_connection(stage: Stage, stream: bool, lines: tuple[str, ...]) -> None:
    stage.good.books.clear()
    async with asyncio.timeout(20.0), stage.connected() as caller:
        caller.writer.write(request(stage, body(stream=stream), *lines, version="1.0"))
        status, headers = await caller.head()
        data = await caller.reader.read()  # to the end of the connection
    assert status == 200 and "transfer-encoding" not in headers and headers["connection"] == "close"
    if stream:
        assert "content-length" not in headers and is_whole_stream(data)
    else:
        assert int(headers["content-length"]) == len(data) and json.loads(data)["choices"]
    assert len(stage.good.books.entries) == 1


async def test_str_08_http_1_0_without_host_reaches_control(stage: Stage) -> None:
    async with asyncio.timeout(20.0), stage.connected() as caller:
        caller.writer.write(b"GET /api/v1/models HTTP/1.0\r\n\r\n")
        status, headers = await caller.head()
        data = await caller.reader.read()
    assert status == 200 and "transfer-encoding" not in headers and json.loads(data)["data"]


# HEAD and OPTIONS


async def test_str_08_head_answers_have_no_body(stage: Stage) -> None:
    async with asyncio.timeout(20.0), stage.connected() as caller:
        for path, expected in ((ROUTE, 405), ("/api/v1/models", 200), ("/nowhere", 404)):
            caller.writer.write(f"HEAD {path} HTTP/1.1\r\nHost: gw\r\n\r\n".encode())
            status, headers = await caller.head()  # of this one, or of what would be the body of the one before
            assert status == expected and int(headers["content-length"]) > 2
        caller.writer.write(request(stage, body()))
        assert (await caller.answer())[0] == 200


async def test_str_08_preflight_allows_what_browsers_send(stage: Stage) -> None:
    asked = ("Origin: https://app.example", "Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization")
    data = "\r\n".join((f"OPTIONS {ROUTE} HTTP/1.1", "Host: gw", *asked, "", "")).encode()
    async with asyncio.timeout(20.0), stage.connected() as caller:
        for _ in range(2):
            caller.writer.write(data)
            status, headers = await caller.head()
            assert status == 204 and "content-length" not in headers
            assert headers["access-control-allow-origin"] == "*" and "access-control-allow-credentials" not in headers
            assert "POST" in headers["access-control-allow-methods"]
            allowed = headers["access-control-allow-headers"].lower()
            assert all(name in allowed for name in ("authorization", "content-type", "http-referer", "x-title"))
            assert "*" in allowed.split(", ")  # x-openrouter-cache, x-stainless-helper-method, whatever a client invents


# Expect


async def test_str_08_continue_is_said_before_the_body(stage: Stage) -> None:
    data = body()
    await stage.ask(GOOD)  # the key is known
    async with asyncio.timeout(20.0), stage.connected() as caller:
        for _ in range(2):
            caller.writer.write(head(stage, "Expect: 100-continue", length=len(data)))
            assert await caller.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            caller.writer.write(data)
            assert (await caller.answer())[0] == 200
        caller.writer.write(head(stage, "Expect: 100-continue", length=len(data)) + data)  # who does not wait is not told
        assert (await caller.answer())[0] == 200


async def test_str_08_who_is_refused_is_not_asked_for_the_body(stage: Stage) -> None:
    refused = {
        401: f"POST {ROUTE} HTTP/1.1\r\nHost: gw\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n".encode(),
        413: head(stage, "Expect: 100-continue", length=10**9),
        415: head(stage, "Expect: 100-continue", "Content-Encoding: gzip", length=9),
        405: f"PUT {ROUTE} HTTP/1.1\r\nHost: gw\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n".encode(),
    }
    for status, data in refused.items():
        async with asyncio.timeout(20.0), stage.connected() as caller:
            caller.writer.write(data)
            assert (await caller.answer())[0] == status
            assert await caller.reader.read() == b""


async def test_str_08_http_1_0_is_not_told_to_continue(stage: Stage) -> None:
    data = body()
    async with asyncio.timeout(20.0), stage.connected() as caller:
        caller.writer.write(head(stage, "Expect: 100-continue", length=len(data), version="1.0"))
        await asyncio.sleep(0.05)
        caller.writer.write(data)
        assert (await caller.answer())[0] == 200


# Half-closed connections


async def test_str_08_half_closed_caller_of_a_whole_answer_gets_it(stage: Stage) -> None:
    stage.first.books.clear()
    with behaving(stage.first, Behaviour(ttft_ms=300.0)):
        async with asyncio.timeout(20.0), stage.connected() as caller:
            caller.writer.write(request(stage, body(FIRST)))
            caller.writer.write_eof()
            status, headers, data = await caller.answer()
            assert status == 200 and headers["connection"] == "close" and json.loads(data)["choices"]
            assert await caller.reader.read() == b""
    assert [entry.cancelled for entry in stage.first.books.entries] == [None]


async def test_str_08_half_closed_caller_of_control_gets_the_answer(stage: Stage) -> None:
    async with asyncio.timeout(20.0), stage.connected() as caller:
        caller.writer.write(b"GET /api/v1/models HTTP/1.1\r\nHost: gw\r\n\r\n")
        caller.writer.write_eof()
        status, _, data = await caller.answer()
        assert status == 200 and json.loads(data)["data"]
        assert await caller.reader.read() == b""


@again_if_untimely
async def test_str_08_half_closed_caller_of_a_stream_ends_it(stage: Stage) -> None:
    stage.first.books.clear()
    with behaving(stage.first, Behaviour(tokens=1000, tokens_per_s=20.0)):
        async with asyncio.timeout(20.0), stage.connected() as caller:
            caller.writer.write(request(stage, body(FIRST, stream=True)))
            assert (await caller.head())[0] == 200
            await caller.chunk()
            caller.writer.write_eof()
            left = time.monotonic()
            await caller.reader.read()
            entry = stage.first.books.entries[-1]
            await stage.first.wait_for(lambda _: entry.cancelled is not None)
            assert entry.cancelled is not None
            in_time(entry.cancelled - left, 0.5)


UNFINISHED = {"nothing": b"", "head": b"POST ", "body": b"POST / HTTP/1.1\r\nHost: gw\r\nContent-Length: 5\r\n\r\nxx"}


@pytest.mark.parametrize("data", UNFINISHED.values(), ids=UNFINISHED.keys())
async def test_str_08_who_closes_in_the_middle_is_let_go(stage: Stage, data: bytes) -> None:
    async with asyncio.timeout(20.0), stage.connected() as caller:
        caller.writer.write(data)
        caller.writer.write_eof()
        assert await caller.reader.read() == b""


# Connections go on


async def test_str_08_a_connection_is_good_for_more_after_errors(stage: Stage) -> None:
    async with asyncio.timeout(20.0), stage.connected() as caller:
        asked = ((400, b"{}"), (400, body("acme/unknown")), (200, body()), (400, b"x"), (200, body(stream=True)), (200, body()))
        for expected, data in asked:
            caller.writer.write(request(stage, data))
            status, headers, _ = await caller.answer()
            assert status == expected and headers.get("connection") != "close"
        caller.writer.write(f"POST {ROUTE} HTTP/1.1\r\nHost: gw\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        assert (await caller.answer())[0] == 401
        caller.writer.write(request(stage, body()))
        assert (await caller.answer())[0] == 200


async def test_str_08_a_request_may_follow_before_the_stream_has_ended(stage: Stage) -> None:
    with behaving(stage.first, Behaviour(tokens=20, tokens_per_s=100.0)):
        async with asyncio.timeout(20.0), stage.connected() as caller:
            caller.writer.write(request(stage, body(FIRST, stream=True)))
            assert (await caller.head())[0] == 200
            caller.writer.write(request(stage, body()))
            data = b""
            while piece := await caller.chunk():
                data += piece
            assert is_whole_stream(data)
            status, _, whole = await caller.answer()
            assert status == 200 and json.loads(whole)["model"] == GOOD


# Readers


@again_if_untimely
async def test_str_08_who_stops_reading_is_cut_while_the_provider_waits(stage: Stage) -> None:
    """Back-pressure end to end: the provider's sending stops, then the caller is cut and the provider with it."""
    stage.first.books.clear()
    rss = stage.rss_bytes()
    with behaving(stage.first, Behaviour(tokens=250_000)):  # 50 MB of events
        async with asyncio.timeout(20.0), stage.connected() as caller:
            caller.writer.write(request(stage, body(FIRST, stream=True)))
            await caller.head()
            caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
            paused, entry = time.monotonic(), stage.first.books.entries[-1]
            made, since = -1, time.monotonic()
            while entry.cancelled is None:
                if entry.completion_tokens != made:
                    made, since = entry.completion_tokens, time.monotonic()
                assert stage.rss_bytes() - rss < 16 * MIB
                await asyncio.sleep(0.05)
            assert entry.cancelled - paused >= WRITE_STALL_S - 0.3
            in_time(entry.cancelled - since, WRITE_STALL_S + 1.0)
            assert made < 125_000  # what kernels hold between the three, and 64 KiB of ours
    await eventually(lambda: 'gateway_inflight_attempts{provider="first"} 0' in stage.gateway.metrics().replace(".0", ""))


async def test_str_08_who_reads_slowly_gets_all_at_bounded_memory(stage: Stage) -> None:
    rss, most, received = stage.rss_bytes(), 0, 0
    with behaving(stage.first, Behaviour(tokens=150_000)):
        async with asyncio.timeout(20.0), stage.connected() as caller:
            caller.writer.write(request(stage, body(FIRST, stream=True, max_tokens=150_000)))
            await caller.head()
            began = time.monotonic()
            tail = b""
            while not tail.endswith(b"0\r\n\r\n"):
                piece = await caller.reader.read(262_144)
                assert piece, "cut"
                received += len(piece)
                tail = (tail + piece)[-16:]
                if received > (time.monotonic() - began) * 12 * MIB:
                    await asyncio.sleep(0.02)
                    most = max(most, stage.rss_bytes())
    assert received > 25_000_000
    assert most - rss < 24 * MIB


@again_if_untimely
async def test_str_08_two_callers_at_different_pace_do_not_wait_for_each_other(stage: Stage) -> None:
    with behaving(stage.first, Behaviour(tokens=250_000)):
        async with stage.connected() as stalled:
            stalled.writer.write(request(stage, body(FIRST, stream=True)))
            await stalled.head()
            stalled.writer.transport.pause_reading()  # type: ignore[attr-defined]
            answers = [await stage.ask(GOOD) for _ in range(20)]
    assert {answered.status for answered in answers} == {200}
    in_time(max(answered.seconds for answered in answers), WRITE_STALL_S / 2)
