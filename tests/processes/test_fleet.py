"""What one edge sees of endpoints, all edges go by, and operators and callers are shown; compared with the provider's own books."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from math import ceil
from typing import Any

import aiohttp

from bench.behaviour import Behaviour
from bench.books import Entry
from bench.provider import Provider
from tests.conftest import MODEL, RunningGateway, StartGateway, eventually, fetch
from tests.processes.test_metrics import series
from tests.timing import Untimely, again_if_untimely

QUICK, SLUGGISH, BROWNED = (Behaviour(ttft_ms=ttft_ms, tokens=8, tokens_per_s=1000) for ttft_ms in (5, 20, 500))
EXPLORED = 6  # of 60 streams: to find out whether an endpoint that was better once has healed
MOVED_S = 3.0  # from one edge's evidence to another edge's traffic: a report, a push, and some room for a busy machine
SHARES = {"p50": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99}
WITHIN = 0.02


class Line:
    """One kept connection, which is one edge's, and streams on it."""

    def __init__(self, gateway: RunningGateway, session: aiohttp.ClientSession, key: str = "") -> None:
        self._gateway = gateway
        self._session = session
        self._key = key or gateway.key
        self.edge = 0  # its process id, once a stream told

    async def ask(self, **more: Any) -> tuple[int, str]:
        """Status, and the name of the provider that served; also makes out whose connection it is."""
        body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "Hello"}], **more}
        url = f"{self._gateway.url}/api/v1/chat/completions"
        async with self._session.post(url, json=body, headers={"Authorization": f"Bearer {self._key}"}) as answer:
            text = (await answer.read()).decode()
        if answer.status != 200:
            return answer.status, ""
        first = next(json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {"))
        if not self.edge:
            line = await asyncio.to_thread(self._gateway.logged, "exchange", generation=first["id"])
            self.edge = line["pid"]
        return 200, first["provider"]

    async def served(self, number: int) -> Counter[str]:
        """By whom so many streams were, one after another."""
        return Counter([(await self.ask())[1] for _ in range(number)])


@contextlib.asynccontextmanager
async def a_line_to_each(gateway: RunningGateway, keys: Sequence[str] = ("",)) -> AsyncIterator[list[dict[int, Line]]]:
    """For each key, a line to either of two edges, by its process id. Which edge gets a connection is the kernel's choice."""
    async with contextlib.AsyncExitStack() as open_sessions:
        found: list[dict[int, Line]] = []
        for key in keys:
            lines: dict[int, Line] = {}
            while len(lines) < 2:
                connector = aiohttp.TCPConnector(limit=1)
                session = await open_sessions.enter_async_context(aiohttp.ClientSession(connector=connector))
                line = Line(gateway, session, key)
                assert (await line.ask())[0] == 200
                lines.setdefault(line.edge, line)
            found.append(dict(sorted(lines.items())))
        yield found


def endpoints(gateway: RunningGateway) -> dict[str, dict[str, Any]]:
    """Rows of the endpoints API by provider."""
    status, body = fetch(f"{gateway.url}/api/v1/models/{MODEL}/endpoints")
    assert status == 200
    return {row["tag"]: row for row in json.loads(body)["data"]["endpoints"]}


@again_if_untimely
async def test_a_brown_out_that_one_edge_sees_moves_the_traffic_of_the_other(start_gateway: StartGateway, provider: Provider) -> None:
    provider.set_behaviour(QUICK)
    async with Provider(name="South", behaviour=SLUGGISH) as other:
        gateway = start_gateway({"north": f"{provider.url}/v1", "south": f"{other.url}/v1"}, workers=2)
        async with a_line_to_each(gateway) as [lines], asyncio.timeout(60.0):
            first, second = lines.values()
            while min((await first.served(10))["North"], (await second.served(10))["North"]) < 9:
                pass  # both come to know both, and prefer the quick one
            provider.set_behaviour(BROWNED)
            async with asyncio.TaskGroup() as tasks:
                asking = tasks.create_task(first.served(10_000))
                await asyncio.sleep(MOVED_S)  # nothing tells when the other edge has heard
                served = await second.served(60)
                assert not asking.done()  # the first one has gone on all the time
                asking.cancel()
        if served["North"] > EXPLORED:
            raise Untimely(f"{served} after {MOVED_S} s")


@again_if_untimely
async def test_the_endpoints_api_agrees_with_the_providers_own_books(start_gateway: StartGateway) -> None:
    rng = random.Random(7)
    async with Provider(name="North") as provider:
        gateway = start_gateway({"north": f"{provider.url}/v1"}, workers=2)
        began = time.monotonic()

        async def stream(session: aiohttp.ClientSession, places: asyncio.Semaphore, number: int) -> None:
            fate = "status=500" if number % 10 == 9 else f"ttft_ms={rng.uniform(300, 900)};tokens=20;tokens_per_s={rng.uniform(20, 60)}"
            async with places:
                await Line(gateway, session).ask(metadata={"sim": fate})

        places = asyncio.Semaphore(20)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(stream(session, places, number) for number in range(200)))
        entries = provider.books.entries
        ok = [entry for entry in entries if entry.status == 200]
        assert len(ok) == 180

        def row() -> dict[str, Any]:
            return endpoints(gateway)["north"]

        uptime = round(100 * len(ok) / len(entries), 3)  # also of calls that were made again
        await eventually(lambda: row()["uptime_last_5m"] == uptime)
        shown = row()
        assert time.monotonic() - began < 120  # well within every window
        assert shown["uptime_last_30m"] == shown["uptime_last_1d"] == shown["uptime_last_5m"]
        compare(shown["latency_last_30m"], [1000 * (entry.first - entry.started) for entry in ok if entry.first])
        compare(shown["throughput_last_30m"], [rate_of(entry) for entry in ok])


async def test_an_ejected_endpoint_is_shown_to_callers_and_operators(start_gateway: StartGateway, provider: Provider) -> None:
    provider.set_behaviour(QUICK)
    async with Provider(name="South", behaviour=Behaviour(status=503)) as broken:
        gateway = start_gateway({"north": f"{provider.url}/v1", "south": f"{broken.url}/v1"}, workers=2)
        async with a_line_to_each(gateway) as [lines]:

            def state(name: str, state: str) -> str:
                return f'gateway_endpoint_state{{model="{MODEL}",provider="{name}",state="{state}"}}'

            async def statuses(line: Line, *expected: int) -> None:
                async with asyncio.timeout(30.0):
                    while [row["status"] for row in endpoints(gateway).values()] != list(expected):
                        await line.ask(provider={"order": ["south"]})

            first, second = lines.values()
            await statuses(first, 0, -2)  # one edge of two has had enough of it
            await statuses(second, 0, -5)  # and then the other one
            figures: dict[str, float] = {}
            async with asyncio.timeout(20.0):
                while figures.get(state("south", "ejected")) != 2:
                    await asyncio.sleep(0.1)
                    figures = series(await asyncio.to_thread(gateway.metrics))
            assert [figures[state("north", each)] for each in ("closed", "held", "ejected")] == [2, 0, 0]
            assert [figures[state("south", each)] for each in ("closed", "held", "ejected")] == [0, 0, 2]
            assert figures[f'gateway_endpoint_weight{{model="{MODEL}",provider="north"}}'] == 1.0  # the mean of both edges
            assert figures[f'gateway_endpoint_weight{{model="{MODEL}",provider="south"}}'] == 0.0


def rate_of(entry: Entry) -> float:
    assert entry.finished is not None and entry.first is not None
    return entry.completion_tokens / (entry.finished - entry.first)


def compare(shown: dict[str, float], recounted: list[float]) -> None:
    """Nearest-rank percentiles. Raises Untimely: on a machine that stands still, the two ends of a socket measure different times."""
    recounted.sort()
    expected = {name: recounted[ceil(share * len(recounted)) - 1] for name, share in SHARES.items()}
    off = {name: shown[name] / value - 1 for name, value in expected.items()}
    assert shown.keys() == expected.keys()
    if max(map(abs, off.values())) > WITHIN:
        raise Untimely(f"off by {off}")
