"""The two ends of a link in one process, on a real unix socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from gateway.domain.catalog import Catalog
from gateway.domain.keys import KeyRecord
from gateway.domain.metrics import Samples
from gateway.link.client import LinkClient
from gateway.link.messages import (
    VERSION,
    Hello,
    KeyFound,
)
from gateway.link.server import LinkServer
from gateway.log import Log


def record(name: str, *, disabled: bool = False) -> KeyRecord:
    return KeyRecord(digest=name, account_id="user_1", name=name, label="sk-or-v1-abc...123", disabled=disabled)


class Store:
    """Keys, and how often they were looked up; `gate` holds lookups back while it is closed."""

    def __init__(self) -> None:
        self.keys = {"known": record("known")}
        self.lookups: list[set[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.looking = asyncio.Event()
        self.failure: Exception | None = None

    async def find_keys(self, digests: Iterable[str]) -> dict[str, KeyRecord]:
        wanted = set(digests)
        self.lookups.append(wanted)
        found = {digest: key for digest, key in self.keys.items() if digest in wanted}
        self.looking.set()
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return found


class Control:
    """A control that can be stopped and started again at one address."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "link.sock")
        self.store = Store()
        self.joined: asyncio.Queue[str] = asyncio.Queue()
        self.left: asyncio.Queue[str] = asyncio.Queue()
        self.reports: asyncio.Queue[tuple[str, Samples]] = asyncio.Queue()
        self.told: asyncio.Queue[tuple[str, object]] = asyncio.Queue()
        self.catalog = Catalog(revision="1", providers={}, models={})
        self.starts = 0

    async def start(self) -> None:
        self.starts += 1
        self.server = LinkServer(
            address=self.address,
            incarnation=f"control-{self.starts}",
            catalog=self.catalog,
            find_keys=self.store.find_keys,
            on_joined=self.joined.put_nowait,
            on_left=self.left.put_nowait,
            on_report=lambda incarnation, samples: self.reports.put_nowait((incarnation, samples)),
            on_want=lambda incarnation, want: self.told.put_nowait((incarnation, want)),
            on_back=lambda incarnation, back: self.told.put_nowait((incarnation, back)),
            on_standing=lambda incarnation, standing: self.told.put_nowait((incarnation, standing)),
            on_journaled=lambda incarnation: self.told.put_nowait((incarnation, "journaled")),
            log=Log("test", fd=-1),
        )
        await self.server.start()


class Edge:
    """A link client and what it heard."""

    def __init__(self, control: Control, incarnation: str = "edge-a", answer_s: float = 5.0) -> None:
        self.heard: asyncio.Queue[object] = asyncio.Queue()
        self.requests = 0.0
        self.link = LinkClient(
            address=control.address,
            slot=0,
            incarnation=incarnation,
            pid=1,
            samples=lambda: Samples(numbers={"gateway_requests_total": {("chat", "200"): self.requests}}),
            on_welcome=lambda catalog, control: self.heard.put_nowait(("welcome", catalog.revision, control)),
            on_key_changed=lambda digest, key: self.heard.put_nowait((digest, key)),
            on_catalog=lambda catalog: self.heard.put_nowait(("catalog", catalog.revision)),
            on_lost=lambda: self.heard.put_nowait("lost"),
            on_refused=lambda reason: self.heard.put_nowait(("refused", reason)),
            on_grant=self.heard.put_nowait,
            on_recall=lambda resource: self.heard.put_nowait(("recall", resource)),
            on_funded=lambda resource: self.heard.put_nowait(("funded", resource)),
            on_committed=self.heard.put_nowait,
            answer_s=answer_s,
        )

    async def next(self) -> object:
        async with asyncio.timeout(5):
            return await self.heard.get()

    def ask(self, digest: str) -> asyncio.Future[KeyFound]:
        found: asyncio.Future[KeyFound] = asyncio.get_running_loop().create_future()
        self.link.find_key(digest, found.set_result)
        return found


@contextlib.asynccontextmanager
async def raw(control: Control) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A peer that speaks bytes."""
    reader, writer = await asyncio.open_unix_connection(control.address)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


HELLO = Hello(version=VERSION, slot=1, incarnation="edge-raw", pid=1)
