"""The pulse of a supervised process: what the supervisor watches, and how a child learns that its supervisor is gone.

One socketpair per child. The child writes one byte at least four times per `hang_s`: `READY` when it can do its work,
`ALIVE` when it only lives. A closed pair means that the other side is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable

import msgspec

ALIVE = b"."
READY = b"R"
INTERVAL_S_MAX = 0.5  # readiness travels at this pace, also when hang_s is large or 0


class ChildArgs(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor tells a child, as JSON in its argv."""

    config: str  # absolute path
    incarnation: str
    pulse_fd: int
    slot: int = 0  # edges only
    listen_fd: int = -1  # edges only
    workers: int = 1  # edges of this gateway; each has an equal share of what is limited for all


def ignore_foreign_signals() -> None:
    """What is meant for the supervisor ends no child: `pkill -HUP -f gateway` reaches all of them."""
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def pulse_interval_s(hang_s: float) -> float:
    return min(INTERVAL_S_MAX, hang_s / 4) if hang_s > 0 else INTERVAL_S_MAX


class Pulse:
    """The child's side. `on_orphaned` is called once when the supervisor is gone."""

    def __init__(self, fd: int, *, interval_s: float, is_ready: Callable[[], bool], on_orphaned: Callable[[], None]) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self._interval_s = interval_s
        self._is_ready = is_ready
        self._on_orphaned = on_orphaned
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._read)
        self.beat()

    def beat(self) -> None:
        """Say now how we are; also called at once when readiness changes."""
        if self._timer is not None:
            self._timer.cancel()
        with contextlib.suppress(OSError):  # a full pair: the supervisor is slow, not we; a broken one: _read sees it
            self._socket.send(READY if self._is_ready() else ALIVE)
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self.beat)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()

    def _read(self) -> None:
        try:
            data = self._socket.recv(64)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.stop()
            self._on_orphaned()
