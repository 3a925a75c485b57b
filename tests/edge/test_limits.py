"""INP-02, INP-03, INP-04, OVL-08 and what else a caller can overdo: refused early, readably, and without memory.

Also the plain mistakes: wrong methods, unknown paths, bodies that are not requests. Each is a JSON error that repeats nothing of the input.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import time
import zlib

import psutil  # type: ignore[import-untyped]
import pytest

from tests.edge.stage import GOOD, HELLO, Stage, stage_of
from tests.provider_caller import Caller
from tests.timing import again_if_untimely, in_time

pytestmark = pytest.mark.asyncio(loop_scope="module")

BODY_BYTES_MAX = 1_000_000
ROUTE = "/api/v1/chat/completions"
CANARY = "zebra-9471"
MIB = 1024 * 1024


stage = stage_of(settings={"server": {"body_bytes_max": BODY_BYTES_MAX, "write_stall_s": 2.0}})


def head(stage: Stage, *lines: str, target: str = ROUTE, method: str = "POST") -> bytes:
    """A request's head, authorised."""
    key = f"Authorization: Bearer {stage.gateway.key}"
    return "\r\n".join((f"{method} {target} HTTP/1.1", "Host: gw", key, *lines, "", "")).encode()


def body(**fields: object) -> bytes:
    return json.dumps({"model": GOOD, "max_tokens": 2, "messages": HELLO, **fields}, separators=(",", ":")).encode()


def request(stage: Stage, *lines: str, target: str = ROUTE, data: bytes = b"") -> bytes:
    data = data or body()
    return head(stage, *lines, f"Content-Length: {len(data)}", target=target) + data


async def error_of(caller: Caller) -> int:
    """The status of an answer that is a JSON error of ours."""
    status, headers, data = await caller.answer()
    error = json.loads(data)["error"]
    assert error["code"] == status and error["message"]
    assert headers["content-type"] == "application/json"
    assert CANARY not in data.decode() and "Traceback" not in data.decode() and ".py" not in data.decode()
    return status


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


# INP-02

OVERSIZED = {
    "129-headers": (431, [f"X-{i}: a" for i in range(126)], ROUTE),
    "9-KiB-value": (431, [f"X: {'a' * 9216}"], ROUTE),
    "9-KiB-name": (431, [f"{'X' * 9216}: a"], ROUTE),
    "40-KiB-of-headers": (431, [f"X-{i}: {'a' * 4000}" for i in range(10)], ROUTE),
    "100-KiB-target": (414, [], f"{ROUTE}?{'a' * 102_400}"),
    "9-KiB-target": (414, [], f"{ROUTE}?{'a' * 9216}"),
}


@pytest.mark.parametrize("segments", ["whole", "of-one-byte"])
@pytest.mark.parametrize("name", OVERSIZED)
async def test_inp_02_oversized_heads_are_refused(stage: Stage, name: str, segments: str) -> None:
    expected, lines, target = OVERSIZED[name]
    data = request(stage, *lines, target=target)
    stage.good.books.clear()
    before = stage.rss_bytes()
    async with asyncio.timeout(20.0), stage.connected() as caller:
        answered = asyncio.ensure_future(error_of(caller))
        if segments == "whole":
            caller.writer.write(data)
        for position in range(len(data) if segments == "of-one-byte" else 0):
            caller.writer.write(data[position : position + 1])
            await asyncio.sleep(0)
            if answered.done():
                break
        assert await answered == expected
        assert await caller.reader.read() == b""
    assert stage.rss_bytes() - before < 8 * MIB
    assert not stage.good.books.entries


async def test_inp_02_heads_at_the_limits_are_served(stage: Stage) -> None:
    at_limits = ([f"X-{i}: a" for i in range(125)], [f"X: {'a' * 8000}"], [f"X-{i}: {'a' * 7000}" for i in range(4)])
    async with asyncio.timeout(20.0), stage.connected() as caller:
        for lines in at_limits:
            caller.writer.write(request(stage, *lines))
            assert (await caller.answer())[0] == 200
        caller.writer.write(request(stage, target=f"{ROUTE}?{'a' * 8000}"))
        assert (await caller.answer())[0] == 200


async def test_inp_02_an_endless_head_costs_no_memory(stage: Stage) -> None:
    before = stage.rss_bytes()
    async with asyncio.timeout(20.0), stage.connected() as caller:
        caller.writer.write(head(stage, "X: a").removesuffix(b"\r\n"))
        for number in range(1000):
            caller.writer.write(b"X-%d: %b\r\n" % (number, b"a" * 4000))
        assert await error_of(caller) == 431
    assert stage.rss_bytes() - before < 8 * MIB


# INP-03


def bomb(coding: str) -> bytes:
    """A small body that inflates to 20 MiB, for the codings that the standard library can make."""
    data = body(user="x" * (20 * MIB))
    if coding == "gzip":
        return gzip.compress(data)
    return zlib.compress(data) if coding == "deflate" else b"\x28\xb5\x2f\xfd" + data[:100]


CODINGS = ["gzip", "GZIP", "deflate", "br", "zstd", "compress", "x-gzip", "gzip, gzip", "identity, gzip", "", "none"]


@pytest.mark.parametrize("coding", CODINGS)
async def test_inp_03_compressed_bodies_are_refused(stage: Stage, coding: str) -> None:
    stage.good.books.clear()
    before = stage.rss_bytes()
    async with asyncio.timeout(20.0), stage.connected() as caller:
        caller.writer.write(request(stage, f"Content-Encoding: {coding}", data=bomb(coding.lower())))
        assert await error_of(caller) == 415
    async with asyncio.timeout(20.0), stage.connected() as caller:
        data = bomb(coding.lower())
        lines = ("Content-Encoding: identity", f"Content-Encoding: {coding}", "Transfer-Encoding: chunked")
        caller.writer.write(head(stage, *lines) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))
        assert await error_of(caller) == 415
    assert stage.rss_bytes() - before < 2 * BODY_BYTES_MAX
    assert not stage.good.books.entries


async def test_inp_03_the_identity_coding_is_none(stage: Stage) -> None:
    async with asyncio.timeout(20.0), stage.connected() as caller:
        caller.writer.write(request(stage, "Content-Encoding: identity"))
        assert (await caller.answer())[0] == 200


# INP-04


@pytest.mark.parametrize("segments", ["together", "one-each"])
@again_if_untimely
async def test_inp_04_tiny_chunks_cost_little(stage: Stage, segments: str) -> None:
    data = body(user="", padding="x" * MIB)[:MIB]
    edge = stage.edge
    slowest_s = 0.0
    async with asyncio.timeout(20.0), stage.connected() as caller, stage.connected() as neighbour:
        before_s = cpu_s(edge)
        caller.writer.write(head(stage, "Transfer-Encoding: chunked"))
        refused = asyncio.ensure_future(error_of(caller))
        if segments == "together":
            caller.writer.write(b"".join(b"1\r\n%c\r\n" % byte for byte in data) + b"0\r\n\r\n")
        for position in range(20_000):
            if refused.done():
                break
            if segments == "one-each":
                caller.writer.write(b"1\r\n%c\r\n" % data[position])
            if position % 1000 == 0:
                slowest_s = max(slowest_s, await ping(neighbour))
            await asyncio.sleep(0)
        assert await refused in (400, 413)
        assert cpu_s(edge) - before_s <= 1.0
    in_time(slowest_s, 0.25)


async def ping(caller: Caller) -> float:
    """Seconds that the edge took for the smallest request."""
    began = time.monotonic()
    caller.writer.write(f"OPTIONS {ROUTE} HTTP/1.1\r\nHost: gw\r\n\r\n".encode())
    assert (await caller.head())[0] == 204
    return time.monotonic() - began


# The body's limit.


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_body_over_the_limit_is_413_also_for_who_sends_it_all_before_reading(stage: Stage, framing: str) -> None:
    data = b"x" * (8 * BODY_BYTES_MAX)
    stage.good.books.clear()
    before = stage.rss_bytes()
    async with asyncio.timeout(20.0), stage.connected() as caller:
        if framing == "length":
            caller.writer.write(head(stage, f"Content-Length: {len(data)}") + data)
        else:
            caller.writer.write(head(stage, "Transfer-Encoding: chunked"))
            for start in range(0, len(data), 100_000):
                caller.writer.write(b"186a0\r\n%b\r\n" % data[start : start + 100_000])
            caller.writer.write(b"0\r\n\r\n")
        await caller.writer.drain()  # raises when the connection was reset
        assert await error_of(caller) == 413
        assert await caller.reader.read() == b""
    assert stage.rss_bytes() - before < 4 * BODY_BYTES_MAX
    assert not stage.good.books.entries


@pytest.mark.parametrize("key", ["missing", "unknown"])
async def test_an_early_refusal_is_readable_for_who_sends_it_all_before_reading(stage: Stage, key: str) -> None:
    line = "X: y" if key == "missing" else "Authorization: Bearer sk-or-v1-unknown"
    data = b"x" * BODY_BYTES_MAX
    for _ in range(5):
        async with asyncio.timeout(20.0), stage.connected() as caller:
            caller.writer.write(f"POST {ROUTE} HTTP/1.1\r\nHost: gw\r\n{line}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
            await caller.writer.drain()
            assert await error_of(caller) == 401


async def test_body_at_the_limit_is_served_and_one_byte_more_is_not(stage: Stage) -> None:
    data = body(padding="x" * (BODY_BYTES_MAX - len(body(padding=""))))
    async with asyncio.timeout(20.0), stage.connected() as caller:
        caller.writer.write(request(stage, data=data))
        assert (await caller.answer())[0] == 200
        caller.writer.write(head(stage, "Transfer-Encoding: chunked") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))
        assert (await caller.answer())[0] == 200
        caller.writer.write(head(stage, "Transfer-Encoding: chunked") + b"%x\r\n %b\r\n0\r\n\r\n" % (len(data) + 1, data))
        assert await error_of(caller) == 413


async def test_a_refused_body_is_one_log_line_with_its_own_status(stage: Stage) -> None:
    begun = await logged_so_far(stage)
    async with asyncio.timeout(20.0), stage.connected() as caller:
        caller.writer.write(head(stage, "Transfer-Encoding: chunked") + b"zz\r\n")
        assert await error_of(caller) == 400
    ended = await logged_so_far(stage) - 1
    assert [line["status"] for line in stage.gateway.log[begun:ended] if line["event"] in ("exchange", "refused")] == [400]


async def logged_so_far(stage: Stage) -> int:
    """The number of log lines once all that happened before is among them; the last one is of a request made here."""
    generation = (await stage.ask(GOOD)).headers["X-Generation-Id"]
    line = await asyncio.to_thread(stage.exchange, generation)
    return stage.gateway.log.index(line) + 1


# Plain mistakes.

NOT_REQUESTS = {
    "empty": b"",
    "not-json": CANARY.encode(),
    "cut": body(user=CANARY)[:-10],
    "list": b'["%b"]' % CANARY.encode(),
    "string": b'"%b"' % CANARY.encode(),
    "number": b"9471",
    "null": b"null",
    "not-utf-8": body(user=CANARY).replace(b"zebra", b"\xff\xfe"),
    "byte-order-mark": b"\xef\xbb\xbf" + body(),
    "nested": b'{"model":"%b","x":%b%b}' % (GOOD.encode(), b"[" * 5000, b"]" * 5000),
    "no-model": b'{"messages":[]}',
    "no-messages": b'{"model":"%b"}' % GOOD.encode(),
    "unknown-model": body(model=CANARY),
    "unknown-fallback": body(models=[CANARY]),
    "model-of-wrong-type": body(model={CANARY: 1}),
    "unknown-role": body(messages=[{"role": CANARY, "content": "x"}]),
    "unknown-route": body(route=CANARY),
    "text-for-number": body(max_tokens=CANARY),
    "text-for-list": body(tools=CANARY),
    "wrong-name-in-map": body(logit_bias={CANARY: CANARY}),
    "wrong-metadata": body(metadata={CANARY: 1}),
    "wrong-content": body(messages=[{"role": "user", "content": {CANARY: CANARY}}]),
    "repeated-key": b'{"model":"%b",%b' % (CANARY.encode(), body()[1:]),
}


@pytest.mark.parametrize("name", NOT_REQUESTS)
async def test_bodies_that_are_not_requests_are_400_and_not_repeated(stage: Stage, name: str) -> None:
    stage.good.books.clear()
    data = NOT_REQUESTS[name]
    async with asyncio.timeout(20.0), stage.connected() as caller:
        caller.writer.write(head(stage, f"Content-Length: {len(data)}") + data)
        assert await error_of(caller) == 400
        await ping(caller)  # and the connection goes on
    assert not stage.good.books.entries


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "HEAD", "TRACE", "PROPFIND"])
@pytest.mark.parametrize("path", [ROUTE, "/v1/completions"])
async def test_other_methods_are_405_with_allow(stage: Stage, path: str, method: str) -> None:
    async with asyncio.timeout(20.0), stage.connected() as caller:
        caller.writer.write(head(stage, f"X: {CANARY}", target=path, method=method))
        status, headers = await caller.head()
        assert status == 405 and headers["allow"] == "POST, OPTIONS"
        assert headers["content-type"] == "application/json"
        if method != "HEAD":
            data = await caller.reader.readexactly(int(headers["content-length"]))
            assert json.loads(data)["error"]["code"] == 405 and CANARY.encode() not in data
        await ping(caller)


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("path", [f"/{CANARY}", f"/api/v1/{CANARY}", f"{ROUTE}/", f"{ROUTE}/{CANARY}", "/api/v2/models"])
async def test_unknown_paths_are_404(stage: Stage, path: str, method: str) -> None:
    async with asyncio.timeout(20.0), stage.connected() as caller:
        caller.writer.write(head(stage, "Content-Length: 2", target=path, method=method) + b"{}")
        assert await error_of(caller) == 404
        await ping(caller)


# OVL-08


@again_if_untimely
async def test_ovl_08_ten_thousand_pipelined_requests_are_answered_in_order(stage: Stage) -> None:
    number = 10_000
    requests = b"".join(
        head(stage, target=ROUTE if i % 2 else "/v1/completions", method="OPTIONS" if i % 5 else "GET") for i in range(number)
    )
    before = stage.rss_bytes()
    async with asyncio.timeout(20.0), stage.connected() as caller, stage.connected() as neighbour:
        sending, slowest_s = asyncio.ensure_future(send_all(caller, requests)), 0.0
        for i in range(number):
            status, headers = await caller.head()
            assert status == (204 if i % 5 else 405), i
            if status == 405:
                await caller.reader.readexactly(int(headers["content-length"]))
            if i % 2000 == 0:
                slowest_s = max(slowest_s, await ping(neighbour))
        await sending
    in_time(slowest_s, 1.0)
    assert stage.rss_bytes() - before < 16 * MIB


async def send_all(caller: Caller, data: bytes) -> None:
    for start in range(0, len(data), 65536):
        caller.writer.write(data[start : start + 65536])
        await caller.writer.drain()


async def test_ovl_08_different_pipelined_requests_keep_their_order(stage: Stage) -> None:
    """Answers that take a provider, control, or nothing at all come back in the order of their requests, however they were cut."""
    kinds = [
        (200, request(stage)),
        (404, head(stage, target="/nowhere", method="GET")),
        (200, request(stage, data=body(stream=True))),
        (405, head(stage, method="GET")),
        (400, request(stage, data=b"{}")),
        (200, head(stage, target="/api/v1/models", method="GET")),
    ]
    stage.good.books.clear()
    data = b"".join(data for _, data in kinds) * 20
    async with asyncio.timeout(20.0), stage.connected() as caller:
        for start in range(0, len(data), 97):
            caller.writer.write(data[start : start + 97])
            await asyncio.sleep(0)
        for expected in [status for status, _ in kinds] * 20:
            assert (await caller.answer())[0] == expected
    assert len(stage.good.books.entries) == 40


@again_if_untimely
async def test_ovl_08_a_pipeliner_who_does_not_read_is_paused_and_then_cut(stage: Stage) -> None:
    """Without a reader nothing more is begun: neither answers nor requests pile up."""
    before = stage.rss_bytes()
    one = head(stage, target="/api/v1/models", method="GET")
    async with asyncio.timeout(20.0), stage.connected() as caller:
        transport = caller.writer.transport
        transport.pause_reading()  # type: ignore[attr-defined]
        began = time.monotonic()
        with pytest.raises(ConnectionError):
            while True:
                caller.writer.write(one * 200)
                await caller.writer.drain()
                await asyncio.sleep(0)
        in_time(time.monotonic() - began, 6.0, at_least=1.5)
    assert stage.rss_bytes() - before < 16 * MIB
