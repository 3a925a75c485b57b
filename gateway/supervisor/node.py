"""All processes of one gateway on one machine: started together, watched, replaced, rolled and drained in order.

Drain: readiness turns red; edges still accept for a short while, so that whoever reads it can turn away; then the
listeners close and the edges finish what they have; control goes last, when every edge's journal has its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

from gateway import __version__
from gateway.link.runtime import ADMIN, RuntimeDir
from gateway.settings import Settings
from gateway.supervisor.admin import Admin, ControlSilent, Reporter
from gateway.supervisor.children import Child, Command
from gateway.supervisor.listeners import ListenError, Listeners
from gateway.supervisor.operations import Health, Operations, Readiness
from gateway.supervisor.slots import KILL_AFTER_DRAIN_S, EventLog, Slot

CONTROL_STOP_S = 10.0
TELL_S_MAX = 5.0  # at the end of a drain, for control to hear of the last reaped edges
LAME_DUCK_S_MAX = 1.0
TICK_S_MAX = 0.25
FIRST_STARTS_MAX = 5  # deaths before the first ready that mean: this will not start at all
FIRST_START_S_MAX = 20.0  # or two, when each takes its time, as waiting for a locked store does
IMPATIENT_SIGNALS = 3  # within a second: the operator does not want to wait for the drain


class CannotStart(Exception):
    """The gateway was never ready and will not be. `str(error)` says why, for an operator."""


class Supervisor:
    """One gateway. `run()` returns the exit code: 0 after a drain, 1 when the drain was cut short."""

    def __init__(self, settings: Settings, config: str, *, workers: int, log: EventLog, command: Command) -> None:
        """`config` is the settings file's absolute path, for the children; `command` starts one child."""
        self._settings = settings
        self._config = config
        self._workers = workers
        self._log = log
        self._command = command
        self._stop_asked = asyncio.Event()
        self._roll_asked = asyncio.Event()
        self._reload_asked = asyncio.Event()
        self._started_s = asyncio.get_running_loop().time()
        self._draining = False
        self._announced = False
        self._gave_up = ""
        self._cut_short = False
        self._stop_signals: deque[float] = deque(maxlen=IMPATIENT_SIGNALS)

    async def run(self) -> int:
        """Serve until drained. Raises CannotStart; then nothing is left running."""
        server = self._settings.server
        try:
            runtime = RuntimeDir(Path(server.runtime_dir))
            self._listeners = Listeners.open(server.host, server.port, self._workers)
        except ListenError as error:
            raise CannotStart(str(error)) from None
        except OSError as error:
            raise CannotStart(f"cannot use {server.runtime_dir} ([server] runtime_dir): {error.strerror}") from None
        with contextlib.closing(self._listeners), _owned(runtime), self._signals():
            async with Admin(runtime.socket(ADMIN)) as self._admin:
                self._reporter = Reporter(self._admin, self._starts, self._log)
                self._make_slots()
                operations = Operations(health=self._health, readiness=self._readiness, metrics=self._admin.metrics)
                try:
                    await operations.start(self._settings.operations.host, self._settings.operations.port)
                except OSError as error:
                    await operations.stop()
                    where = f"{self._settings.operations.host}:{self._settings.operations.port}"
                    raise CannotStart(f"cannot listen on {where} ([operations]): {error.strerror or error}") from None
                self._log.info("operations_listening", host=self._settings.operations.host, port=operations.port)
                try:
                    await self._serve()
                finally:
                    await operations.stop()
        if self._gave_up:
            raise CannotStart(self._gave_up)
        return 1 if self._cut_short else 0

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(self._watch()),
                tasks.create_task(self._reporter.run()),
                tasks.create_task(self._whenever(self._roll_asked, self._roll)),
                tasks.create_task(self._whenever(self._reload_asked, self._reload)),
            ]
            for slot in self._slots():
                slot.start()
            await self._stop_asked.wait()
            await self._drain()
            for task in running:
                task.cancel()

    async def _drain(self) -> None:
        self._draining = True
        drain_s = self._settings.server.drain_s
        self._log.info("drain_started", drain_s=drain_s)
        if self._announced and not self._cut_short:
            await asyncio.sleep(min(LAME_DUCK_S_MAX, drain_s / 4))
        self._listeners.close()
        for edge in self._edges:
            edge.close()
        if self._cut_short:
            self._kill_edges()
        for edge in self._edges:
            await edge.emptied()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TELL_S_MAX if self._control.is_ready else 0):
                await self._reporter.told_all()
        self._control.close()
        await self._control.emptied()
        self._log.info("drained")

    async def _watch(self) -> None:
        hang_s = self._settings.server.hang_s
        tick_s = min(TICK_S_MAX, hang_s / 8) if hang_s > 0 else TICK_S_MAX
        loop = asyncio.get_running_loop()
        before_s = loop.time()
        while True:
            await asyncio.sleep(tick_s)
            now_s = loop.time()
            # A long gap means that we were stopped or starved ourselves: nobody's silence is proven by it.
            elapsed_s = min(now_s - before_s, 2 * tick_s)
            before_s = now_s
            for slot in self._slots():
                slot.watch(elapsed_s)

    async def _whenever(self, asked: asyncio.Event, act: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asked.wait()
            asked.clear()
            await act()

    async def _roll(self) -> None:
        self._log.info("roll_started")
        for edge in self._edges:
            if self._draining:
                return
            if not await edge.roll():
                self._log.error("roll_stopped", slot=edge.number, reason="the new edge did not get ready; the others stay as they are")
                return
        self._log.info("rolled")

    async def _reload(self) -> None:
        try:
            answer = await self._admin.reload_catalog()
        except ControlSilent as silent:
            self._log.error("catalog_reload_failed", reason=f"control does not answer: {silent}")
            return
        try:
            found = json.loads(answer.body)
        except ValueError:
            found = None
        if answer.status == 200:
            self._log.info("catalog_reloaded", answer=found)
        else:
            self._log.error("catalog_refused", status=answer.status, answer=found)

    def _make_slots(self) -> None:
        server = self._settings.server
        make = partial(Slot, config=self._config, workers=self._workers, command=self._command, hang_s=server.hang_s, log=self._log)
        self._control = make("control", 0, listener=None, stop_s=CONTROL_STOP_S, on_change=self._control_changed, on_reaped=_nobody_to_tell)
        self._control_known: str | None = None
        self._edges = [
            make(
                "edge",
                number,
                listener=listener,
                withheld=self._settings.content.key_env,  # they read what strangers send, and need no key to what others have kept
                stop_s=server.drain_s + KILL_AFTER_DRAIN_S,
                on_change=self._edges_changed,
                on_reaped=self._reporter.reaped,
            )
            for number, listener in enumerate(self._listeners.sockets)
        ]

    def _slots(self) -> list[Slot]:
        return [self._control, *self._edges]

    def _starts(self) -> dict[str, int]:
        return {"edge": sum(edge.starts for edge in self._edges), "control": self._control.starts}

    def _control_changed(self) -> None:
        control = self._control.current
        if control is not None and control.is_ready and control.incarnation != self._control_known:
            self._control_known = control.incarnation
            self._reporter.forget_told()
        self._changed()

    def _edges_changed(self) -> None:
        self._reporter.wake()
        self._changed()

    def _changed(self) -> None:
        if self._announced or self._stop_asked.is_set():
            return
        if all(slot.is_ready for slot in self._slots()):
            self._announced = True
            self._log.info("ready", workers=self._workers)
            print(f"ready {self._listeners.url(tls=bool(self._settings.server.tls_cert))}", flush=True)  # noqa: T201 - the contract
            return
        waited_s = asyncio.get_running_loop().time() - self._started_s
        for slot in self._slots():
            if not slot.was_ready and slot.failures >= (2 if waited_s > FIRST_START_S_MAX else FIRST_STARTS_MAX):
                status = slot.last_status
                how = f"was killed by signal {-status}" if status is not None and status < 0 else f"exited with status {status}"
                self._gave_up = f"{slot.role} {how}, {slot.failures} times before it was ready; its own messages are above"
                self._stop_asked.set()
                return

    def _health(self, operations_port: int) -> Health:
        control = self._control.current
        edges = [edge.current.pid for edge in self._edges if edge.current is not None]
        well = all(slot.is_ready for slot in self._slots())
        return Health(
            status="draining" if self._draining else "ok" if well else "degraded",
            version=__version__,
            supervisor=os.getpid(),
            control=None if control is None else control.pid,
            edges=edges,
            operations_port=operations_port,
        )

    def _readiness(self) -> Readiness:
        if self._draining:
            return Readiness(ready=False, reason="draining")
        if not self._control.was_ready:
            return Readiness(ready=False, reason="control has not started yet")
        if not any(edge.is_ready for edge in self._edges):
            return Readiness(ready=False, reason="no edge can admit")
        looping = [str(edge.number) for edge in self._edges if edge.is_looping]
        if looping:
            return Readiness(ready=False, reason=f"edges of slot {', '.join(looping)} keep dying; connections queued there wait")
        return Readiness(ready=True)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        acts: dict[signal.Signals, Callable[[], object]] = {
            signal.SIGTERM: self._on_stop_signal,
            signal.SIGINT: self._on_stop_signal,
            signal.SIGHUP: self._reload_asked.set,
            signal.SIGUSR2: self._roll_asked.set,
            # One letter beside it, and its default would end everything without a drain.
            signal.SIGUSR1: lambda: self._log.warning("signal_ignored", signal="SIGUSR1"),
        }
        for number, act in acts.items():
            loop.add_signal_handler(number, act)
        try:
            yield
        finally:
            for number in acts:
                loop.remove_signal_handler(number)

    def _on_stop_signal(self) -> None:
        now_s = asyncio.get_running_loop().time()
        self._stop_signals.append(now_s)
        self._stop_asked.set()
        self._draining = True  # at once: readiness is red before anything else happens
        if len(self._stop_signals) == IMPATIENT_SIGNALS and now_s - self._stop_signals[0] < 1.0 and not self._cut_short:
            self._log.warning("drain_cut_short")
            self._cut_short = True
            self._kill_edges()

    def _kill_edges(self) -> None:
        for edge in self._edges:
            edge.kill()


def _nobody_to_tell(_: Child) -> None:
    """A dead control left no journal."""


@contextlib.contextmanager
def _owned(runtime: RuntimeDir) -> Iterator[None]:
    with contextlib.ExitStack() as owning:
        try:
            owning.enter_context(runtime.owned())
        except BlockingIOError:
            raise CannotStart(f"another gateway runs in {runtime.path} ([server] runtime_dir)") from None
        yield
