"""Performs a plan on a connection: at its times, at the reader's pace, to its ending.

One timer at most; no task. The caller's hang-up is told by `abandon`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Callable

from bench.answers import ID_MARK
from bench.books import Books, Entry
from bench.plan import Ending, Plan, Step

STEPS_AT_ONCE = 256  # then other connections get their turn
EARLY_S = 0.0005  # uvloop's timers count in whole milliseconds and may fire this much early
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: close sends RST


class Delivery:
    """One answer on its way. `done` is called when the connection is free for the next request."""

    def __init__(self, transport: asyncio.Transport, plan: Plan, entry: Entry, books: Books, done: Callable[[], None]) -> None:
        self._transport = transport
        self._plan = plan
        self._entry = entry
        self._books = books
        self._done = done
        self._id = entry.answer_id.encode()
        self._began = time.monotonic()
        self._waiting: Step | None = None
        self._timer: asyncio.Handle | None = None
        self._paused = False
        self._flushing = False

    def pump(self) -> None:
        """Writes every step that is due, then arms the timer for the next."""
        self._timer = None
        for _ in range(STEPS_AT_ONCE):
            if self._paused:
                return
            step = self._waiting or next(self._plan.steps, None)
            if step is None:
                self._end()
                return
            wait_s = self._began + step.at_s - time.monotonic()
            if wait_s > EARLY_S:
                self._waiting = step
                self._timer = asyncio.get_running_loop().call_later(wait_s, self.pump)
                return
            self._waiting = None
            self._transport.write(step.data.replace(ID_MARK, self._id))
            if step.made > self._entry.completion_tokens:
                self._entry.completion_tokens = step.made
                if self._entry.first is None:
                    self._entry.first = time.monotonic()
            self._books.changed()
        self._timer = asyncio.get_running_loop().call_soon(self.pump)

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        if self._flushing:
            self._close()
        elif self._timer is None and self._entry.finished is None:
            self.pump()

    def abandon(self) -> None:
        """The connection is gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._entry.finished is None:
            self._entry.cancelled = time.monotonic()
            self._books.changed()

    def _end(self) -> None:
        if self._plan.ending is Ending.HANG:
            return
        self._entry.finished = time.monotonic()
        self._books.changed()
        if self._plan.ending is Ending.KEEP:
            self._done()
        elif self._transport.get_write_buffer_size() == 0:
            self._close()
        else:
            # A reset throws away what the kernel does not have yet: wait for the buffer to be empty.
            self._flushing = True
            self._transport.set_write_buffer_limits(high=0)

    def _close(self) -> None:
        self._flushing = False
        if self._plan.ending is Ending.RESET:
            connection: socket.socket = self._transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            self._transport.abort()
        else:
            self._transport.close()
