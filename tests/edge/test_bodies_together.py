"""Bodies of many callers at once: bounded together, and where nobody has shown a key yet, small (OVL-05)."""

from __future__ import annotations

import asyncio
import contextlib
import re

import pytest

from gateway.edge.bodies import Bodies, bodies_of, limits, memory_bytes
from gateway.settings import Server
from tests.conftest import eventually
from tests.edge.stage import GOOD, HELLO, Stage, stage_of
from tests.provider_caller import Caller

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20
ROUTE = "/api/v1/chat/completions"
BODY, TOGETHER = 4 * MIB, 16 * MIB
stage = stage_of(settings={"server": {"body_bytes_max": BODY, "bodies_bytes_max": TOGETHER}})


def head(stage: Stage, path: str, framing: str) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: gw\r\nAuthorization: Bearer {stage.gateway.key}\r\n{framing}\r\n\r\n".encode()


def held_bytes(stage: Stage) -> int:
    (value,) = re.findall(r"^gateway_body_bytes (\S+)$", stage.gateway.metrics(), re.MULTILINE)
    return int(float(value))


async def begin(stage: Stage, caller: Caller) -> int:
    """Sends all but the end of a large body; the status, if it was answered all the same, else 0."""
    caller.writer.write(head(stage, ROUTE, f"Content-Length: {BODY}") + b" " * (BODY - MIB // 2))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            status, headers, _ = await caller.answer()
            assert headers["retry-after"] == "1" and headers["connection"] == "close"
            return status
    return 0


async def test_ovl_05_large_bodies_take_no_more_memory_than_they_may_and_small_requests_are_served(stage: Stage) -> None:
    await stage.ask(GOOD)
    stage.forget_peak()
    before = stage.peak_bytes()
    async with contextlib.AsyncExitStack() as opened:
        callers = [await opened.enter_async_context(stage.connected()) for _ in range(30)]
        statuses = await asyncio.gather(*(begin(stage, caller) for caller in callers))
        assert set(statuses) == {0, 503} and statuses.count(0) >= TOGETHER // BODY
        assert stage.peak_bytes() - before < TOGETHER + 16 * MIB
        await eventually(lambda: 0 < held_bytes(stage) <= TOGETHER)
        assert (await stage.ask(GOOD)).status == 200
    await eventually(lambda: held_bytes(stage) == 0)
    large = [{"role": "user", "content": "x" * 100_000}]
    assert (await stage.ask(GOOD, messages=large, max_tokens=1)).status == 200
    await eventually(lambda: held_bytes(stage) == 0)


@pytest.mark.parametrize("framing", ["Content-Length: 1048577", "Transfer-Encoding: chunked"])
async def test_ovl_05_where_no_key_was_asked_for_yet_a_body_is_small(stage: Stage, framing: str) -> None:
    async with stage.connected() as caller:
        caller.writer.write(head(stage, "/api/v1/keys", framing).replace(stage.gateway.key.encode(), b"none"))
        if "chunked" in framing:
            caller.writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            for _ in range(16):
                caller.writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        assert (await caller.answer())[0] == 413  # before the rest of it was sent
    assert (await stage.ask(GOOD, messages=HELLO)).status == 200


async def test_inp_13_what_control_takes_passes(stage: Stage) -> None:
    async with stage.connected() as caller:
        body = b'{"name":"' + b"x" * (MIB - 11) + b'"}'
        caller.writer.write(head(stage, "/api/v1/keys", f"Content-Length: {len(body)}") + body)
        assert (await caller.answer())[0] in (400, 403)


async def test_bodies_are_counted_up_to_the_bound_and_not_beyond(tmp_path_factory: pytest.TempPathFactory) -> None:
    bodies = Bodies(10)
    assert bodies.take(7) and not bodies.take(4) and bodies.take(3) and not bodies.take(1)
    bodies.give_back(10)
    assert bodies.held == 0
    assert bodies_of(Server(body_bytes_max=100, bodies_bytes_max=1000), 2).bytes_max == 500
    assert bodies_of(Server(body_bytes_max=100, bodies_bytes_max=1000), 64).bytes_max == 200  # two, whatever else
    assert bodies_of(Server(body_bytes_max=1), 2).bytes_max == memory_bytes() // 8


async def test_the_limit_of_a_control_group_is_found_at_any_level(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("groups")
    own = folder / "cgroup"
    own.write_text("0::/a/b\n")
    assert limits(folder, own) == [folder / "a/b/memory.max", folder / "a/memory.max", folder / "memory.max"]
    own.write_text("5:cpu,cpuacct:/x\n4:memory:/y\n0::/\n")
    assert limits(folder, own) == [
        folder / "memory/y/memory.limit_in_bytes",
        folder / "memory/memory.limit_in_bytes",
        folder / "memory.max",
    ]
    assert limits(folder, folder / "nothing") == []
