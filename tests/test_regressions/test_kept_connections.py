"""A connection that was promised to be kept is not closed under the next request while edges are replaced or drained."""

from __future__ import annotations

import asyncio
import signal

from bench.behaviour import Behaviour
from bench.provider import Provider
from tests.conftest import MODEL, StartGateway
from tests.provider_caller import HELLO, Caller

ROUTE = "/api/v1/chat/completions"
DRAIN_S = 30.0


async def test_a_stream_that_began_before_a_roll_leaves_its_connection_open_for_one_more_request(
    start_gateway: StartGateway, provider: Provider
) -> None:
    gateway = await asyncio.to_thread(start_gateway, {"north": f"{provider.url}/v1"}, settings={"server": {"drain_s": DRAIN_S}})
    provider.set_behaviour(Behaviour(tokens=30, tokens_per_s=10))
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    caller, extra = Caller(reader, writer), f"Authorization: Bearer {gateway.key}\r\n"
    body = {"model": MODEL, "messages": HELLO}
    try:
        caller.send({**body, "stream": True}, ROUTE, extra)
        status, headers = await caller.head()
        assert status == 200 and headers.get("connection") != "close"  # promised
        gateway.signal(signal.SIGUSR2)
        await asyncio.to_thread(gateway.logged, "rolled")
        while await caller.chunk():
            pass
        provider.set_behaviour(Behaviour())
        status, headers, _ = await caller.ask(body, ROUTE, extra)
        assert status == 200 and headers["connection"] == "close"  # the old edge says when it is the last
        assert await reader.read() == b""
    finally:
        writer.close()


async def test_a_kept_connection_that_stays_silent_does_not_hold_up_a_drain(start_gateway: StartGateway, provider: Provider) -> None:
    gateway = await asyncio.to_thread(start_gateway, {"north": f"{provider.url}/v1"}, settings={"server": {"drain_s": DRAIN_S}})
    provider.set_behaviour(Behaviour(tokens=20, tokens_per_s=10))
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    caller = Caller(reader, writer)
    try:
        caller.send({"model": MODEL, "messages": HELLO, "stream": True}, ROUTE, f"Authorization: Bearer {gateway.key}\r\n")
        await caller.head()
        gateway.signal(signal.SIGTERM)
        while await caller.chunk():
            pass
        assert await asyncio.wait_for(reader.read(), DRAIN_S / 2) == b""
        assert await asyncio.to_thread(gateway.wait, DRAIN_S / 2) == 0
    finally:
        writer.close()
