"""Interleaved rounds: every subject is probed, then measured once a round in rotating order, so a slow minute hits all of them.

Subjects share core 0 in turn, load and provider share core 1; only ratios within a run count. bench/README.md tells the method.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import msgspec
import psutil  # type: ignore[import-untyped]

from bench import findings, gateway, wrk
from bench.answers import text_of
from bench.children import ChildFailed, child, cpu_by_process, pin, ready_url
from bench.load import Paced, Report, Target
from bench.machine import Machine, describe_machine
from bench.probe import Wrong, probe
from bench.proxies import Unavailable
from bench.subjects import PACED_MODEL, Place, Subject, start, start_gateway

TOKENS = 16  # 20 events: role, 16 deltas, finish, usage, [DONE]; 0.55 KB as JSON
PACED_TOKENS_PER_S = 100
PACED_TOKENS = 60_000  # 10 minutes of it
CONNECTIONS = 64
OPEN_SHARE = 0.6  # of what the subject did in the closed loop of the same round
WARM_UP_S = 1
OFF = "gateway-off"
OURS = ("direct", "gateway", OFF)


class Case(msgspec.Struct, frozen=True):
    """A closed loop of one kind of request."""

    kind: str
    stream: bool = False
    connections: int = CONNECTIONS
    body_bytes: int = 1024


CASES = (Case("json"), Case("burst", stream=True))
WIDE = (
    Case("json 16 KB", body_bytes=16_384),
    Case("json 1 MB", body_bytes=1_048_576),
    Case("json 32 connections", connections=32),
    Case("json 256 connections", connections=256),
    Case("json 2000 connections", connections=2000),
)


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement. `kind`: a case's (`per_s` counts requests), paced (`per_s` counts events), or open (at OPEN_SHARE)."""

    kind: str
    subject: str
    round: int
    per_s: float
    cpu_us: float  # of all the subject's processes, per request or per event
    cpu_us_by_process: dict[str, float]
    errors: int
    latency_ms_p50: float | None = None
    latency_ms_p99: float | None = None
    added_ms: dict[str, float] | None = None  # open: percentile -> above the provider alone at the same rate
    late_ms_p99: float | None = None  # open: the loader's own lateness


class Result(msgspec.Struct, frozen=True, kw_only=True):
    date: str
    command: list[str]
    machine: Machine
    load: str  # the tool
    connections: int
    paced_streams: int
    samples: list[Sample]
    versions: dict[str, str] = {}  # of the subjects
    unavailable: dict[str, str] = {}  # subject -> why it is missing
    rounds: int = 0  # that were finished; samples of the one that was interrupted count too


class Rounds:
    """One run. `cores`: of the subjects, and of load and provider; None: not pinned."""

    def __init__(
        self, wish: argparse.Namespace, folder: Path, cores: tuple[int | None, int | None], on_round: Callable[[], object] = lambda: None
    ) -> None:
        """`on_round` is called after each one."""
        self._wish = wish
        self._on_round = on_round
        self._folder = folder
        self._core, self._load_core = cores
        self._direct: Subject | None = None
        self.subjects: list[Subject] = []
        self.samples: list[Sample] = []
        self.unavailable: dict[str, str] = {}
        self._unpaced: set[str] = set()  # who did not even get the paced streams going
        self.finished = 0

    async def run(self) -> None:
        """Starts everything, probes, measures. Raises ChildFailed when the provider or the gateway does not start, RuntimeError."""
        async with AsyncExitStack() as stack:
            place = await self._place(stack)
            for name in self._wish.only:
                await self._admit(name, place)
            stack.callback(self._signal_peers, signal.SIGCONT)  # or they would not hear that they are to end
            for subject in list(self.subjects):
                async with self._surviving(subject):
                    await self._load(subject.target(stream=False), WARM_UP_S)
                    if subject.streams:
                        await self._load(subject.target(stream=True), WARM_UP_S)
            began, longest_s = time.monotonic(), 0.0
            for number in range(1, self._wish.rounds + 1):
                begun = time.monotonic()
                if self.finished and begun - began + longest_s > self._wish.minutes_max * 60:
                    print(f"round {number} and later ones would take more than {self._wish.minutes_max:g} minutes", file=sys.stderr)
                    return
                await self._round(number)
                self.finished = number
                self._on_round()
                longest_s = max(longest_s, time.monotonic() - begun)

    async def _place(self, stack: AsyncExitStack) -> Place:
        log = self._folder / "provider.log"
        command: list[str | Path] = [sys.executable, "-m", "bench.provider", "--behaviour", f"tokens={TOKENS}"]
        command += ["--model", PACED_MODEL, f"tokens={PACED_TOKENS};tokens_per_s={PACED_TOKENS_PER_S}"]
        provider = await stack.enter_async_context(child(command, core=self._load_core, log=log))
        url = await ready_url(provider, log)
        place = Place(upstream_url=url, provider_pid=provider.pid, core=self._core, folder=self._folder, stack=stack)
        self._direct = await start("direct", place)
        return place

    async def _admit(self, name: str, place: Place) -> None:
        """Start and probe. A peer that fails is reported and left out, of streams alone where those are wrong; ours must not fail."""
        try:
            subject = await (start_gateway(place, OFF, gateway.SETTINGS_OFF) if name == OFF else start(name, place))
            await self._probe(subject, stream=False)
        except (Unavailable, ChildFailed, Wrong, OSError) as error:
            self._without(name, name, error)
            return
        try:
            await self._probe(subject, stream=True)
        except (Wrong, OSError) as error:
            self._without(name, f"{name} streams", error)
            subject = msgspec.structs.replace(subject, streams=False)
        self.subjects.append(subject)

    async def _probe(self, subject: Subject, *, stream: bool) -> None:
        events = await probe(subject.target(stream=stream), text=text_of(TOKENS), tokens=TOKENS)
        print(f"probe {subject.name} {subject.version}: {f'{events} events' if stream else 'JSON'} ok", file=sys.stderr)

    def _without(self, name: str, what: str, error: Exception) -> None:
        if name in OURS:
            raise error
        self.unavailable[what] = (str(error) or type(error).__name__)[-500:]
        print(f"without {what}: {error}", file=sys.stderr)

    async def _round(self, number: int) -> None:
        shift = number % len(self.subjects)
        order = self.subjects[shift:] + self.subjects[:shift]
        rates: dict[str, float] = {}
        for case in (*CASES, *(WIDE if self._wish.wide else ())):
            for subject in self._left_of(order):
                if case.stream and not subject.streams:
                    continue
                async with self._surviving(subject):
                    sample = await self._loaded(case, subject, number)
                    self._note(sample)
                    if case.kind == "json":
                        rates[subject.name] = sample.per_s
        if self._wish.paced:
            for subject in self._left_of(order):
                if subject.name != "direct" and subject.streams and subject.name not in self._unpaced:  # direct: the provider's own CPU
                    async with self._surviving(subject):
                        await self._pace(subject, number)
        if self._wish.open:
            for subject in self._left_of(order):
                if subject.name != "direct":
                    async with self._surviving(subject):
                        self._note(await self._open(subject, number, rates[subject.name] * OPEN_SHARE))

    async def _pace(self, subject: Subject, number: int) -> None:
        try:
            self._note(await self._paced(subject, number))
        except TimeoutError:
            self._unpaced.add(subject.name)
            self._without(subject.name, f"{subject.name} paced", Wrong(f"{self._wish.paced} streams did not begin in time"))

    def _left_of(self, order: Sequence[Subject]) -> Iterator[Subject]:
        """Those that have not fallen out meanwhile."""
        return (subject for subject in order if subject in self.subjects)

    @asynccontextmanager
    async def _surviving(self, subject: Subject) -> AsyncIterator[None]:
        """A peer that dies, or cannot be reached, under load is reported and takes no part from here on; ours must not.

        Peers stand still while others are measured: some go on for minutes with streams that nobody waits for any more.
        """
        try:
            _signal(subject, signal.SIGCONT)
            yield
            _signal(subject, signal.SIGSTOP)
        except (psutil.Error, RuntimeError, OSError, ExceptionGroup) as error:
            self._without(subject.name, f"{subject.name} from here on", error)
            self.subjects.remove(subject)

    def _signal_peers(self, number: signal.Signals) -> None:
        for subject in self.subjects:
            _signal(subject, number)

    def _note(self, sample: Sample) -> None:
        self.samples.append(sample)
        line = f"round {sample.round} {sample.kind:5} {sample.subject:11} {sample.per_s:10,.0f}/s {sample.cpu_us:7.1f} us"
        if len(sample.cpu_us_by_process) > 1:
            line += " = " + " + ".join(f"{name} {used:.1f}" for name, used in sample.cpu_us_by_process.items())
        print(line + (f"  {sample.errors} ERRORS" if sample.errors else ""), file=sys.stderr)

    async def _loaded(self, case: Case, subject: Subject, number: int) -> Sample:
        before = cpu_by_process(subject.pid)
        target = subject.target(stream=case.stream, body_bytes=case.body_bytes)
        report = await self._load(target, self._wish.seconds, case.connections)
        return _sample(case.kind, subject, number, report, each_us(before, cpu_by_process(subject.pid), report.requests))

    async def _load(self, target: Target, seconds: int, connections: int = CONNECTIONS) -> Report:
        if self._wish.load == "wrk":
            return await wrk.run_wrk(target, connections=connections, seconds=seconds, core=self._load_core, folder=self._folder)
        return await self._own_load(target, seconds, connections, 0.0)

    async def _own_load(self, target: Target, seconds: int, connections: int, rate_per_s: float) -> Report:
        body = self._folder / "body.json"
        body.write_bytes(target.body)
        command: list[str | Path] = [sys.executable, "-m", "bench.load", "--url", target.url, "--body", body]
        command += ["--connections", str(connections), "--seconds", str(seconds), "--rate", str(rate_per_s)]
        command += ["--stream"] if target.stream else []
        command += [part for name, value in target.headers.items() for part in ("--header", f"{name}:{value}")]
        async with child(command, core=self._load_core, log=self._folder / "load.log") as process:
            output, _ = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"bench.load failed: {(self._folder / 'load.log').read_text()[-500:]}")
        return msgspec.json.decode(output, type=Report)

    async def _open(self, subject: Subject, number: int, rate_per_s: float) -> Sample:
        """Latency at a fixed rate, and what it is above the provider's own at the same rate."""
        assert self._direct is not None
        rate_per_s = max(1.0, rate_per_s)
        before = cpu_by_process(subject.pid)
        through = await self._own_load(subject.target(stream=False), self._wish.seconds, 256, rate_per_s)
        cpu_us = each_us(before, cpu_by_process(subject.pid), through.requests)
        direct = await self._own_load(self._direct.target(stream=False), self._wish.seconds, 256, rate_per_s)
        pairs = {
            "p50": (through.latency_ms_p50, direct.latency_ms_p50),
            "p90": (through.latency_ms_p90, direct.latency_ms_p90),
            "p99": (through.latency_ms_p99, direct.latency_ms_p99),
            "p99.9": (through.latency_ms_p999, direct.latency_ms_p999),
        }
        added = {name: mine - alone for name, (mine, alone) in pairs.items() if mine is not None and alone is not None}
        sample = _sample("open", subject, number, through, cpu_us)
        return msgspec.structs.replace(sample, added_ms=added, late_ms_p99=through.late_ms_p99)

    async def _paced(self, subject: Subject, number: int) -> Sample:
        """CPU per event while the streams run; opening and closing them is not counted."""
        seconds, target = self._wish.seconds, subject.target(stream=True, model=PACED_MODEL, max_tokens=PACED_TOKENS)
        async with Paced(target, streams=self._wish.paced) as paced:
            before, events, began = cpu_by_process(subject.pid), paced.events, time.perf_counter()
            await asyncio.sleep(seconds)  # the measured time itself
            after, seen, took_s = cpu_by_process(subject.pid), paced.events - events, time.perf_counter() - began
            errors = paced.errors
        cpu_us = each_us(before, after, seen)
        return Sample(
            kind="paced", subject=subject.name, round=number, per_s=seen / took_s,
            cpu_us=sum(cpu_us.values()), cpu_us_by_process=cpu_us, errors=errors,
        )  # fmt: skip


def _sample(kind: str, subject: Subject, number: int, report: Report, cpu_us: dict[str, float]) -> Sample:
    return Sample(
        kind=kind, subject=subject.name, round=number, per_s=report.requests_per_s,
        cpu_us=sum(cpu_us.values()), cpu_us_by_process=cpu_us, errors=report.errors,
        latency_ms_p50=report.latency_ms_p50, latency_ms_p99=report.latency_ms_p99,
    )  # fmt: skip


def _signal(subject: Subject, number: signal.Signals) -> None:
    """To all processes of a peer; one that has died is found out by whoever measures it."""
    if subject.name in OURS:
        return
    with suppress(psutil.Error):
        process = psutil.Process(subject.pid)
        for each in (process, *process.children(recursive=True)):
            each.send_signal(number)


def each_us(before: dict[str, float], after: dict[str, float], count: int) -> dict[str, float]:
    """Microseconds per counted thing from two readings of CPU seconds, by process name."""
    return {name: max(0.0, used - before.get(name, 0.0)) * 1e6 / max(1, count) for name, used in after.items()}


def choose_cores() -> tuple[int | None, int | None]:
    """A core for the subjects and one for load and provider; one core alone is not pinned."""
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[0], allowed[1]) if len(allowed) > 1 else (None, None)


def arguments_of(name: str, known: tuple[str, ...], usual: tuple[str, ...], *, seconds: int, rounds: int) -> argparse.Namespace:
    """The command line that every bench of rounds has."""
    parser = argparse.ArgumentParser(prog=f"bench.{name}")
    parser.add_argument("--seconds", type=int, default=seconds, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--minutes-max", type=float, default=9.0, help="no further round begins that would not end within this")
    parser.add_argument("--paced", type=int, default=100, metavar="STREAMS", help="paced streams side by side; 0: leave out")
    parser.add_argument("--wide", action="store_true", help="also bodies of 16 KB and 1 MB, and 32, 256 and 2,000 connections")
    parser.add_argument("--open", action="store_true", help="also an open loop at 60 %% of each subject's own saturation")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(usual), metavar="NAMES", help=",".join(known))
    parser.add_argument("--load", choices=("wrk", "python"), default="wrk" if wrk.is_installed() else "python")
    parser.add_argument("--out", type=Path, default=None, help=f"results file; default bench/results/<date>-{name}.json")
    wish = parser.parse_args()
    if unknown := set(wish.only) - set(known):
        parser.error(f"--only knows {', '.join(known)}, not {', '.join(sorted(unknown))}")
    wish.out = wish.out or findings.result_file(name)
    return wish


async def run_rounds(wish: argparse.Namespace) -> Result:
    """Runs, and writes the result to `wish.out`: after each round, and when interrupted as far as it came. Raises as Rounds.run."""
    cores = choose_cores()
    if (settle := pin(cores[1])) is not None:
        settle()  # this process reads the paced streams
    began, machine = findings.now(), await describe_machine(cores)
    wish.out.parent.mkdir(parents=True, exist_ok=True)

    def written() -> Result:
        result = Result(
            date=began,
            command=sys.argv,
            machine=msgspec.structs.replace(machine, load_average_1m=round(os.getloadavg()[0], 2)),
            load=wish.load,
            connections=CONNECTIONS,
            paced_streams=wish.paced,
            samples=rounds.samples,
            versions={subject.name: subject.version for subject in rounds.subjects},
            unavailable=rounds.unavailable,
            rounds=rounds.finished,
        )
        findings.write(result, wish.out)
        return result

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        rounds = Rounds(wish, Path(folder), cores, written)
        try:
            await rounds.run()
        except BaseException:
            if rounds.samples:
                written()
                print(f"after {rounds.finished} whole rounds: {wish.out}", file=sys.stderr)
            raise
    return written()
