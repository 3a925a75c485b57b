"""Open-loop load: requests are due at a fixed rate, whatever comes back, and an answer's time counts from when its request was due.

So a slow server is not asked less, and what waits for a free connection has its wait in its latency. The loader wakes each
millisecond and sends what became due; `late_ms_p99` tells how late it was itself.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from functools import partial

import msgspec

from bench.load import LoadConnection, Report, Tally, Target, percentile

TICK_S = 0.001
DRAIN_S_MAX = 10.0


class _Line:
    """What is due, and who is free to send it."""

    def __init__(self) -> None:
        self.idle: list[OpenConnection] = []
        self.due: deque[float] = deque()
        self.late_s: list[float] = []

    def dispatch(self) -> None:
        while self.due and self.idle:
            self.idle.pop().ask(self.due.popleft())


class OpenConnection(LoadConnection):
    """Sends when something is due, and is idle in between."""

    def __init__(self, target: Target, request: bytes, tally: Tally, line: _Line) -> None:
        super().__init__(target, request, tally)
        self._line = line

    def ask(self, due_s: float) -> None:
        self._send()
        self._line.late_s.append(self._sent_s - due_s)
        self._sent_s = due_s

    def _next(self) -> None:
        self._line.idle.append(self)
        self._line.dispatch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._line.idle:
            self._line.idle.remove(self)
        super().connection_lost(exc)


async def open_loop(target: Target, *, rate_per_s: float, connections: int, seconds: float) -> Report:
    """`rate_per_s` requests for that long; what is not answered DRAIN_S_MAX after that is an error.

    `late_ms_p99` is the time from due to sent, waits for a free connection included. Raises OSError.
    """
    tally, line, request, loop = Tally(), _Line(), target.request(), asyncio.get_running_loop()
    opened = []
    try:
        for _ in range(connections):
            _, connection = await loop.create_connection(partial(OpenConnection, target, request, tally, line), *target.address)
            opened.append(connection)
        began, asked, wanted = time.perf_counter(), 0, int(rate_per_s * seconds)
        while asked < wanted:
            reached = min(wanted, int((time.perf_counter() - began) * rate_per_s) + 1)
            for number in range(asked, reached):
                line.due.append(began + number / rate_per_s)
            asked = reached
            line.dispatch()
            await asyncio.sleep(TICK_S)  # the rhythm itself
        took_s = time.perf_counter() - began
        give_up_s = time.perf_counter() + DRAIN_S_MAX
        while len(tally.latencies_s) + tally.errors < wanted and time.perf_counter() < give_up_s:
            await asyncio.sleep(TICK_S)
    finally:
        for connection in opened:
            connection.stop()
        for connection in opened:
            await connection.lost
    unanswered = max(0, wanted - len(tally.latencies_s) - tally.errors)
    report = tally.report(connections, took_s)
    late_ms = percentile(sorted(line.late_s), 0.99) * 1000
    return msgspec.structs.replace(report, errors=report.errors + unanswered, late_ms_p99=late_ms)
