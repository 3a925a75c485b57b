"""Passwords hashed and checked off the event loop, a few at a time: they cost more than anything else that anybody may ask for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from gateway.control.passwords import NOBODY, hash_password, is_password
from gateway.domain.errors import BadRequest, Overloaded

AT_ONCE = 2
WAITING_MAX = 64


class Hashing:
    """At most `AT_ONCE` at a time; beyond `WAITING_MAX` waiting, Overloaded is raised."""

    def __init__(self) -> None:
        self._running = asyncio.Semaphore(AT_ONCE)
        self._waiting = 0

    async def hash(self, field: str, password: str) -> str:
        """Raises BadRequest when it is none, Overloaded."""
        async with self._turn():
            try:
                return await asyncio.to_thread(hash_password, password)
            except ValueError as error:
                raise BadRequest(f"{field}: {error}") from None

    async def check(self, password: str, stored: str | None) -> bool:
        """Takes as long where nothing is stored. Raises Overloaded."""
        async with self._turn():
            matches = await asyncio.to_thread(is_password, password, stored or NOBODY)
        return matches and stored is not None

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self._waiting >= WAITING_MAX:
            raise Overloaded("too many sign-ins at once; try again", retry_after_s=1.0)
        self._waiting += 1
        try:
            await self._running.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._running.release()
