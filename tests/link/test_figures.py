"""What edges see of endpoints, over the link: to control each second, and back to every edge, also between versions."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

from gateway.domain.catalog import Catalog
from gateway.domain.keys import KeyRecord
from gateway.domain.metrics import Samples
from gateway.link import server as server_module
from gateway.link.client import LinkClient
from gateway.link.messages import VERSION, FleetFigures, Frames, Hello, KeyChanged, Welcome, decode_from_control, decode_from_edge, frame
from gateway.link.server import LinkServer
from gateway.log import Log
from gateway.routing.figures import Counts, Figures, Merged, Observed, Tally

OBSERVED = Observed(1, {"e": Tally(Counts(ok=5, first_us=7), {-3: 4}, {900: 1})}, {"e": 2}, ("f",), ("g",))
MERGED = Merged({"a": 1}, {"e": Figures(inflight=2)})


async def no_keys(digests: Iterable[str]) -> dict[str, KeyRecord]:
    return {}


class Control:
    """A link server, and what it was told."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "link.sock")
        self.observed: asyncio.Queue[tuple[str, Observed]] = asyncio.Queue()
        self.joined: asyncio.Queue[str] = asyncio.Queue()
        self.server = LinkServer(
            address=self.address,
            incarnation="control-1",
            catalog=Catalog(revision="1", providers={}, models={}),
            find_keys=no_keys,
            on_joined=self.joined.put_nowait,
            on_left=lambda incarnation: None,
            on_report=lambda incarnation, samples: None,
            on_observed=lambda incarnation, observed: self.observed.put_nowait((incarnation, observed)),
            log=Log("test", fd=-1),
        )


class Edge:
    """A link client whose news are in `news`; once told they are over."""

    def __init__(self, address: str, incarnation: str) -> None:
        self.news: list[Observed] = []
        self.asked = 0
        self.merged: asyncio.Queue[Merged] = asyncio.Queue()
        self.welcomed = asyncio.Event()
        self.link = LinkClient(
            address=address,
            slot=0,
            incarnation=incarnation,
            pid=1,
            samples=Samples,
            on_welcome=lambda catalog, control: self.welcomed.set(),
            on_key_changed=lambda digest, key: None,
            on_catalog=lambda catalog: None,
            on_lost=lambda: None,
            observed=self._observed,
            on_figures=self.merged.put_nowait,
        )

    def _observed(self) -> Observed | None:
        self.asked += 1
        return self.news.pop() if self.news else None


@pytest.fixture
async def control(tmp_path: Path) -> AsyncIterator[Control]:
    control = Control(tmp_path)
    await control.server.start()
    yield control
    await control.server.stop()


@pytest.fixture
async def edges(control: Control) -> AsyncIterator[list[Edge]]:
    edges = [Edge(control.address, name) for name in ("a", "b")]
    for edge in edges:
        await edge.link.start()
        await edge.welcomed.wait()
    yield edges
    for edge in edges:
        await edge.link.stop()


async def test_news_go_to_control_once_and_the_last_ones_with_the_edge(control: Control, edges: list[Edge]) -> None:
    edges[0].news.append(OBSERVED)
    async with asyncio.timeout(5):
        assert await control.observed.get() == ("a", OBSERVED)  # within the second
        asked = edges[0].asked
        while edges[0].asked < asked + 2:
            await asyncio.sleep(0.05)
    assert control.observed.empty()  # nothing new, nothing said
    edges[1].news.append(OBSERVED)
    await edges[1].link.stop()
    async with asyncio.timeout(5):
        assert await control.observed.get() == ("b", OBSERVED)


async def test_what_the_fleet_saw_reaches_every_edge(control: Control, edges: list[Edge]) -> None:
    control.server.push_figures(MERGED)
    async with asyncio.timeout(5):
        assert [await edge.merged.get() for edge in edges] == [MERGED, MERGED]


async def test_an_edge_of_an_earlier_version_is_not_told_and_stays(control: Control) -> None:
    reader, writer = await asyncio.open_unix_connection(control.address)
    hello = frame(Hello(version=VERSION, slot=0, incarnation="old", pid=1))
    writer.write(hello)
    async with asyncio.timeout(5):
        assert await control.joined.get() == "old"
        control.server.push_figures(MERGED)
        control.server.push_key("digest", None)
        frames = Frames()
        got: list[object] = []
        while len(got) < 2:
            got += [decode_from_control(payload) for payload in frames.feed(await reader.read(65536))]
    assert [type(message) for message in got] == [Welcome, KeyChanged]
    writer.close()
    await writer.wait_closed()


async def test_a_control_of_an_earlier_version_is_not_told(tmp_path: Path) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()

    async def old_control(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(Welcome(version=VERSION, catalog=Catalog(revision="1", providers={}, models={}), control="old")))
        frames = Frames()
        while data := await reader.read(65536):
            for payload in frames.feed(data):
                heard.put_nowait(type(decode_from_edge(payload)).__name__)
        writer.close()

    address = str(tmp_path / "link.sock")
    async with await asyncio.start_unix_server(old_control, address):
        edge = Edge(address, "a")
        edge.news.append(OBSERVED)
        await edge.link.start()
        async with asyncio.timeout(5):
            assert [await heard.get() for _ in range(3)] == ["Hello", "Report", "Report"]
        assert edge.asked == 0  # so nothing is taken from its windows that nobody hears of
        await edge.link.stop()


async def test_an_edge_that_reads_slowly_is_spared_figures_and_not_dropped(
    control: Control, edges: list[Edge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "FIGURES_BYTES_MAX", 1000)
    slow = socket.socket(socket.AF_UNIX)
    slow.setblocking(False)
    slow.connect(control.address)
    slow.sendall(frame(Hello(version=VERSION, slot=1, incarnation="slow", pid=1, takes_figures=True)))
    large = Merged({}, {f"endpoint-{number}": Figures() for number in range(2000)})
    async with asyncio.timeout(20):
        while "slow" not in control.server.joined_edges:
            await asyncio.sleep(0.01)
        for _ in range(20):  # 2 MB, more than sockets hold
            control.server.push_figures(large)
            assert await edges[0].merged.get() == large
            await edges[1].merged.get()
    assert "slow" in control.server.joined_edges
    unread = max(connection.unread_bytes() for connection in control.server._connections)
    assert 1000 < unread <= 1000 + len(frame(FleetFigures(large)))
    slow.close()
