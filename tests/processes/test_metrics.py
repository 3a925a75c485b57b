"""Figures of the fleet: bounded in number whatever callers send (OPS-04), never falling whoever dies (OPS-05), and complete."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import string

import aiohttp

from bench.behaviour import Behaviour
from bench.provider import Provider
from gateway.domain.metrics import METRICS
from tests.conftest import MODEL, RunningGateway, StartGateway, eventually, fetch
from tests.processes.test_gateway import Callers, asking, calling, start_two

KILLS = 5
JUNK = 2000
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "BREW", "PROPFIND")
SERIES_MAX = 5000


def series(text: str) -> dict[str, float]:
    """Samples of Prometheus' text format: name with labels -> figure."""
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line and not line.startswith("#")}


def counters(text: str) -> dict[str, float]:
    """The samples that may only grow."""
    names = {metric.name for metric in METRICS.values() if metric.kind == "counter"}
    grown = tuple(metric.name + end for metric in METRICS.values() if metric.kind == "histogram" for end in ("_bucket", "_count", "_sum"))
    return {name: value for name, value in series(text).items() if name.partition("{")[0] in names or name.startswith(grown)}


async def callers_served(callers: Callers, more: int) -> None:
    wanted = callers.outcomes[200] + more
    await eventually(lambda: callers.outcomes[200] >= wanted)


def scrape(gateway: RunningGateway) -> str:
    status, body = fetch(f"{gateway.operations_url}/metrics")
    return body.decode() if status == 200 else ""


async def test_ops_04_junk_makes_no_series(gateway: RunningGateway) -> None:
    rng = random.Random(7)

    def word() -> str:
        return "junk" + "".join(rng.choices(string.ascii_letters + string.digits, k=12))

    async def junk(session: aiohttp.ClientSession, places: asyncio.Semaphore, number: int) -> None:
        url = f"{gateway.url}/api/v1/chat/completions"
        body = {"model": f"acme/{word()}" if number % 2 else MODEL, "messages": [{"role": "user", "content": "x"}], word(): 1}
        async with places:
            if number % 4 < 2:
                headers = {"Authorization": f"Bearer {gateway.key if number % 8 < 4 else word()}", f"X-{word()}": word()}
                async with session.post(url, json=body, headers=headers) as answer:
                    await answer.read()
            else:
                path = f"/{word()}/{word()}" if number % 4 == 2 else f"/api/v1/models/{word()}/{word()}?{word()}={word()}"
                async with session.request(rng.choice(METHODS), gateway.url + path, data=b"x") as answer:
                    await answer.read()

    async with calling(gateway) as callers:
        assert await callers.ask() == 200
        assert await callers.ask() == 200
    await eventually(lambda: "gateway_requests_total" in scrape(gateway) and 'code="200"' in scrape(gateway))
    before = series(await asyncio.to_thread(scrape, gateway))
    places = asyncio.Semaphore(32)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=32)) as session:
        await asyncio.gather(*(junk(session, places, number) for number in range(JUNK)))

    def answered() -> float:
        return sum(value for name, value in series(scrape(gateway)).items() if name.startswith("gateway_requests_total{"))

    async with asyncio.timeout(20.0):
        while await asyncio.to_thread(answered) < JUNK:
            await asyncio.sleep(0.1)
    text = await asyncio.to_thread(scrape, gateway)
    after = series(text)
    assert "junk" not in text and gateway.key not in text and gateway.account_id not in text
    assert len(after) <= SERIES_MAX
    codes = {name for name in after if name.startswith(("gateway_requests_total", "gateway_refusals_total"))}
    assert len(codes) <= 40, codes
    assert len(after) - len(before) <= 40
    allowed = {label for metric in METRICS.values() for label in metric.labels} | {"le"}
    assert set(re.findall(r'[{,](\w+)="', text)) <= allowed


async def test_ops_05_no_figure_of_the_fleet_ever_falls(start_gateway: StartGateway, provider: Provider) -> None:
    gateway = start_two(start_gateway, provider)
    falls: list[tuple[str, float, float]] = []
    scrapes: list[float] = []
    done = asyncio.Event()

    async def watch() -> None:
        """A scrape each 100 ms; one that fails while control is being replaced tells nothing."""
        highest: dict[str, float] = {}
        while not done.is_set():
            began = asyncio.get_running_loop().time()
            text = await asyncio.to_thread(scrape, gateway)
            if text:
                scrapes.append(asyncio.get_running_loop().time() - began)
                now = counters(text)
                falls.extend((name, value, now.get(name, -1.0)) for name, value in highest.items() if now.get(name, -1.0) < value)
                highest |= now
            await asyncio.sleep(0.1)

    async with calling(gateway) as callers, asyncio.TaskGroup() as tasks:
        tasks.create_task(watch())
        async with asking(callers, 4):
            for kill in range(KILLS):
                slot = kill % 2
                count = 1 + kill // 2
                ready = await asyncio.to_thread(gateway.logged, "process_ready", role="edge", slot=slot, count=count)
                await callers_served(callers, 20)
                os.kill(ready["child"], signal.SIGKILL)
                if kill == KILLS // 2:
                    control = await asyncio.to_thread(gateway.logged, "process_ready", role="control")
                    os.kill(control["child"], signal.SIGKILL)
                    await asyncio.to_thread(gateway.logged, "process_ready", role="control", count=2)
            await asyncio.to_thread(gateway.logged, "process_ready", role="edge", slot=0, count=4)
        asked = sum(callers.outcomes.values())
        seen = len(scrapes)
        await eventually(lambda: len(scrapes) >= seen + 12, 20.0)  # reports come each second
        done.set()
    assert falls == []
    assert sorted(scrapes)[len(scrapes) // 2] <= 0.1
    figures = counters(await asyncio.to_thread(scrape, gateway))
    served_total = sum(value for name, value in figures.items() if name.startswith("gateway_requests_total{") and 'code="200"' in name)
    # A killed edge takes with it what it had counted since its last report, at most a second of its work: here most of it.
    assert 0 < served_total <= asked + 10
    assert figures['gateway_process_starts_total{process="edge"}'] == 2 + KILLS
    assert figures['gateway_process_starts_total{process="control"}'] == 2


async def test_every_metric_of_the_table_is_exported(gateway: RunningGateway, provider: Provider) -> None:
    async with calling(gateway) as callers:
        assert await callers.ask() == 200
        await callers.stream(asyncio.Semaphore(0))
        provider.set_behaviour(Behaviour(status=500))
        assert await callers.ask() == 502
    junk = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 7\n\n" + b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
    provider.set_behaviour(Behaviour(raw=(junk,)))
    async with calling(gateway) as callers:
        await callers.stream(asyncio.Semaphore(0))
    gateway.signal(signal.SIGHUP)
    await asyncio.to_thread(gateway.logged, "catalog_reloaded")

    broken = f'gateway_attempts_total{{model="{MODEL}",outcome="stream_broken",provider="north"}}'
    figures: dict[str, float] = {}
    async with asyncio.timeout(20.0):
        while broken not in figures:
            await asyncio.sleep(0.1)
            figures = series(await asyncio.to_thread(scrape, gateway))
    assert set(METRICS) - {re.sub("_(bucket|count|sum)$", "", name.partition("{")[0]) for name in figures} == set()
    assert figures['gateway_requests_total{code="200",route="chat_completions"}'] == 2
    assert figures['gateway_requests_total{code="502",route="chat_completions"}'] == 2  # one of them in its stream
    assert figures[f'gateway_attempts_total{{model="{MODEL}",outcome="ok",provider="north"}}'] == 2
    assert figures[f'gateway_attempts_total{{model="{MODEL}",outcome="upstream_refused",provider="north"}}'] == 2  # asked once more
    assert figures[broken] == 1
    assert figures['gateway_dropped_events_total{provider="north"}'] == 1
    assert figures[f'gen_ai_server_time_to_first_token_seconds_count{{model="{MODEL}",provider="north"}}'] == 1
    assert figures[f'gen_ai_server_request_duration_seconds_count{{model="{MODEL}",provider="north"}}'] == 2
    assert figures[f'gen_ai_client_token_usage{{model="{MODEL}",provider="north",token_type="output"}}'] == 20
    assert figures["gateway_inflight_requests"] == 0
    assert figures["gateway_edges"] == 1
