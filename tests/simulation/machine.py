"""What a seed's processes run on: a loop and a wall clock of virtual time, and a disk that can be slow, away, or cut off."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from gateway.control import bookkeeper, journals
from gateway.control.store import sqlite as sqlite_store
from gateway.control.store.sqlite.database import Connection
from gateway.edge import journal
from gateway.log import Level, Log

SMALL_BATCH = 7  # records: so that a few exchanges make several batches
SMALL_FILE_BYTES = 2500  # and several files
TURNS_MAX = 200_000  # of the loop, in one seed: a hundred times what it takes
MEMORY = Path("/dev/shm")


class Failed(AssertionError):
    """A promise was broken."""


class _Moments:
    """Stands where a loop looks for sockets: there are none, so it goes on to the next timer at once."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._turns = 0

    def select(self, timeout: float | None) -> list[object]:
        if timeout is None:
            raise Failed("nothing is left to happen, yet somebody waits")
        self._turns += 1
        if self._turns > TURNS_MAX:
            raise Failed("there is no end of what happens")
        self._loop.now_s += timeout
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop whose time passes only when nobody has anything to do. What goes to a thread is done at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0
        self._selector = _Moments(self)

    def time(self) -> float:
        return self.now_s

    def _process_events(self, event_list: list[object]) -> None:
        pass

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


class Trace(Log):
    """The log of all processes, and everything else that happened, as one hash. An error that nobody expects breaks the run."""

    EXPECTED = frozenset({"bookkeeping_failed"})  # while the store is away
    UNWANTED = frozenset({"generations_exist"})  # offsets move with the records, so nothing is ever read twice

    def __init__(self, clock: Callable[[], float], *, lines: bool) -> None:
        super().__init__("simulation", fd=-1)
        self._clock = clock
        self._sum = hashlib.blake2b(digest_size=8)
        self._lines = lines
        self.broken = ""

    def broke(self, loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        """A callback failed."""
        self.broken = self.broken or str(context.get("exception") or context)

    def write(self, level: Level, event: str, fields: Mapping[str, Any]) -> None:
        self.note(event, *(f"{name}={value}" for name, value in fields.items() if name not in ("stack", "where")))
        if (level == "error" and event not in self.EXPECTED) or event in self.UNWANTED:
            self.broken = self.broken or f"{event} {dict(fields)}"

    def note(self, event: str, *what: object) -> None:
        line = f"{self._clock():.6f} {event} {' '.join(map(str, what))}"
        self._sum.update(line.encode())
        if self._lines:
            print(line)

    @property
    def hash(self) -> str:
        return self._sum.hexdigest()


class Disk:
    """The database files as one control process sees them."""

    def __init__(self, chance: random.Random, *, slow: float, pause_s: float) -> None:
        self._chance = chance
        self.slow = slow  # how often a statement takes a while
        self._pause_s = pause_s  # how long, on average
        self._connections: list[DiskConnection] = []
        self.away = False
        self.dead = False

    def connect(self, path: Path) -> DiskConnection:
        connection = DiskConnection(path, self)
        self._connections.append(connection)
        return connection

    async def pause(self) -> None:
        if self._chance.random() < self.slow:
            await asyncio.sleep(self._chance.expovariate(1.0 / self._pause_s))
        if self.dead:
            raise asyncio.CancelledError

    def die(self) -> None:
        """Its process was killed: what was not committed is gone."""
        self.dead = True
        for connection in self._connections:
            connection.cut()


class DiskConnection(Connection):
    """A connection without a thread of its own. Killed before, between and after statements, never within one."""

    def __init__(self, path: Path, disk: Disk) -> None:
        super().__init__(lambda: sqlite3.connect(path, isolation_level=None), 64)
        self._disk = disk

    def __await__(self) -> Generator[Any, None, Any]:
        self._connection = self._connector()
        return self._ready().__await__()

    async def _ready(self) -> DiskConnection:
        return self

    async def _execute(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._disk.dead:
            raise asyncio.CancelledError
        await self._disk.pause()
        if self._disk.away and fn != self._conn.rollback:
            raise sqlite3.OperationalError("disk I/O error")
        result = fn(*args, **kwargs)
        await self._disk.pause()
        return result

    def cut(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.ProgrammingError):  # it is closed already
                self._connection.rollback()  # closing alone waits for cursors that somebody still has
            self._connection.close()

    async def close(self) -> None:
        self.cut()

    def __del__(self) -> None:
        pass  # it has no thread that could be left behind


class Machine:
    """One seed's loop, clock, folder and trace. Enter it: within, `time.time` and the store's connections are the machine's."""

    def __init__(self, seed: int, *, wall_s: float, lines: bool = False) -> None:
        self.loop = VirtualLoop()
        self.wall_offset_s = wall_s - self.loop.time()
        self.trace = Trace(self.loop.time, lines=lines)
        self.loop.set_exception_handler(self.trace.broke)
        self.chance = random.Random(f"disk {seed}")
        self._slow, self._pause_s = self.chance.choice(((0.0, 1.0), (0.3, 0.002), (0.1, 0.01), (0.05, 0.1)))
        self.disk = self.renew_disk()
        self.database = Path()
        self.journal = Path()

    def wall(self) -> float:
        return self.loop.time() + self.wall_offset_s

    def heal(self) -> None:
        """From now on the disk does at once what it is asked for."""
        self._slow = self.disk.slow = 0.0
        self.disk.away = False

    def renew_disk(self) -> Disk:
        """For the next control process."""
        self.disk = Disk(self.chance, slow=self._slow, pause_s=self._pause_s)
        return self.disk

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None))
            self.database, self.journal = Path(folder, "gateway.db"), Path(folder, "journal")
            shutil.copyfile(_template(), self.database)
            for owner, name, value in (
                (time, "time", self.wall),
                (sqlite_store, "connect", lambda path: self.disk.connect(path)),
                (bookkeeper, "BATCH_RECORDS", SMALL_BATCH),
                (journals, "NEWBORN_S", float("-inf")),  # its files are born on a real clock
                (journal, "ROTATE_BYTES", SMALL_FILE_BYTES),
            ):
                stack.enter_context(mock.patch.object(owner, name, value))
            stack.callback(self.loop.close)
            yield


_made: list[tempfile.TemporaryDirectory[str]] = []


def _template() -> Path:
    """A store with its schema and nothing in it: making it takes longer than a whole seed does."""
    if not _made:
        _made.append(tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None))
        loop = VirtualLoop()
        disk = Disk(random.Random(0), slow=0.0, pause_s=1.0)
        with mock.patch.object(sqlite_store, "connect", disk.connect):
            store = loop.run_until_complete(sqlite_store.SqliteStore.open(Path(_made[0].name, "gateway.db")))
            loop.run_until_complete(store.close())
        loop.close()
    return Path(_made[0].name, "gateway.db")
