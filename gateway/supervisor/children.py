"""One supervised process: started by exec, heard by its pulse, reaped when its pidfd says so.

Judges nothing: how long a child may be silent and what follows its end are the slot's business.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Literal

import msgspec

from gateway.link.pulse import READY, ChildArgs

Role = Literal["edge", "control"]
Command = Callable[[Role, ChildArgs], list[str]]

STALE_S = 2.0  # four missed beats: such a child is not called ready any more, long before it is called hung


def module_command(role: Role, args: ChildArgs) -> list[str]:
    """The real children: `python -m gateway.<role> '<ChildArgs as JSON>'`."""
    return [sys.executable, "-m", f"gateway.{role}", msgspec.json.encode(args).decode()]


class Child:
    """A process from start to reaping. `on_change` is called when it becomes ready or unready, `on_end` once, after reaping."""

    def __init__(
        self,
        role: Role,
        *,
        slot: int,
        config: str,
        workers: int,
        listener: socket.socket | None,
        command: Command,
        withheld: str = "",
        on_change: Callable[[Child], None],
        on_end: Callable[[Child], None],
    ) -> None:
        """Starts the process, in our environment but for the variable that is `withheld`.

        Raises OSError when the system refuses one (no memory, no process table entry).
        """
        self.role = role
        self.slot = slot
        self.incarnation = f"{int(asyncio.get_running_loop().time() * 1000):x}-{os.urandom(4).hex()}"
        self.silent_s = 0.0  # time without a beat, in which the supervisor itself ran
        self.heard = False
        self.was_ready = False
        self.leaving = False
        self.killed = False
        self.status: int | None = None  # exit code, or minus the signal
        self.decided = asyncio.Event()  # ready for the first time, or ended
        self.ended = asyncio.Event()
        self._says_ready = False
        self._on_change = on_change
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self.started_s = self._loop.time()
        self._pulse, theirs = socket.socketpair()
        with theirs:
            listen_fd = -1 if listener is None else listener.fileno()
            args = ChildArgs(
                config=config,
                incarnation=self.incarnation,
                pulse_fd=theirs.fileno(),
                slot=slot,
                listen_fd=listen_fd,
                workers=workers,
            )
            try:
                self._process = _spawn(command(role, args), [fd for fd in (theirs.fileno(), listen_fd) if fd >= 0], withheld)
            except OSError:
                self._pulse.close()
                raise
        self.pid = self._process.pid
        self._pulse.setblocking(False)
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._pidfd, self._reap)
        self._loop.add_reader(self._pulse, self._hear)

    @property
    def is_ready(self) -> bool:
        """Can do its work, as far as we heard lately."""
        return self._says_ready and not self.leaving and not self.ended.is_set() and self.silent_s < STALE_S

    @property
    def ran_s(self) -> float:
        return self._loop.time() - self.started_s

    def signal(self, number: signal.Signals) -> None:
        if not self.ended.is_set():
            self._process.send_signal(number)

    def __repr__(self) -> str:
        state = f"ended {self.status}" if self.ended.is_set() else "leaving" if self.leaving else "ready" if self.is_ready else "alive"
        return f"<Child {self.role} {self.slot} pid {self.pid} {state}, silent {self.silent_s:.1f}s>"

    def _hear(self) -> None:
        try:
            beats = self._pulse.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            beats = b""
        if not beats:  # it closed its side: it ends soon, or is silent from now on
            self._close_pulse()
            return
        before = self.is_ready
        self.silent_s = 0.0
        self.heard = True
        self._says_ready = beats[-1:] == READY
        if self._says_ready:
            self.was_ready = True
            self.decided.set()
        if self.is_ready is not before:
            self._on_change(self)

    def _reap(self) -> None:
        self.status = self._process.wait()  # returns at once: the pidfd is readable only when it ended
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._close_pulse()
        self.ended.set()
        self.decided.set()
        self._on_end(self)

    def _close_pulse(self) -> None:
        if self._pulse.fileno() >= 0:
            self._loop.remove_reader(self._pulse)
            self._pulse.close()


def _spawn(command: list[str], pass_fds: list[int], withheld: str) -> subprocess.Popen[bytes]:
    environ = {name: value for name, value in os.environ.items() if name != withheld}
    # stdout is ours alone (the ready line); what a child prints there is a message for the operator.
    # A group of its own: Ctrl-C and other signals to our group reach us alone, and we answer them in our own order.
    return subprocess.Popen(  # noqa: S603 - our own modules
        command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=pass_fds, process_group=0, env=environ
    )
