"""A slot: the place of one process, which is filled again whenever its process dies or hangs.

Control has one slot, every edge has its own with its own listener. No more than `STARTS_PER_MIN` starts in any minute;
a process that never got ready waits longer each time.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from typing import Any, Protocol

from gateway.supervisor.children import Child, Command, Role

STARTS_PER_MIN = 10  # half of them as a burst, half as refill: a run of 60 s earns all of the burst back
BURST = STARTS_PER_MIN / 2
BACKOFF_FIRST_S = 0.25
BACKOFF_MAX_S = 30.0
LOOPING_DEATHS = 3  # consecutive deaths before ready: from here on callers are waiting in vain
START_GRACE_S = 15.0  # until the first beat: imports on a busy machine are not a hang
KILL_AFTER_DRAIN_S = 2.0  # past drain_s, in which an edge ends its streams itself
# `hang_s` is promised for the replacement, so the rest of it is left for the kill, the reaping and the start.
HANG_SHARE = 0.8


class EventLog(Protocol):
    """What the supervisor needs of `gateway.log.Log`."""

    def info(self, event: str, **fields: Any) -> None: ...

    def warning(self, event: str, **fields: Any) -> None: ...

    def error(self, event: str, **fields: Any) -> None: ...


class Pace:
    """When the next start is due: a bucket of starts, and a back-off for those that never got ready."""

    def __init__(self, now_s: float) -> None:
        self.failures = 0  # in a row, before ready
        self._starts = BURST
        self._at_s = now_s

    def started(self, now_s: float) -> None:
        self._refill(now_s)
        self._starts -= 1

    def ended(self, *, was_ready: bool) -> None:
        self.failures = 0 if was_ready else self.failures + 1

    def is_well(self) -> None:
        self.failures = 0

    def wait_s(self, now_s: float) -> float:
        """Seconds from now until the next start."""
        self._refill(now_s)
        backoff = 0.0 if self.failures < 2 else min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** (self.failures - 2))
        return max(backoff, (1 - self._starts) * 60 / BURST)

    def _refill(self, now_s: float) -> None:
        self._starts = min(BURST, self._starts + (now_s - self._at_s) * BURST / 60)
        self._at_s = now_s


class Slot:
    """Keeps one process of a role running. `on_change` is called after every change, `on_reaped` for every dead process."""

    def __init__(
        self,
        role: Role,
        number: int,
        *,
        config: str,
        workers: int,
        listener: socket.socket | None,
        command: Command,
        withheld: str = "",
        hang_s: float,
        stop_s: float,
        log: EventLog,
        on_change: Callable[[], None],
        on_reaped: Callable[[Child], None],
    ) -> None:
        """`stop_s`: how long a process that was told to leave may take until it is killed. `withheld`: a variable that it is not given."""
        self.role: Role = role
        self.number = number
        self.starts = 0
        self.current: Child | None = None
        self.was_ready = False
        self.last_status: int | None = None
        self._successor: Child | None = None
        self._leaving: set[Child] = set()
        self._closed = False
        self._empty = asyncio.Event()
        self._next_start: asyncio.TimerHandle | None = None
        self._config, self._workers, self._listener, self._command = config, workers, listener, command
        self._withheld = withheld
        self._hang_s, self._stop_s = hang_s, stop_s
        self._log, self._on_change, self._on_reaped = log, on_change, on_reaped
        self._loop = asyncio.get_running_loop()
        self._pace = Pace(self._loop.time())

    @property
    def is_ready(self) -> bool:
        return self.current is not None and self.current.is_ready

    @property
    def failures(self) -> int:
        """Deaths before ready in a row."""
        return self._pace.failures

    @property
    def is_looping(self) -> bool:
        """Its processes keep dying: who is queued at this slot waits in vain."""
        waits = self._next_start is not None and self._next_start.when() - self._loop.time() > BACKOFF_FIRST_S
        return not self.is_ready and (waits or self.failures >= LOOPING_DEATHS)

    def start(self) -> None:
        """Fill the slot now; after this it stays filled until `close()`."""
        self._next_start = None
        self.current = self._spawn()
        if self.current is None:
            self._start_later()

    def watch(self, elapsed_s: float) -> None:
        """Count `elapsed_s` more of silence for every process of this slot, and kill the hung."""
        for child in self._children():
            was_ready = child.is_ready
            child.silent_s += elapsed_s
            limit_s = self._hang_s * HANG_SHARE if child.heard else max(self._hang_s, START_GRACE_S)
            if self._hang_s > 0 and child.silent_s > limit_s and not child.killed:
                self._log.error("process_hung", **_facts(child), silent_s=round(child.silent_s, 2))
                _kill(child)
            if was_ready and not child.is_ready:
                self._on_change()

    async def roll(self) -> bool:
        """Start a process beside the current one and let the old drain once the new is ready. False: the old stays."""
        if self._closed or self.current is None or self._successor is not None:
            return False
        child = self._successor = self._spawn()
        if child is None:
            return False
        await child.decided.wait()
        if self._successor is not child:  # dead, promoted when the old one died, or told to leave
            return self.current is child
        old, self.current, self._successor = self.current, child, None
        if old is not None:
            self._leave(old)
        self._on_change()
        return True

    def close(self) -> None:
        """Tell every process to leave, and start no more."""
        self._closed = True
        if self._next_start is not None:
            self._next_start.cancel()
            self._next_start = None
        for child in (self.current, self._successor):
            if child is not None:
                self._leave(child)
        self.current = self._successor = None
        self._note_if_empty()

    def kill(self) -> None:
        for child in self._children():
            _kill(child)

    async def emptied(self) -> None:
        """Wait until every process of a closed slot is reaped."""
        await self._empty.wait()

    def _children(self) -> set[Child]:
        return self._leaving | {child for child in (self.current, self._successor) if child is not None}

    def _spawn(self) -> Child | None:
        self._pace.started(self._loop.time())
        try:
            child = Child(
                self.role,
                slot=self.number,
                config=self._config,
                workers=self._workers,
                listener=self._listener,
                command=self._command,
                withheld=self._withheld,
                on_change=self._child_changed,
                on_end=self._child_ended,
            )
        except OSError as error:
            self._pace.ended(was_ready=False)
            self._log.error("process_not_started", role=self.role, slot=self.number, reason=error.strerror)
            return None
        self.starts += 1
        self._log.info("process_started", **_facts(child))
        return child

    def _start_later(self) -> None:
        wait_s = self._pace.wait_s(self._loop.time())
        self._next_start = self._loop.call_later(wait_s, self.start)
        if wait_s > BACKOFF_FIRST_S:
            self._log.warning("process_start_delayed", role=self.role, slot=self.number, wait_s=round(wait_s, 2))

    def _leave(self, child: Child) -> None:
        child.leaving = True
        self._leaving.add(child)
        child.signal(signal.SIGTERM)
        self._loop.call_later(self._stop_s, self._kill_late, child)

    def _kill_late(self, child: Child) -> None:
        if not child.ended.is_set():
            self._log.warning("process_killed", **_facts(child), reason="still there after its time to leave")
            _kill(child)

    def _child_changed(self, child: Child) -> None:
        if child.is_ready:
            self.was_ready = True
            self._pace.is_well()
            self._log.info("process_ready", **_facts(child), after_s=round(child.ran_s, 3))
        self._on_change()

    def _child_ended(self, child: Child) -> None:
        self.last_status = child.status
        level = self._log.info if child.leaving and child.status == 0 else self._log.warning
        level("process_ended", **_facts(child), status=child.status, ran_s=round(child.ran_s, 3))
        self._leaving.discard(child)
        if child is self._successor:
            self._successor = None
        elif child is self.current:
            self._pace.ended(was_ready=child.was_ready)
            self.current, self._successor = self._successor, None
            if self.current is None and not self._closed:
                self._start_later()
        self._on_reaped(child)
        self._on_change()
        self._note_if_empty()

    def _note_if_empty(self) -> None:
        if self._closed and not self._children():
            self._empty.set()


def _kill(child: Child) -> None:
    child.killed = True
    child.signal(signal.SIGKILL)


def _facts(child: Child) -> dict[str, Any]:
    return {"role": child.role, "slot": child.slot, "child": child.pid, "incarnation": child.incarnation}
