"""Whether a caller takes what is written to it: one who takes something, however slowly, is slow; one who takes nothing is gone."""

from __future__ import annotations

import asyncio

from gateway.edge.deadline import Deadline


class WriteWatch:
    """Watches one transport's unsent bytes, and aborts it when none of them left for `stall_s` seconds."""

    __slots__ = ("_deadline", "_loop", "_stall_s", "_transport", "_unsent", "paused")

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, stall_s: float) -> None:
        self._loop = loop
        self._transport = transport
        self._stall_s = stall_s
        self._deadline = Deadline(loop)
        self._unsent = 0
        self.paused = False  # the transport's buffer is over its limit

    def pause(self) -> None:
        self.paused = True
        self.begin()

    def resume(self) -> None:
        self.paused = False
        self._deadline.clear()

    def add(self, size: int) -> None:
        """More was written: that says nothing about what the caller takes."""
        self._unsent += size

    def begin(self) -> None:
        """From now on: also when the connection is to be closed once everything is sent."""
        self._unsent = self._transport.get_write_buffer_size()
        self._deadline.set(self._loop.time() + self._stall_s, self._check)

    def close(self) -> None:
        self._deadline.close()

    def _check(self) -> None:
        unsent = self._transport.get_write_buffer_size()
        if unsent >= self._unsent:
            self._transport.abort()
        elif unsent:
            self.begin()
