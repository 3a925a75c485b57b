"""OVL-03, OVL-04: callers who hold connections and do nothing with them. Each wait has its deadline, and others do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import statistics
import time
from collections.abc import Callable

import pytest

from tests.conftest import eventually
from tests.edge.stage import GOOD, HELLO, Stage, stage_of
from tests.provider_caller import Caller
from tests.timing import again_if_untimely, in_time

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROUTE = "/api/v1/chat/completions"
HEAD_S, BODY_S, IDLE_S = 1.2, 1.5, 1.0
SLACK_S = 1.0  # a deadline may be late by this much
DRIPPERS = 200
DESCRIPTORS = 256


stage = stage_of(settings={"server": {"request_head_s": HEAD_S, "request_body_s": BODY_S, "client_idle_s": IDLE_S}})


def body() -> bytes:
    return json.dumps({"model": GOOD, "messages": HELLO}).encode()


def head(stage: Stage, *lines: str) -> bytes:
    return "\r\n".join((f"POST {ROUTE} HTTP/1.1", "Host: gw", f"Authorization: Bearer {stage.gateway.key}", *lines, "", "")).encode()


async def drip(stage: Stage, first: bytes, rest: bytes, began: asyncio.Semaphore, every_s: float = 0.5) -> tuple[float, int]:
    """Sends `first`, then a byte of `rest` at a time. Seconds until the other side closed, and the status of its answer (0: none)."""
    async with stage.connected() as caller:
        began_s = time.monotonic()
        told = asyncio.ensure_future(caller.reader.read())
        with contextlib.suppress(ConnectionError):
            caller.writer.write(first)
            began.release()
            for byte in rest:
                await asyncio.wait((told,), timeout=every_s)
                if told.done():
                    break
                caller.writer.write(bytes((byte,)))
            answer = await told
            return time.monotonic() - began_s, int(answer[9:12] or b"0")
        return time.monotonic() - began_s, 0


async def asked_meanwhile(stage: Stage, until: Callable[[], bool]) -> list[float]:
    """Seconds that ordinary requests took, made one after the other."""
    took = []
    while not until():
        answered = await stage.ask(GOOD)
        assert answered.status == 200
        took.append(answered.seconds)
        await asyncio.sleep(0.01)
    return took


@pytest.mark.parametrize("part", ["heads", "bodies", "chunks"])
@again_if_untimely
async def test_ovl_03_drippers_are_cut_at_their_deadline_and_nobody_waits_for_them(stage: Stage, part: str) -> None:
    first, rest, deadline_s = {
        "heads": (b"P", head(stage)[1:], HEAD_S),
        "bodies": (head(stage, "Content-Length: 1000"), b"x" * 1000, BODY_S),
        "chunks": (head(stage, "Transfer-Encoding: chunked"), b"5\r\nxxxxx\r\n" * 100, BODY_S),
    }[part]
    edge = stage.edge
    descriptors = edge.num_fds()
    began = asyncio.Semaphore(0)
    async with asyncio.timeout(20.0):
        drippers = asyncio.gather(*(drip(stage, first, rest, began) for _ in range(DRIPPERS)))
        for _ in range(DRIPPERS):  # connecting is work of this process, and not what is measured
            await began.acquire()
        took = await asked_meanwhile(stage, drippers.done)
        ends = await drippers
    assert [status for _, status in ends] == [408] * DRIPPERS
    assert deadline_s - 0.1 <= min(seconds for seconds, _ in ends)
    in_time(max(seconds for seconds, _ in ends), deadline_s + SLACK_S)
    in_time(statistics.median(took), 0.1)
    in_time(max(took), deadline_s / 2)  # who waited for the drippers would wait for their deadline
    await eventually(lambda: edge.num_fds() < descriptors + 20)


@pytest.mark.parametrize("first", [b"", b"\r\n"], ids=["silent", "empty-lines"])
@again_if_untimely
async def test_ovl_03_who_begins_no_request_is_closed_without_a_word(stage: Stage, first: bytes) -> None:
    async with asyncio.timeout(20.0), stage.connected() as caller:
        began = time.monotonic()
        told = asyncio.ensure_future(caller.reader.read())
        while not told.done():
            caller.writer.write(first)
            await asyncio.wait((told,), timeout=0.2)
        assert await told == b""
        in_time(time.monotonic() - began, HEAD_S + SLACK_S, at_least=HEAD_S - 0.1)


@again_if_untimely
async def test_ovl_03_an_idle_connection_is_closed_and_a_second_request_has_its_own_deadlines(stage: Stage) -> None:
    data = body()
    async with asyncio.timeout(20.0), stage.connected() as caller:
        for _ in range(3):  # longer than IDLE_S in all
            caller.writer.write(head(stage, f"Content-Length: {len(data)}") + data)
            assert (await caller.answer())[0] == 200
            await asyncio.sleep(0.4 * IDLE_S)
        began = time.monotonic()
        assert await caller.reader.read() == b""
        in_time(time.monotonic() - began, IDLE_S + SLACK_S)
    async with asyncio.timeout(20.0), stage.connected() as caller:
        caller.writer.write(head(stage, f"Content-Length: {len(data)}") + data)
        assert (await caller.answer())[0] == 200
        caller.writer.write(b"POST")
        began = time.monotonic()
        assert (await caller.answer())[0] == 408
        in_time(time.monotonic() - began, HEAD_S + SLACK_S, at_least=HEAD_S - 0.1)


async def test_ovl_03_a_slow_but_timely_caller_is_served(stage: Stage) -> None:
    data = body()
    request = head(stage, f"Content-Length: {len(data)}")
    async with asyncio.timeout(20.0), stage.connected() as caller:
        for part in (request, data):
            for start in range(0, len(part), len(part) // 8):
                caller.writer.write(part[start : start + len(part) // 8])
                await asyncio.sleep(0.05)
        assert (await caller.answer())[0] == 200


async def connections_to(stage: Stage, number: int, opened: contextlib.AsyncExitStack) -> list[Caller]:
    callers = []
    for _ in range(number):
        with contextlib.suppress(ConnectionError):
            callers.append(await opened.enter_async_context(stage.connected()))
    return callers


async def served_again(stage: Stage) -> None:
    async with asyncio.timeout(10.0):
        while True:
            with contextlib.suppress(OSError):
                if (await stage.ask(GOOD)).status == 200:
                    return
            await asyncio.sleep(0.02)


@again_if_untimely
async def test_ovl_04_out_of_descriptors_the_admitted_are_served_and_the_rest_turned_away(stage: Stage) -> None:
    edge = stage.edge
    limits = resource.prlimit(edge.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(edge.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, limits[1]))
    data, logged = body(), len(stage.gateway.log)
    request = head(stage, f"Content-Length: {len(data)}") + data
    try:
        async with asyncio.timeout(20.0), contextlib.AsyncExitStack() as opened:
            connecting = time.monotonic()
            callers = await connections_to(stage, 400, opened)
            before_s, began = edge.cpu_times().user + edge.cpu_times().system, time.monotonic()
            admitted = refused = 0
            for caller in callers:  # the last ones first would find room that others have left
                with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                    caller.writer.write(request)
                    status, headers, _ = await caller.answer()
                    admitted += status == 200
                    refused += status == 503 and headers["retry-after"] == "1"
                    assert status in (200, 503)
            places, patient = (DESCRIPTORS - 64) // 2, time.monotonic() - connecting < HEAD_S
            assert admitted == places if patient else admitted <= places  # who had to wait so long for us was cut for silence
            assert refused > 0 and edge.num_fds() < DESCRIPTORS
            await asyncio.sleep(0.7)  # time for a loop that spins to be seen
            assert edge.cpu_times().user + edge.cpu_times().system - before_s < 0.2 * (time.monotonic() - began) + 0.2
        released = time.monotonic()
        await served_again(stage)
        in_time(time.monotonic() - released, 2.0)
        assert stage.edge.pid == edge.pid
        full = [line for line in stage.gateway.log[logged:] if line["event"] == "connections_full"]
        assert 1 <= len(full) <= 5
    finally:
        resource.prlimit(edge.pid, resource.RLIMIT_NOFILE, limits)


@again_if_untimely
async def test_ovl_04_below_what_was_foreseen_nothing_spins_or_ends(stage: Stage) -> None:
    """A limit under the descriptors in use: nothing can be accepted, nothing breaks, and it heals."""
    edge = stage.edge
    limits = resource.prlimit(edge.pid, resource.RLIMIT_NOFILE)
    try:
        async with asyncio.timeout(20.0), contextlib.AsyncExitStack() as opened:
            resource.prlimit(edge.pid, resource.RLIMIT_NOFILE, (edge.num_fds(), limits[1]))
            before_s = edge.cpu_times().user + edge.cpu_times().system
            await connections_to(stage, 50, opened)
            await asyncio.sleep(1.0)  # a loop that spins takes all of it, or half where others want the core
            assert edge.cpu_times().user + edge.cpu_times().system - before_s < 0.3
    finally:
        resource.prlimit(edge.pid, resource.RLIMIT_NOFILE, limits)
    released = time.monotonic()
    await served_again(stage)
    in_time(time.monotonic() - released, 2.0)
    assert stage.edge.pid == edge.pid
