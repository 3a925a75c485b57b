"""The simulated provider's own books: what it was asked, what it made, and when the other side left.

Tests compare them with what a gateway says it was charged for. Bounded: the oldest entries are dropped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import msgspec

ENTRIES_MAX = 10_000


class Entry(msgspec.Struct, kw_only=True, gc=False):
    """One request that reached the model. Times are seconds of the monotonic clock; None: did not happen."""

    sequence: int  # from 1, in order of arrival
    model: str
    answer_id: str  # the `id` in the answer
    stream: bool
    prompt_tokens: int
    completion_tokens: int = 0  # made: handed to the socket so far, reasoning included
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    status: int = 200
    started: float
    first: float | None = None  # the first of what it made was handed to the socket
    finished: float | None = None  # the last byte (or the planned break) was handed to the socket
    cancelled: float | None = None  # the caller closed before that
    headers: tuple[tuple[str, str], ...] = ()  # as received; the value of Authorization only with keep_headers
    body: bytes = b""  # only with keep_bodies


class Books:
    """Entries and counters. `requests` counts every request, also those for lists and books."""

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque(maxlen=ENTRIES_MAX)
        self.requests = 0
        self.connections = 0
        self.open_connections = 0
        self.dropped_requests = 0  # closed without an answer on a reused connection: never executed
        self._sequence = 0
        self._waiters: list[tuple[Callable[[Books], bool], asyncio.Future[None]]] = []

    def next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def changed(self) -> None:
        """Wakes the waiters whose predicate has become true."""
        if not self._waiters:
            return
        for predicate, future in self._waiters:
            if not future.done() and predicate(self):
                future.set_result(None)

    async def wait_for(self, predicate: Callable[[Books], bool], timeout_s: float = 5.0) -> None:
        """Returns once `predicate(books)` is true, judged at every change. Raises TimeoutError."""
        if predicate(self):
            return
        waiter = (predicate, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter[1]
        finally:
            self._waiters.remove(waiter)

    def clear(self) -> None:
        """Forgets entries and counters; open connections stay counted."""
        self.entries.clear()
        self.requests = self.dropped_requests = 0
        self.connections = self.open_connections

    def to_json(self) -> bytes:
        """`{"requests", "connections", "open_connections", "dropped_requests", "entries": [...]}`; bodies as base64."""
        return msgspec.json.encode(
            {
                "requests": self.requests,
                "connections": self.connections,
                "open_connections": self.open_connections,
                "dropped_requests": self.dropped_requests,
                "entries": list(self.entries),
            }
        )
