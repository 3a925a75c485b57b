"""The fleet's figures, which never fall: not when an edge is replaced, nor when control itself is.

Each process reports all it has counted since it started. Control keeps the last report of each and the sum of those
that are dead ("retired"), and writes both to a file before a scrape may show them, so that a new control begins with
nothing less than was ever shown. The file is for processes that die, not for power loss: it is not synced.
"""

from __future__ import annotations

import asyncio
import collections
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from gateway.control.totals import Totals, render, sum_up, with_facts
from gateway.domain.metrics import METRICS, HistogramSample, Samples
from gateway.log import Log

SAVE_S = 1.0
LAG_S = 0.1  # how often the loop's lag is looked at
GONE_MAX = 64  # processes that left without being known dead; the oldest retire beyond this
RETIRED_NAMES_MAX = 1024  # retired incarnations remembered, so that none is counted twice

Role = Literal["edge", "control", "supervisor"]


class Process(msgspec.Struct):
    """The last word of one incarnation."""

    role: Role
    samples: Samples = Samples()
    dead: bool = False


class State(msgspec.Struct):
    """What the file holds."""

    retired: Samples = Samples()
    retired_names: list[str] = []
    processes: dict[str, Process] = {}  # by incarnation, oldest first


class Telemetry:
    """Figures of all processes of a node. `load()` first; `run()` saves them each second; `scrape()` shows them."""

    def __init__(self, path: Path, *, incarnation: str, supervisor: str, log: Log) -> None:
        """`incarnation` is control's own, `supervisor` names the supervisor that started it."""
        self._path = path
        self._log = log
        self._own_name = incarnation
        self._supervisor_name = supervisor
        self._own_counts: dict[str, dict[tuple[str, ...], float]] = {}
        self._own_histograms: dict[str, dict[tuple[str, ...], HistogramSample]] = {}
        self._facts: dict[str, Callable[[], float]] = {}
        self._retired = Totals()
        self._retired_names: collections.deque[str] = collections.deque(maxlen=RETIRED_NAMES_MAX)
        self._processes: dict[str, Process] = {}
        self._connected: set[str] = set()
        self._changed = False
        self._saving = asyncio.Lock()
        self._save_failed = False

    def load(self) -> None:
        """Take over what an earlier control wrote. An unreadable file means to begin at nothing."""
        try:
            state = msgspec.msgpack.decode(self._path.read_bytes(), type=State)
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError) as error:
            self._log.error("telemetry_file_unreadable", reason=type(error).__name__)
            return
        self._retired.add(state.retired, gauges=False)
        self._retired_names.extend(state.retired_names)
        self._processes = state.processes
        for name, process in list(self._processes.items()):
            # Whoever holds the store's lock is the only control, so the others are dead, and so is another supervisor.
            if process.role == "control" or (process.role == "supervisor" and name != self._supervisor_name):
                self._retire(name)

    async def run(self) -> None:
        """Watch the loop's lag and save each second, until cancelled."""
        loop = asyncio.get_running_loop()
        saved_s = loop.time()
        while True:
            due_s = loop.time() + LAG_S
            await asyncio.sleep(LAG_S)
            self.observe("gateway_loop_lag_seconds", max(0.0, loop.time() - due_s), "control")
            if loop.time() - saved_s >= SAVE_S:
                saved_s = loop.time()
                await self.save()

    def joined(self, incarnation: str) -> None:
        """An edge is there."""
        self._connected.add(incarnation)
        if incarnation not in self._retired_names:
            self._processes.setdefault(incarnation, Process("edge"))
        else:
            self._log.error("retired_edge_joined", incarnation=incarnation)  # its figures are counted already and stay as they are

    def left(self, incarnation: str) -> None:
        """An edge's link ended. It stays counted: it may be alive and come back."""
        self._connected.discard(incarnation)
        process = self._processes.pop(incarnation, None)
        if process is None:
            return
        self._processes[incarnation] = process  # the youngest of the gone
        if process.dead:
            self._retire(incarnation)
        gone = [name for name, process in self._processes.items() if process.role == "edge" and name not in self._connected]
        for name in gone[: max(0, len(gone) - GONE_MAX)]:
            self._retire(name)

    def reaped(self, incarnation: str) -> None:
        """An edge is dead for certain; what its link still holds is counted before it retires."""
        process = self._processes.get(incarnation)
        if process is not None:
            process.dead = True
            if incarnation not in self._connected:
                self._retire(incarnation)

    def report(self, incarnation: str, samples: Samples) -> None:
        """All figures of an edge, or what changed of them since its last report."""
        process = self._processes.get(incarnation)
        if process is not None:
            process.samples = process.samples.changed_by(samples)
            self._changed = True

    def supervisor_started(self, starts: Mapping[str, int]) -> None:
        """How many processes of each role the supervisor has started since it started itself."""
        numbers: dict[tuple[str, ...], float] = {(role,): float(count) for role, count in starts.items()}
        self._processes[self._supervisor_name] = Process("supervisor", Samples(numbers={"gateway_process_starts_total": numbers}))
        self._changed = True

    def count(self, name: str, *labels: str, more: int = 1) -> None:
        """So many more of control's own counters."""
        series = self._own_counts.setdefault(name, {})
        series[labels] = series.get(labels, 0) + more
        self._changed = True

    def declare(self, name: str, *labels: str) -> None:
        """Show a counter or histogram of control's own from the start, at nothing."""
        if METRICS[name].kind == "histogram":
            self._own_histograms.setdefault(name, {}).setdefault(labels, _nothing(name))
        else:
            self._own_counts.setdefault(name, {}).setdefault(labels, 0.0)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """One more observation of a histogram of control's own. No reason to write the file: a scrape does so first."""
        bounds = METRICS[name].buckets
        sample = self._own_histograms.setdefault(name, {}).setdefault(labels, _nothing(name))
        sample.buckets[next((i for i, bound in enumerate(bounds) if value <= bound), len(bounds))] += 1
        self._own_histograms[name][labels] = HistogramSample(sample.buckets, sample.sum + value)

    def fact(self, name: str, read: Callable[[], float]) -> None:
        """A figure without labels that is known whole at any time, from the store or the disk: shown as read, never summed."""
        self._facts[name] = read

    async def scrape(self) -> bytes:
        """The fleet's figures in Prometheus' text format, once they are safe in the file."""
        async with self._saving:
            state = await self._save()
            live = [process.samples for name, process in state.processes.items() if self._is_live(name)]
            counted = [state.retired, *(process.samples for name, process in state.processes.items() if not self._is_live(name))]
            facts: dict[str, dict[tuple[str, ...], float]] = {name: {(): read()} for name, read in self._facts.items()}
            return await asyncio.to_thread(lambda: render(with_facts(sum_up(counted, live), facts)))

    async def save(self) -> None:
        """Write the file if anything changed."""
        async with self._saving:
            if self._changed:
                await self._save()

    async def _save(self) -> State:
        self._changed = False
        state = self._state()
        try:
            await asyncio.to_thread(self._write, state)
        except OSError as error:
            # Figures that may fall when control is restarted are better than none.
            if not self._save_failed:
                self._log.error("telemetry_not_saved", reason=error.strerror)
            self._save_failed = True
        else:
            self._save_failed = False
        return state

    def _state(self) -> State:
        """What is known now; shares only what is replaced whole, so that a thread may read it."""
        retired = self._retired.samples()
        processes = {name: Process(process.role, process.samples, process.dead) for name, process in self._processes.items()}
        processes[self._own_name] = Process("control", self._own())
        return State(
            Samples(
                numbers={name: dict(series) for name, series in retired.numbers.items()},
                histograms=retired.histograms,
            ),
            list(self._retired_names),
            processes,
        )

    def _own(self) -> Samples:
        numbers = {name: dict(series) for name, series in self._own_counts.items()}
        numbers["gateway_edges"] = {(): float(len(self._connected))}
        numbers["gateway_tasks"] = {("control",): float(len(asyncio.all_tasks()))}
        numbers["gateway_log_dropped_total"] = {("control",): float(self._log.dropped)}
        histograms = {
            name: {labels: HistogramSample(list(sample.buckets), sample.sum) for labels, sample in series.items()}
            for name, series in self._own_histograms.items()
        }
        return Samples(numbers=numbers, histograms=histograms)

    def _is_live(self, name: str) -> bool:
        return name in self._connected or name == self._own_name

    def _retire(self, name: str) -> None:
        self._retired.add(self._processes.pop(name).samples, gauges=False)
        self._retired_names.append(name)
        self._changed = True

    def _write(self, state: State) -> None:
        draft = self._path.with_name(self._path.name + ".draft")
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.msgpack.encode(state))
        draft.replace(self._path)


def _nothing(name: str) -> HistogramSample:
    return HistogramSample([0] * (len(METRICS[name].buckets) + 1), 0.0)
