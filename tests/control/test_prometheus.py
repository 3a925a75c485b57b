"""Reading the fleet's figures back: from answers as Prometheus 2.42 gave them, and from servers that cannot be used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from gateway.control import prometheus
from gateway.control.prometheus import read_back
from gateway.domain.catalog import Catalog
from gateway.log import Log
from gateway.routing.figures import Observed
from gateway.routing.sketch import quantiles
from tests.control.test_models_api import catalog

SAGE, NORTH, SOUTH = "acme/sage-1", "acme/sage-1@north", "acme/sage-1@south"
FIRST, PER_TOKEN = "gen_ai_server_time_to_first_token_seconds", "gen_ai_server_time_per_output_token_seconds"
Rows = list[tuple[dict[str, str], str]]


def buckets(*counts: tuple[str, str]) -> Rows:
    return [({"provider": "north", "le": le}, count) for le, count in counts]


ANSWERS: dict[str, Rows] = {
    "gateway_attempts_total": [
        ({"provider": "north", "outcome": "ok"}, "100.3"),
        ({"provider": "north", "outcome": "upstream_refused"}, "6"),
        ({"provider": "north", "outcome": "stream_stalled"}, "4"),
        ({"provider": "north", "outcome": "upstream_throttled"}, "7"),
        ({"provider": "north", "outcome": "caller_gone"}, "50"),
        ({"provider": "north", "outcome": "upstream_rejected"}, "50"),
        ({"provider": "south", "outcome": "ok"}, "0"),
        ({"provider": "gone", "outcome": "ok"}, "10"),
    ],
    "gen_ai_client_token_usage": [
        ({"provider": "north", "token_type": "input"}, "20060"),
        ({"provider": "north", "token_type": "output"}, "5000"),
    ],
    FIRST + "_bucket": buckets(("0.1", "0"), ("0.25", "80"), ("0.5", "96"), ("1.0", "100"), ("+Inf", "100")),
    FIRST + "_sum": [({"provider": "north"}, "21.5")],
    PER_TOKEN + "_bucket": buckets(("0.01", "0"), ("0.02", "100"), ("+Inf", "100")),
    PER_TOKEN + "_sum": [({"provider": "north"}, "1.5")],
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def recorded(request: web.Request) -> web.Response:
    """The answer to one query, whose metric and window are found in it."""
    query = request.query["query"]
    assert query.startswith("sum by (provider,model") and query.endswith("[300s]))")
    rows = ANSWERS[query.partition("increase(")[2].partition("[")[0]]
    result = [{"metric": dict(labels, model=SAGE), "value": [1795579561.077, figure]} for labels, figure in rows]
    return web.json_response({"status": "success", "data": {"resultType": "vector", "result": result}})


@pytest.fixture
async def served() -> AsyncIterator[Callable[[Handler], Awaitable[str]]]:
    servers: list[TestServer] = []

    async def serve(handler: Handler) -> str:
        app = web.Application()
        app.router.add_get("/prefix/api/v1/query", handler)
        servers.append(TestServer(app))
        await servers[-1].start_server()
        return str(servers[-1].make_url("/prefix/"))

    yield serve
    for server in servers:
        await server.close()


async def read(url: str, of: Catalog | None = None) -> Observed | None:
    return await read_back(url, of or catalog(), Log("test", fd=-1))


async def test_what_the_fleet_saw_is_taken_over(served: Callable[[Handler], Awaitable[str]]) -> None:
    observed = await read(await served(recorded))
    assert observed is not None
    assert observed.tallies.keys() == {NORTH}  # nobody called the other one, and what is not in the catalog is nobody's
    tally = observed.tallies[NORTH]
    assert (tally.counts.ok, tally.counts.failed, tally.counts.throttled) == (100, 10, 7)  # no caller's fault
    assert (tally.counts.firsts, tally.counts.first_us, tally.counts.prompt_tokens) == (100, 21_500_000, 20_060)
    assert (tally.counts.answers, tally.counts.tokens, tally.counts.gen_us) == (100, 5000, 75_000_000)
    [median, high] = quantiles(tally.first_s, (0.5, 0.95))
    assert 0.1 < median < 0.25 < high < 0.5
    [rate] = quantiles(tally.rate, (0.5,))
    assert 50 < rate < 100


def refusing(status: int, body: bytes) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=status, body=body)

    return handler


BODIES: Mapping[str, tuple[int, bytes]] = {
    "an error": (500, b"{}"),
    "no JSON": (200, b"<html>"),
    "another shape": (200, b'{"data": {"result": [{"metric": {}, "value": 7}]}}'),
    "no number": (200, b'{"data": {"result": [{"metric": {}, "value": [1, "ten"]}]}}'),
    "too much": (200, b" " * 5000),
    "nothing": (200, b'{"data": {"result": []}}'),
}


@pytest.mark.parametrize("name", BODIES)
async def test_a_server_that_cannot_be_used_leaves_a_node_to_learn(
    name: str, served: Callable[[Handler], Awaitable[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prometheus, "ANSWER_BYTES_MAX", 4000)
    assert await read(await served(refusing(*BODIES[name]))) is None


async def test_a_server_that_is_silent_or_not_there_costs_no_start(
    served: Callable[[Handler], Awaitable[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prometheus, "ANSWER_S", 0.2)

    async def silent(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    url = await served(silent)
    async with asyncio.timeout(10):
        assert await read(url) is None
        assert await read(f"http://127.0.0.1:{unused_port()}") is None


async def test_endpoints_that_prometheus_cannot_tell_apart_start_cold(served: Callable[[Handler], Awaitable[str]]) -> None:
    one = catalog()
    model = one.models[SAGE]
    twin = msgspec.structs.replace(model.endpoints[1], id=NORTH + "/fp8", tag="north/fp8")
    two: Any = msgspec.structs.replace(one, models={SAGE: msgspec.structs.replace(model, endpoints=(*model.endpoints, twin))})
    assert await read(await served(recorded), two) is None
