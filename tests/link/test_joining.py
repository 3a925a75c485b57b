"""Who joins whom, again and again, and who is refused, dropped or given up."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import stat
from pathlib import Path

import pytest

from gateway.domain.catalog import Catalog, Provider
from gateway.domain.metrics import Samples
from gateway.link import client as client_module
from gateway.link import server as server_module
from gateway.link.messages import (
    VERSION,
    FindKey,
    Frames,
    Hello,
    KeyChanged,
    Report,
    Unwelcome,
    Want,
    Welcome,
    decode_from_control,
    frame,
)
from tests.link.ends import HELLO, Control, Edge, raw, record


async def test_the_socket_is_for_the_owner_alone(control: Control) -> None:
    assert stat.S_IMODE(Path(control.address).stat().st_mode) == 0o600


async def test_a_restarted_control_is_joined_again(control: Control, edge: Edge) -> None:
    for number in range(2, 5):
        await control.server.stop()
        assert await edge.next() == "lost"
        assert not edge.link.joined
        answer = await edge.ask("known")
        assert answer.unavailable
        control.catalog = Catalog(revision=str(number), providers={}, models={})
        await control.start()
        assert await edge.next() == ("welcome", str(number), f"control-{number}")
        assert (await edge.ask("known")).key == record("known")


async def test_another_version_is_refused_with_a_reason(control: Control) -> None:
    async with raw(control) as (reader, writer):
        writer.write(frame(Hello(version=VERSION + 1, slot=1, incarnation="edge-new", pid=1)))
        payload = next(iter(Frames().feed(await reader.read())))  # and control hangs up
        message = decode_from_control(payload)
    assert isinstance(message, Unwelcome) and f"version {VERSION}" in message.reason
    assert control.joined.empty()


async def test_an_edge_refused_tries_again(tmp_path: Path) -> None:
    connections = 0
    again = asyncio.Event()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read(100)
        writer.write(frame(Unwelcome(reason="too old")) if connections != 2 else b"\x00\x00\x00\x01\xc1")
        if connections == 3:
            again.set()
        writer.close()

    control = Control(tmp_path)
    async with await asyncio.start_unix_server(refuse, control.address):
        edge = Edge(control)
        await edge.link.start()
        assert await edge.next() == ("refused", "too old")
        async with asyncio.timeout(5):
            await again.wait()
        assert not edge.link.joined
        await edge.link.stop()


@pytest.mark.parametrize(
    "data",
    [
        frame(FindKey(id=1, digest="known")),  # before a hello
        frame(HELLO) * 2,
        frame(HELLO) + frame(KeyChanged(digest="known", key=None)),  # not an edge's to say
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x02{}",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
async def test_whoever_breaks_the_protocol_is_dropped(control: Control, edge: Edge, data: bytes) -> None:
    async with raw(control) as (reader, writer):
        writer.write(data)
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionResetError):
                await reader.read()
    assert (await edge.ask("known")).key == record("known")  # others notice nothing


async def test_a_silent_stranger_is_dropped(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HELLO_S", 0.05)
    async with raw(control) as (reader, _):
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""


async def test_an_edge_that_does_not_read_is_dropped_alone(control: Control, edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "BUFFER_BYTES_MAX", 1_000_000)
    providers = {f"p{n}": Provider(slug=f"p{n}", name="x" * 1000, base_url="http://127.0.0.1") for n in range(200)}
    stuck = socket.socket(socket.AF_UNIX)
    stuck.setblocking(False)
    await asyncio.get_running_loop().sock_connect(stuck, control.address)
    stuck.send(frame(HELLO))
    async with asyncio.timeout(5):
        while await control.joined.get() != "edge-raw":
            pass
        for number in range(20):
            control.server.push_catalog(Catalog(revision=str(number), providers=providers, models={}))
            assert await edge.next() == ("catalog", str(number))
        assert await control.left.get() == "edge-raw"
    assert control.server.edges == 1
    stuck.close()


async def test_an_edge_that_comes_back_early_replaces_its_old_connection(control: Control) -> None:
    async with raw(control) as (old_reader, old_writer), raw(control) as (new_reader, new_writer):
        old_writer.write(frame(HELLO))
        assert await control.joined.get() == "edge-raw"
        new_writer.write(frame(HELLO) + frame(Report(samples=Samples())))
        assert (await control.reports.get())[0] == "edge-raw"
        with contextlib.suppress(ConnectionResetError):
            await old_reader.read()
        payload = next(iter(Frames().feed(await new_reader.read(65536))))
        assert isinstance(decode_from_control(payload), Welcome)
        assert control.server.edges == 1
        assert control.left.empty() and control.joined.empty()  # one edge all along


async def test_a_control_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "WELCOME_S", 0.05)
    control = Control(tmp_path)
    ends: asyncio.Queue[None] = asyncio.Queue()

    async def be_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionResetError):
            await reader.read()
        ends.put_nowait(None)
        writer.close()

    async with await asyncio.start_unix_server(be_silent, control.address):
        edge = Edge(control)
        await edge.link.start()
        async with asyncio.timeout(5):
            for _ in range(3):
                await ends.get()
        await edge.link.stop()
    assert edge.heard.empty()


async def test_an_edge_gives_a_control_up_that_does_not_read(control: Control, edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BUFFER_BYTES_MAX", 100_000)
    for transport in [connection._transport for connection in control.server._connections]:
        assert transport is not None
        transport.pause_reading()
    wide = Want("r" * 50_000, 1, 0)
    for _ in range(20):
        edge.link.send(wide)
    assert await edge.next() == "lost"
    assert await edge.next() == ("welcome", "1", "control-1")
