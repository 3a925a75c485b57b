"""A caller who leaves stops the provider of a stream at once; a whole answer is awaited (STR-04)."""

from __future__ import annotations

import asyncio
import socket
import struct
import time

import pytest

from bench.behaviour import Behaviour
from tests.edge.stage import FIRST, FIRST_THEN_GOOD, HELLO, RAW, SSE_HEAD, RawCall, Stage, behaving, chunk, event, stage_of
from tests.provider_caller import Caller
from tests.timing import again_if_untimely, in_time

pytestmark = pytest.mark.asyncio(loop_scope="module")

LEFT_S_MAX = 0.5
QUICK = Behaviour(tokens=8192, tokens_per_s=400, ttft_ms=100)


FREE, DEAR_AT_NIGHT = "acme/free", "acme/dear-at-night"


def priced(catalog: str) -> str:
    """`FREE` costs nothing; `DEAR_AT_NIGHT` costs nothing by day."""
    plain = '{ prompt = "0.000001", completion = "0.000002" }'
    free = '{ prompt = "0", completion = "0" }'
    override = 'overrides = [{ utc_start = 2200, utc_end = 600, completion = "0.000002" }]'
    for model, price in ((FREE, free), (DEAR_AT_NIGHT, free.replace(" }", f", {override} }}"))):
        before, name, after = catalog.partition(f'upstream_model = "{model.partition("/")[2]}"')
        catalog = before + name + after.replace(plain, price, 1)
    return catalog


stage = stage_of(
    settings={"timeouts": {"headers_s": 5.0, "total_s": 20.0, "keepalive_s": 0.2}},
    models={FREE: ("first",), DEAR_AT_NIGHT: ("first",)},
    catalog=priced,
)


def leave(caller: Caller, how: str) -> float:
    """Close or reset the caller's connection; returns when."""
    if how == "reset":
        connection: socket.socket = caller.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        caller.writer.transport.abort()
    elif how == "half-close":
        caller.writer.write_eof()
    else:
        caller.writer.close()
    return time.monotonic()


def departures(stage: Stage) -> int:
    """Callers who have left before their answer's end, by the log."""
    return sum(line.get("event") == "exchange" and line["status"] == 499 for line in stage.gateway.log)


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
@pytest.mark.parametrize("events", [0, 1, 50])
@again_if_untimely
async def test_str_04_leaving_a_stream_closes_the_providers_socket(stage: Stage, events: int, how: str) -> None:
    before, gone = len(stage.first.books.entries), departures(stage)
    with behaving(stage.first, QUICK):
        async with stage.streaming(FIRST_THEN_GOOD, max_tokens=8192) as caller:
            await stage.first.wait_for(lambda books: len(books.entries) == before + 1)
            if events:
                await caller.head()
                seen = 0
                while seen < events:
                    seen += (await caller.chunk()).count(b"data: ")
            left = leave(caller, how)
            entry = stage.first.books.entries[-1]
            await stage.first.wait_for(lambda _: entry.cancelled is not None)
    assert entry.cancelled is not None
    in_time(entry.cancelled - left, LEFT_S_MAX)
    assert len(stage.first.books.entries) == before + 1
    line = await asyncio.to_thread(stage.gateway.logged, "exchange", status=499, count=gone + 1)
    assert (line["error"], line["fault"]) == ("caller_gone", "caller")
    assert line["attempts"] == [["acme/first-then-good@first", "caller_gone", 200]]


@again_if_untimely
async def test_str_04_leaving_before_the_provider_answers_closes_its_socket(stage: Stage) -> None:
    left_at: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def script(call: RawCall) -> None:
        left_at.set_result(await call.left())

    stage.raw.script = script
    calls = len(stage.raw.calls)
    async with stage.streaming(RAW) as caller:
        await stage.raw.called(calls + 1)
        left = leave(caller, "close")
    in_time(await asyncio.wait_for(left_at, 15.0) - left, LEFT_S_MAX)


async def test_str_04_leaving_during_connect_leaves_no_call_behind(stage: Stage) -> None:
    """The connection that comes too late is kept for the next caller; the request never leaves."""
    calls, left_before = len(stage.raw.calls), departures(stage)
    async with stage.raw.deaf() as listener:
        async with stage.streaming(RAW) as caller:
            await asyncio.sleep(0.1)
            leave(caller, "close")
        line = await asyncio.to_thread(stage.gateway.logged, "exchange", status=499, count=left_before + 1)
        assert line["endpoint"] == f"{RAW}@raw"
        listener.setblocking(False)
        listener.accept()[0].close()
    assert len(stage.raw.calls) == calls


@pytest.mark.parametrize("model", [FIRST, DEAR_AT_NIGHT])
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_str_04_a_whole_answer_is_awaited_after_its_caller_has_left(stage: Stage, how: str, model: str) -> None:
    before = len(stage.first.books.entries)
    with behaving(stage.first, Behaviour(headers_delay_ms=400)):
        async with stage.connected() as caller:
            key = f"Authorization: Bearer {stage.gateway.key}\r\n"
            caller.send({"model": model, "messages": HELLO}, "/api/v1/chat/completions", key)
            await stage.first.wait_for(lambda books: len(books.entries) == before + 1)
            leave(caller, how)
        entry = stage.first.books.entries[-1]
        await stage.first.wait_for(lambda _: entry.finished is not None or entry.cancelled is not None)
    assert entry.cancelled is None
    assert (await stage.ask(model)).status == 200


@pytest.mark.parametrize("how", ["close", "reset"])
@again_if_untimely
async def test_str_04_a_whole_answer_that_costs_nothing_is_stopped_when_its_caller_leaves(stage: Stage, how: str) -> None:
    before, gone = len(stage.first.books.entries), departures(stage)
    with behaving(stage.first, Behaviour(headers_delay_ms=10_000)):
        async with stage.connected() as caller:
            key = f"Authorization: Bearer {stage.gateway.key}\r\n"
            caller.send({"model": FREE, "messages": HELLO}, "/api/v1/chat/completions", key)
            await stage.first.wait_for(lambda books: len(books.entries) == before + 1)
            left = leave(caller, how)
        entry = stage.first.books.entries[-1]
        await stage.first.wait_for(lambda _: entry.cancelled is not None)
    assert entry.cancelled is not None
    in_time(entry.cancelled - left, LEFT_S_MAX)
    line = await asyncio.to_thread(stage.gateway.logged, "exchange", status=499, count=gone + 1)
    assert (line["error"], line["endpoint"]) == ("caller_gone", f"{FREE}@first")
    assert (await stage.ask(FREE)).status == 200


async def test_a_caller_who_has_left_is_not_served_elsewhere(stage: Stage) -> None:
    before, good, gone = len(stage.first.books.entries), stage.good.books.requests, departures(stage)
    with behaving(stage.first, Behaviour(headers_delay_ms=400, status=503)):
        async with stage.connected() as caller:
            key = f"Authorization: Bearer {stage.gateway.key}\r\n"
            body = {"model": FIRST_THEN_GOOD, "messages": HELLO, "provider": {"order": ["first"]}}
            caller.send(body, "/api/v1/chat/completions", key)
            await stage.first.wait_for(lambda books: len(books.entries) == before + 1)
            leave(caller, "reset")
        line = await asyncio.to_thread(stage.gateway.logged, "exchange", status=499, count=gone + 1)
    assert [outcome for _, outcome, _ in line["attempts"]] == ["upstream_refused"]
    assert (len(stage.first.books.entries), stage.good.books.requests) == (before + 1, good)


async def test_str_08_a_caller_who_only_stops_talking_gets_the_whole_answer(stage: Stage) -> None:
    with behaving(stage.first, Behaviour(headers_delay_ms=200)):
        async with stage.connected() as caller:
            key = f"Authorization: Bearer {stage.gateway.key}\r\n"
            caller.send({"model": FIRST, "messages": HELLO}, "/api/v1/chat/completions", key)
            leave(caller, "half-close")
            status, _, _ = await caller.answer()
    assert status == 200


@again_if_untimely
async def test_leaving_in_the_middle_of_the_providers_event_is_noticed_without_writing(stage: Stage) -> None:
    """Nothing is due to be written when the caller leaves: the connection's end itself must tell."""
    left_at: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def script(call: RawCall) -> None:
        await call.write(SSE_HEAD, chunk(event({"content": "a"})), chunk(b'data: {"id"'))
        left_at.set_result(await call.left())

    stage.raw.script = script
    async with stage.streaming(RAW) as caller:
        await caller.head()
        await caller.chunk()
        left = leave(caller, "close")
    in_time(await asyncio.wait_for(left_at, 15.0) - left, LEFT_S_MAX)


async def test_callers_who_leave_free_their_providers_places(stage: Stage) -> None:
    with behaving(stage.first, QUICK):
        for _ in range(10):
            async with stage.streaming(FIRST) as caller:
                await caller.head()
    await stage.first.wait_for(lambda books: all(entry.cancelled or entry.finished for entry in books.entries))

    def under_way() -> str:
        return next(line for line in stage.gateway.metrics().splitlines() if line.startswith('gateway_inflight_attempts{provider="first"}'))

    async with asyncio.timeout(20.0):
        while not (await asyncio.to_thread(under_way)).endswith(" 0.0"):
            await asyncio.sleep(0.1)
