"""What exchanges said goes to control behind everything else, within bounds, and is never kept for a control that is away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.domain.catalog import Catalog
from gateway.domain.metrics import Samples
from gateway.link.client import CONTENT_BYTES_MAX, LinkClient
from gateway.link.messages import VERSION, Back, Content, Frames, Hello, Report, Welcome, decode_from_edge, frame
from tests.conftest import eventually
from tests.link.ends import Control, Edge

MIB = 1024 * 1024
WELCOME = Welcome(version=VERSION, catalog=Catalog(revision="1", providers={}, models={}), control="c", takes_content=True)


def content(number: int, size: int = 10) -> Content:
    return Content(generation_id=f"gen-{number}", account_id="user_1", created_at_ms=number, request=b"ask", answer=b"x" * size)


class SlowControl:
    """Reads an edge's messages when it is told to."""

    def __init__(self, folder: Path, welcome: Welcome = WELCOME) -> None:
        self.address = str(folder / "link.sock")
        self._welcome = welcome
        self._frames = Frames()
        self._waiting: list[Any] = []
        self._ends: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def __aenter__(self) -> SlowControl:
        self._server = await asyncio.start_unix_server(lambda *ends: self._ends.put_nowait(ends), self.address, limit=1024)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.hang_up()

    async def welcome(self) -> None:
        """The next edge, or the same one again."""
        self._reader, self._writer = await self._ends.get()
        self._frames, self._waiting = Frames(), []
        assert isinstance(await self.next(), Hello)
        self._writer.write(frame(self._welcome))

    async def next(self) -> Any:
        """One message, reports aside; None when the edge has hung up."""
        async with asyncio.timeout(10.0):
            while not self._waiting:
                data = await self._reader.read(65536)
                if not data:
                    return None
                messages = [decode_from_edge(payload) for payload in self._frames.feed(data)]
                self._waiting += [each for each in messages if not isinstance(each, Report)]
            return self._waiting.pop(0)

    def hang_up(self) -> None:
        self._writer.transport.abort()


@contextlib.asynccontextmanager
async def joined(control: SlowControl, on_lost: Callable[[], None] = lambda: None) -> AsyncIterator[LinkClient]:
    welcomed = asyncio.Event()
    link = LinkClient(
        address=control.address,
        slot=0,
        incarnation="edge-a",
        pid=1,
        samples=Samples,
        on_welcome=lambda *_: welcomed.set(),
        on_key_changed=lambda *_: None,
        on_catalog=lambda _: None,
        on_lost=on_lost,
    )
    await link.start()
    await control.welcome()
    async with asyncio.timeout(10.0):
        await welcomed.wait()
    try:
        yield link
    finally:
        await link.stop()


async def test_control_hears_what_an_exchange_said_byte_for_byte(control: Control, edge: Edge) -> None:
    heard: asyncio.Queue[Content] = asyncio.Queue()
    control.server.on_content = heard.put_nowait
    said = Content("gen-1", "user_1", 7, bytes(range(256)), b"\x00\xff" * 100_000, truncated=True)
    edge.link.send_content(said)
    async with asyncio.timeout(5.0):
        assert await heard.get() == said
    assert edge.link.content_dropped == 0


async def test_a_control_that_nobody_told_what_to_do_with_it_goes_on(control: Control, edge: Edge) -> None:
    edge.link.send_content(content(1))
    assert (await edge.ask("known")).key == control.store.keys["known"]


def test_what_was_said_is_in_no_repr() -> None:
    said = Content("gen-1", "user_1", 7, b"canary", b"canary canary")
    assert repr(said) == str(said) == "<Content gen-1 6 + 13 bytes>"


async def test_what_a_slow_control_leaves_unread_is_bounded_and_the_rest_dropped_and_counted(tmp_path: Path) -> None:
    async with SlowControl(tmp_path) as control, joined(control) as link:
        sent = CONTENT_BYTES_MAX // MIB + 20
        for number in range(sent):
            link.send_content(content(number, MIB))
        dropped = link.content_dropped
        assert 0 < dropped <= 20
        # Nothing waited for: what fitted comes in order, and there is room again.
        heard = [(await control.next()).generation_id for _ in range(sent - dropped)]
        assert heard == [f"gen-{number}" for number in range(sent - dropped)]
        link.send_content(content(99, MIB))
        assert (await control.next()).generation_id == "gen-99"
        assert link.content_dropped == dropped


async def test_what_is_urgent_overtakes_content_and_the_link_lives(tmp_path: Path) -> None:
    async with SlowControl(tmp_path) as control, joined(control) as link:
        for number in range(8):
            link.send_content(content(number, MIB))
        link.send(Back("balance:user_1", 5))
        heard = [await control.next() for _ in range(9)]
        place = heard.index(Back("balance:user_1", 5))
        assert place <= 2  # what the kernel and the transport had taken by then
        assert [each.generation_id for each in heard if isinstance(each, Content)] == [f"gen-{number}" for number in range(8)]
        assert link.joined and link.content_dropped == 0


async def test_content_is_not_kept_for_a_control_that_is_away(tmp_path: Path) -> None:
    lost = asyncio.Event()
    async with SlowControl(tmp_path) as control, joined(control, lost.set) as link:
        for number in range(5):
            link.send_content(content(number, MIB))
        control.hang_up()
        await asyncio.wait_for(lost.wait(), 10.0)
        waited = link.content_dropped
        assert waited >= 3  # all that had not begun to leave
        link.send_content(content(5))
        assert link.content_dropped == waited + 1
        await control.welcome()
        await eventually(lambda: link.joined)
        link.send_content(content(6))
        assert await control.next() == content(6)
        assert link.content_dropped == waited + 1


async def test_a_control_of_an_earlier_version_is_sent_none(tmp_path: Path) -> None:
    earlier = Welcome(version=VERSION, catalog=WELCOME.catalog, control="c")
    async with SlowControl(tmp_path, earlier) as control, joined(control) as link:
        link.send_content(content(1))
        link.send(Back("balance:user_1", 5))
        assert await control.next() == Back("balance:user_1", 5)
        assert link.content_dropped == 1


@pytest.mark.parametrize("size", [10, MIB])
async def test_what_waits_leaves_with_the_edge(tmp_path: Path, size: int) -> None:
    async with SlowControl(tmp_path) as control, joined(control) as link:
        for number in range(6):
            link.send_content(content(number, size))
        stopping = asyncio.create_task(link.stop())
        assert [await control.next() for _ in range(6)] == [content(number, size) for number in range(6)]
        assert await control.next() is None
        await stopping
