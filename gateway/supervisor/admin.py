"""The supervisor's words to control, over control's admin socket: who was reaped, how many were started, reload, metrics.

Control may be dead or hung at any time, so every call is bounded, and what control must learn is told until it was heard.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self

import aiohttp
import msgspec

from gateway.supervisor.children import Child
from gateway.supervisor.slots import EventLog

ANSWER_S_MAX = 2.0
RELOAD_S_MAX = 30.0  # a catalog of 10,000 endpoints, read and checked on a busy machine
RETRY_S = 0.25


class ControlSilent(Exception):
    """Control did not answer, or not in time."""


class Answer(msgspec.Struct, frozen=True):
    status: int
    content_type: str
    body: bytes


class Admin:
    """HTTP to control's admin socket. Entered with `async with`."""

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path

    async def __aenter__(self) -> Self:
        connector = aiohttp.UnixConnector(self._socket_path, limit=8)
        self._session = aiohttp.ClientSession("http://control", connector=connector, auto_decompress=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def metrics(self) -> Answer:
        """Control's /metrics as it stands. Raises ControlSilent."""
        return await self._ask("GET", "/metrics", None, ANSWER_S_MAX)

    async def reload_catalog(self) -> Answer:
        """Raises ControlSilent."""
        return await self._ask("POST", "/catalog/reload", {}, RELOAD_S_MAX)

    async def tell(self, path: str, fact: object) -> Answer:
        """Raises ControlSilent."""
        return await self._ask("POST", path, fact, ANSWER_S_MAX)

    async def _ask(self, method: str, path: str, body: object, seconds_max: float) -> Answer:
        data = None if body is None else msgspec.json.encode(body)
        try:
            async with asyncio.timeout(seconds_max):
                async with self._session.request(method, path, data=data, headers={"Content-Type": "application/json"}) as answer:
                    return Answer(answer.status, answer.headers.get("Content-Type", "text/plain"), await answer.read())
        except TimeoutError:
            raise ControlSilent(f"no answer in {seconds_max:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ControlSilent(type(error).__name__) from None


class Reaped(msgspec.Struct, frozen=True):
    """This edge is dead and reaped: its journal has an end."""

    slot: int
    incarnation: str


class Starts(msgspec.Struct, frozen=True):
    """Processes started since the supervisor started, by role."""

    starts: dict[str, int]


class Reporter:
    """Tells control what it must learn; facts wait here while control is away. Bounded by the slots' start pace."""

    def __init__(self, admin: Admin, starts: Callable[[], dict[str, int]], log: EventLog) -> None:
        self._admin = admin
        self._starts = starts
        self._log = log
        self._reaped: dict[str, Reaped] = {}  # by incarnation
        self._told_starts: dict[str, int] = {}
        self._due = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def reaped(self, edge: Child) -> None:
        self._reaped[edge.incarnation] = Reaped(edge.slot, edge.incarnation)
        self.wake()

    def forget_told(self) -> None:
        """A new control knows no starts yet."""
        self._told_starts = {}
        self.wake()

    def wake(self) -> None:
        """Something may have changed, or control may be there now."""
        self._due.set()
        self._idle.clear()

    async def told_all(self) -> None:
        await self._idle.wait()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._due.wait()
            self._due.clear()
            if not await self._tell_all():
                # Woken early by a new control; else try again at this pace.
                try:
                    async with asyncio.timeout(RETRY_S):
                        await self._due.wait()
                except TimeoutError:
                    self._due.set()
            elif not self._due.is_set():
                self._idle.set()

    async def _tell_all(self) -> bool:
        for fact in list(self._reaped.values()):
            if not await self._tell("/reaped", fact):
                return False
            del self._reaped[fact.incarnation]
        starts = self._starts()
        if starts != self._told_starts:
            if not await self._tell("/supervisor", Starts(starts)):
                return False
            self._told_starts = starts
        return True

    async def _tell(self, path: str, fact: Reaped | Starts) -> bool:
        """False: try again."""
        try:
            answer = await self._admin.tell(path, fact)
        except ControlSilent:
            return False
        if 400 <= answer.status < 500:  # heard and refused: saying it again changes nothing
            self._log.error("control_refused", path=path, status=answer.status)
            return True
        return answer.status < 400
