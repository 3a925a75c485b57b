"""A node that starts beside a running one, with a real Prometheus between them, chooses well from its first request on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp.test_utils import unused_port

from bench.behaviour import Behaviour
from bench.provider import Provider
from tests.conftest import StartGateway, fetch
from tests.processes.test_fleet import Line, endpoints

QUICK, SLUGGISH = Behaviour(ttft_ms=5, tokens=8, tokens_per_s=1000), Behaviour(ttft_ms=200, tokens=8, tokens_per_s=1000)
STREAMS = 20


@contextlib.asynccontextmanager
async def scraping(folder: Path, target: str) -> AsyncIterator[str]:
    """A Prometheus that scrapes this address each second; its URL."""
    config = folder / "prometheus.json"  # JSON is YAML
    job = {"job_name": "gateway", "static_configs": [{"targets": [target]}]}
    config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}))
    port = unused_port()  # it cannot say which port the kernel chose
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 20)


async def increase(url: str) -> float:
    """Successful attempts that it has seen happen."""
    query = 'sum(increase(gateway_attempts_total{outcome="ok"}[300s]))'
    try:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/api/v1/query", params={"query": query}) as answer:
            result = (await answer.json())["data"]["result"]
    except aiohttp.ClientError:
        return 0.0
    return float(result[0]["value"][1]) if result else 0.0


@pytest.mark.system("prometheus")
async def test_a_new_node_knows_what_the_fleet_saw(start_gateway: StartGateway, provider: Provider, tmp_path: Path) -> None:
    provider.set_behaviour(SLUGGISH)
    async with Provider(name="South", behaviour=QUICK) as quick:
        providers = {"north": f"{provider.url}/v1", "south": f"{quick.url}/v1"}
        old = await asyncio.to_thread(start_gateway, providers)
        async with scraping(tmp_path, old.operations_url.removeprefix("http://")) as url, aiohttp.ClientSession() as session:
            line = Line(old, session)
            async with asyncio.timeout(60):
                while await increase(url) < 4 * STREAMS:
                    await line.ask(provider={"order": ["north"]})
                    await line.ask(provider={"order": ["south"]})
            new = await asyncio.to_thread(start_gateway, providers, settings={"routing": {"prometheus_url": url}})
            read = await asyncio.to_thread(new.logged, "prometheus_read")
            assert read["endpoints"] == 2
            assert json.loads(fetch(f"{new.url}/api/v1/models/count")[1])["data"]["count"] == 1
            before = endpoints(new)
            assert before["south"]["uptime_last_5m"] == 100.0
            assert before["north"]["latency_last_30m"]["p50"] > 100 > 50 > before["south"]["latency_last_30m"]["p50"]
            asked = provider.books.requests
            served = await Line(new, session).served(STREAMS)
            assert served["South"] >= STREAMS - 2, served  # a cold one shares them out evenly until it knows
            assert provider.books.requests - asked == served["North"]
