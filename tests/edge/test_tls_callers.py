"""Callers over TLS, without a proxy in front: served, bounded and let go like the others."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio
import trustme

from bench.behaviour import Behaviour
from tests.conftest import eventually
from tests.edge.stage import GOOD, HELLO, Stage, behaving, staged
from tests.provider_caller import Caller, datas
from tests.timing import again_if_untimely, in_time

pytestmark = pytest.mark.asyncio(loop_scope="module")

HEAD_S = 1.0
ROUTE = "/api/v1/chat/completions"
authority = trustme.CA()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    folder = tmp_path_factory.mktemp("tls")
    own = authority.issue_cert("localhost")
    own.private_key_and_cert_chain_pem.write_to_path(folder / "own.pem")
    pem = str(folder / "own.pem")
    server = {"tls_cert": pem, "tls_key": pem, "request_head_s": HEAD_S, "body_bytes_max": 100_000}
    async with staged(folder, settings={"server": server}) as running:
        assert running.gateway.url.startswith("https://")
        yield running


def port_of(stage: Stage) -> int:
    return int(stage.gateway.url.rpartition(":")[2])


@asynccontextmanager
async def secured(stage: Stage) -> AsyncIterator[Caller]:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(stage), ssl=context, server_hostname="localhost")
    try:
        yield Caller(reader, writer)
    finally:
        writer.transport.abort()


async def test_answers_streams_and_refusals_come_over_one_connection(stage: Stage) -> None:
    key = f"Authorization: Bearer {stage.gateway.key}\r\n"
    async with secured(stage) as caller:
        for _ in range(2):
            status, _, body = await caller.ask({"model": GOOD, "messages": HELLO}, ROUTE, key)
            assert (status, json.loads(body)["model"]) == (200, GOOD)
            status, _, body = await caller.ask({"model": GOOD, "messages": HELLO, "stream": True}, ROUTE, key)
            assert (status, datas(body)[-1]) == (200, "[DONE]")
            assert (await caller.ask({}, "/api/v1/nowhere", key))[0] == 404
        large = {"model": GOOD, "messages": [{"role": "user", "content": "x" * 2_000_000}]}
        status, headers, _ = await caller.ask(large, ROUTE, key)
        assert (status, headers["connection"]) == (413, "close")


async def test_str_04_who_leaves_a_stream_stops_its_provider(stage: Stage) -> None:
    with behaving(stage.good, Behaviour(tokens=5000, tokens_per_s=50)):
        async with secured(stage) as caller:
            caller.send({"model": GOOD, "messages": HELLO, "stream": True}, ROUTE, f"Authorization: Bearer {stage.gateway.key}\r\n")
            assert (await caller.head())[0] == 200
            await caller.chunk()
        await eventually(lambda: stage.good.books.entries[-1].cancelled is not None)


@again_if_untimely
async def test_ovl_03_who_makes_no_handshake_is_closed(stage: Stage) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(stage))
    began = asyncio.get_running_loop().time()
    assert await reader.read() == b""
    writer.close()
    in_time(asyncio.get_running_loop().time() - began, HEAD_S + 1.0, at_least=0.9 * HEAD_S)


async def test_who_speaks_without_tls_is_closed_unheard(stage: Stage) -> None:
    before = stage.good.books.requests
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(stage))
    writer.write(b"POST /api/v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
    assert b"HTTP" not in await reader.read()
    writer.close()
    assert stage.good.books.requests == before
