"""The whole gateway as an operator runs it: real edges and control, real callers, a simulated provider.

The short forms of OPS-01, OPS-02, OPS-03 and OPS-08, and what a roll and a kill -9 of the supervisor leave behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import psutil  # type: ignore[import-untyped]
import pytest

from bench.behaviour import Behaviour
from bench.provider import Provider
from tests.conftest import MODEL, RunningGateway, StartGateway, eventually, render_catalog
from tests.timing import again_if_untimely, in_time

STREAM_S = 2.0
TOKENS = 20
LAME_DUCK_S = 0.8  # a little less than what it is
DRAIN_S = 30.0  # of gateways that are rolled or drained with streams under way
SLOW = Behaviour(tokens=TOKENS, tokens_per_s=TOKENS / STREAM_S)


class Callers:
    """Asks a gateway for completions and keeps what came back."""

    def __init__(self, gateway: RunningGateway, session: aiohttp.ClientSession) -> None:
        self._url = f"{gateway.url}/api/v1/chat/completions"
        self._headers = {"Authorization": f"Bearer {gateway.key}"}
        self._session = session
        self.outcomes: Counter[int | str] = Counter()

    async def ask(self) -> int:
        """One plain answer on a connection of its own; its status."""
        body = {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
        headers = {**self._headers, "Connection": "close"}
        async with self._session.post(self._url, json=body, headers=headers) as answer:
            await answer.read()
            return answer.status

    async def keep_asking(self, until: asyncio.Event) -> None:
        """One after another, each counted by its status or the kind of its failure."""
        while not until.is_set():
            try:
                self.outcomes[await self.ask()] += 1
            except (aiohttp.ClientError, TimeoutError) as error:
                self.outcomes[type(error).__name__] += 1

    async def stream(self, begun: asyncio.Semaphore) -> list[dict[str, Any] | None]:
        """The events of one stream, None for [DONE]; releases `begun` when its answer begins."""
        body = {"model": MODEL, "stream": True, "max_tokens": 1000, "messages": [{"role": "user", "content": "Hello"}]}
        async with self._session.post(self._url, json=body, headers=self._headers) as answer:
            assert answer.status == 200
            begun.release()
            data = (await answer.read()).decode()
        lines = [line.removeprefix("data: ") for line in data.splitlines() if line.startswith("data: ")]
        return [None if line == "[DONE]" else json.loads(line) for line in lines]


@contextlib.asynccontextmanager
async def calling(gateway: RunningGateway) -> AsyncIterator[Callers]:
    timeout = aiohttp.ClientTimeout(total=30.0)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        yield Callers(gateway, session)


@contextlib.asynccontextmanager
async def asking(callers: Callers, number: int = 2) -> AsyncIterator[None]:
    """Callers who ask all the time in the block."""
    until = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(number):
            tasks.create_task(callers.keep_asking(until))
        try:
            yield
        finally:
            until.set()


def start_two(start_gateway: StartGateway, provider: Provider, **server: Any) -> RunningGateway:
    return start_gateway({"north": f"{provider.url}/v1"}, workers=2, settings={"server": {"drain_s": DRAIN_S, **server}})


async def streams_begun(tasks: asyncio.TaskGroup, callers: Callers, number: int) -> list[asyncio.Task[list[dict[str, Any] | None]]]:
    begun = asyncio.Semaphore(0)
    streams = [tasks.create_task(callers.stream(begun)) for _ in range(number)]
    async with asyncio.timeout(10.0):
        for _ in streams:
            await begun.acquire()
    return streams


@again_if_untimely
async def test_ops_01_sigterm_finishes_every_stream_and_turns_readiness_red_first(start_gateway: StartGateway, provider: Provider) -> None:
    provider.set_behaviour(SLOW)
    gateway = start_two(start_gateway, provider)
    async with calling(gateway) as callers:
        async with asyncio.TaskGroup() as tasks:
            streams = await streams_begun(tasks, callers, 100)
            gateway.signal(signal.SIGTERM)
            before = time.monotonic()
            await eventually(lambda: gateway.ready_status() == 503)
            try:
                assert await callers.ask() == 200  # lame duck: red, and still open
            except aiohttp.ClientConnectorError:
                in_time(time.monotonic() - before, LAME_DUCK_S)  # later it may be closed
                raise
        for stream in streams:
            events = stream.result()
            assert events[-1] is None
            assert sum(1 for event in events if event and event["choices"] and event["choices"][0]["delta"].get("content")) == TOKENS
    assert await asyncio.to_thread(gateway.wait, 30.0) == 0
    assert time.monotonic() - before < DRAIN_S / 2  # and not when drain_s is over


async def test_ops_01_streams_alive_at_the_end_of_drain_s_get_an_error_event(start_gateway: StartGateway, provider: Provider) -> None:
    provider.set_behaviour(Behaviour(tokens=1000, tokens_per_s=20))
    gateway = start_gateway({"north": f"{provider.url}/v1"}, settings={"server": {"drain_s": 1.0}})
    async with calling(gateway) as callers:
        async with asyncio.TaskGroup() as tasks:
            streams = await streams_begun(tasks, callers, 5)
            gateway.signal(signal.SIGTERM)
        for stream in streams:
            last = stream.result()[-1]
            assert last is not None
            assert last["error"]["code"] >= 500
    assert await asyncio.to_thread(gateway.wait, 20.0) == 0


@again_if_untimely
async def test_ops_02_killed_edge_serves_again_within_two_seconds(start_gateway: StartGateway, provider: Provider) -> None:
    gateway = start_two(start_gateway, provider)
    dead = gateway.logged("process_ready", role="edge", slot=0)["child"]
    async with calling(gateway) as callers, asking(callers):
        await eventually(lambda: callers.outcomes[200] >= 20)
        os.kill(dead, signal.SIGKILL)
        before = time.monotonic()
        await asyncio.to_thread(gateway.logged, "process_ready", role="edge", slot=0, count=2)
        in_time(time.monotonic() - before, 2.0)
        served = callers.outcomes[200]
        await eventually(lambda: callers.outcomes[200] >= served + 20)
    assert sum(count for outcome, count in callers.outcomes.items() if outcome != 200) <= 2  # those that the dead edge held


async def test_ops_03_hung_edge_is_replaced_and_costs_only_its_own_requests(start_gateway: StartGateway, provider: Provider) -> None:
    gateway = start_two(start_gateway, provider, hang_s=1.0)
    hung = gateway.logged("process_ready", role="edge", slot=1)["child"]
    async with calling(gateway) as callers:
        async with asking(callers, 4):
            await eventually(lambda: callers.outcomes[200] >= 20)
            os.kill(hung, signal.SIGSTOP)
            await asyncio.to_thread(gateway.logged, "process_hung", child=hung)
            await asyncio.to_thread(gateway.logged, "process_ready", role="edge", slot=1, count=2)
        assert sum(count for outcome, count in callers.outcomes.items() if outcome != 200) <= 4  # one a caller at most
        assert [await callers.ask() for _ in range(20)] == [200] * 20


BAD_CATALOGS = {
    "syntax": ("[[providers]", "catalog.toml"),
    "unknown provider": (render_catalog({"north": "http://127.0.0.1:9/v1"}, {MODEL: ("south",)}), "models[0].endpoints[0].provider"),
    "negative price": (render_catalog({"north": "http://127.0.0.1:9/v1"}).replace('"0.000001"', '"-0.000001"'), "pricing.prompt"),
}


async def test_ops_08_bad_catalogs_are_refused_with_file_and_key_and_change_nothing(gateway: RunningGateway) -> None:
    async with calling(gateway) as callers, asking(callers):
        await eventually(lambda: callers.outcomes[200] >= 5)
        for number, (text, key) in enumerate(BAD_CATALOGS.values(), start=1):
            gateway.catalog.write_text(text)
            gateway.signal(signal.SIGHUP)
            refused = await asyncio.to_thread(gateway.logged, "catalog_refused", count=number)
            assert "catalog.toml" in json.dumps(refused["answer"])
            assert key in json.dumps(refused["answer"])
        served = callers.outcomes[200]
        await eventually(lambda: callers.outcomes[200] >= served + 5)
    assert set(callers.outcomes) == {200}


async def test_sighup_brings_a_new_model_into_service(gateway: RunningGateway, provider: Provider) -> None:
    gateway.catalog.write_text(render_catalog({"north": f"{provider.url}/v1"}, {"acme/other": ("north",)}))
    gateway.signal(signal.SIGHUP)
    await asyncio.to_thread(gateway.logged, "catalog_reloaded")
    body = {"model": "acme/other", "messages": [{"role": "user", "content": "Hello"}]}
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {gateway.key}"}) as session:
        async with session.post(f"{gateway.url}/api/v1/chat/completions", json=body) as answer:
            assert answer.status == 200


async def test_a_roll_loses_no_stream_and_no_request(start_gateway: StartGateway, provider: Provider) -> None:
    gateway = start_two(start_gateway, provider)
    provider.set_behaviour(SLOW)
    before = set(gateway.health()["edges"])
    async with calling(gateway) as callers, asyncio.TaskGroup() as tasks:
        streams = await streams_begun(tasks, callers, 20)
        provider.set_behaviour(Behaviour())
        async with asking(callers):
            gateway.signal(signal.SIGUSR2)
            await asyncio.to_thread(gateway.logged, "rolled", timeout_s=20.0)
        assert set(callers.outcomes) == {200}
    assert [stream.result()[-1] for stream in streams] == [None] * 20
    assert not set(gateway.health()["edges"]) & before


async def test_kill_9_of_the_supervisor_leaves_nothing_and_the_next_start_succeeds(gateway: RunningGateway) -> None:
    assert len(gateway.processes()) == 3
    gateway.signal(signal.SIGKILL)
    await eventually(lambda: not gateway.processes())
    await asyncio.to_thread(gateway.wait)
    await asyncio.to_thread(gateway.start)
    async with calling(gateway) as callers:
        assert await callers.ask() == 200


async def test_kept_connections_are_spread_over_the_edges(start_gateway: StartGateway, provider: Provider) -> None:
    gateway = start_two(start_gateway, provider)
    port = int(gateway.url.rpartition(":")[2])
    async with contextlib.AsyncExitStack() as opened:
        for _ in range(64):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            opened.callback(writer.close)

        def accepted() -> list[int]:
            held = (psutil.Process(edge).net_connections("tcp") for edge in gateway.health()["edges"])
            return [sum(each.status == "ESTABLISHED" and each.laddr.port == port for each in connections) for connections in held]

        await eventually(lambda: sum(accepted()) == 64)
        assert min(accepted()) >= 64 * 0.3


@pytest.mark.parametrize("role", ["edge", "control"])
def test_metrics_count_every_start(start_gateway: StartGateway, role: str) -> None:
    gateway = start_gateway({"north": "http://127.0.0.1:9/v1"})
    os.kill(gateway.logged("process_ready", role=role)["child"], signal.SIGKILL)
    gateway.logged("process_ready", role=role, count=2)
    deadline = time.monotonic() + 20.0
    while f'gateway_process_starts_total{{process="{role}"}} 2.0' not in gateway.metrics():
        assert time.monotonic() < deadline, gateway.metrics()
