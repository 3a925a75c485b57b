"""The hot path against its peers: the gateway with everything on, Envoy as a plain proxy, and the provider alone.

    python -m bench.hotpath [--seconds 5] [--rounds 3] [--paced 100] [--only direct,envoy,gateway]

Subjects share core 0 in turn, load and provider share core 1. Rounds are interleaved and their order rotates, so that a slow
minute of the machine hits all subjects; only ratios within a run count. bench/README.md tells the method and its limits.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import uvloop

from bench import envoy, gateway, wrk
from bench.answers import text_of
from bench.children import child, cpu_by_process, pin, ready_url
from bench.load import Paced, Report, Target
from bench.machine import Machine, describe_machine
from bench.probe import probe
from bench.summary import table

SUBJECTS = ("direct", "envoy", "gateway")
TOKENS = 16  # 20 events: role, 16 deltas, finish, usage, [DONE]; 0.55 KB as JSON
REQUEST_BYTES = 1024
PACED_TOKENS_PER_S = 100
CONNECTIONS = 64
WARM_UP_S = 1
RESULTS = Path(__file__).parent / "results"


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What is loaded: where, as whom, and the process whose CPU is counted."""

    name: str
    url: str  # of chat completions
    model: str
    pid: int
    headers: dict[str, str] = {}

    def target(self, *, stream: bool, sim: str = "", max_tokens: int = 64) -> Target:
        return Target(url=self.url, body=request_body(self.model, stream, sim, max_tokens), stream=stream, headers=self.headers)


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement. `kind`: json or burst (`per_s` counts requests), paced (`per_s` counts events)."""

    kind: str
    subject: str
    round: int
    per_s: float
    cpu_us: float  # of all the subject's processes, per request or per event
    cpu_us_by_process: dict[str, float]
    errors: int
    latency_ms_p50: float | None = None
    latency_ms_p99: float | None = None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    date: str
    command: list[str]
    machine: Machine
    load: str  # the tool
    connections: int
    paced_streams: int
    samples: list[Sample]


def request_body(model: str, stream: bool, sim: str, max_tokens: int) -> bytes:
    """A chat request of REQUEST_BYTES (longer only if its fixed parts are)."""
    body: dict[str, object] = {"model": model, "stream": stream, "max_tokens": max_tokens}
    if stream:
        body["stream_options"] = {"include_usage": True}
    if sim:
        body["metadata"] = {"sim": sim}
    words = "Say what the river does. "
    bare = msgspec.json.encode(body | {"messages": [{"role": "user", "content": ""}]})
    content = (words * (REQUEST_BYTES // len(words) + 1))[: max(1, REQUEST_BYTES - len(bare))]
    return msgspec.json.encode(body | {"messages": [{"role": "user", "content": content}]})


class Hotpath:
    """One run. `cores`: of the subjects, and of load and provider; None: not pinned."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, cores: tuple[int | None, int | None]) -> None:
        self._arguments = arguments
        self._folder = folder
        self._core, self._load_core = cores
        self._subjects: list[Subject] = []
        self.samples: list[Sample] = []

    async def run(self) -> None:
        """Starts everything, probes, measures. Raises ChildFailed, Wrong, RuntimeError."""
        async with AsyncExitStack() as stack:
            await self._start(stack)
            for subject in self._subjects:
                for stream in (False, True):
                    events = await probe(subject.target(stream=stream), text=text_of(TOKENS), tokens=TOKENS)
                    print(f"probe {subject.name}: {f'{events} events' if stream else 'JSON'} ok", file=sys.stderr)
            for subject in self._subjects:
                await self._load(subject.target(stream=False), WARM_UP_S)
                await self._load(subject.target(stream=True), WARM_UP_S)
            for number in range(1, self._arguments.rounds + 1):
                await self._round(number)

    async def _start(self, stack: AsyncExitStack) -> None:
        log = self._folder / "provider.log"
        command: list[str | Path] = [sys.executable, "-m", "bench.provider", "--behaviour", f"tokens={TOKENS}"]
        provider = await stack.enter_async_context(child(command, core=self._load_core, log=log))
        url = await ready_url(provider, log)
        chosen: Sequence[str] = self._arguments.only
        if "direct" in chosen:
            self._subjects.append(Subject(name="direct", url=url + "/v1/chat/completions", model="sage-1", pid=provider.pid))
        if "envoy" in chosen:
            binary = await envoy.ensure_envoy()
            at, pid = await stack.enter_async_context(envoy.envoy(binary, url, core=self._core, folder=self._folder))
            self._subjects.append(Subject(name="envoy", url=at + "/v1/chat/completions", model="sage-1", pid=pid))
        if "gateway" in chosen:
            at, pid, key = await stack.enter_async_context(gateway.gateway(url, core=self._core, folder=self._folder))
            headers = {"Authorization": f"Bearer {key}"}
            self._subjects.append(
                Subject(name="gateway", url=at + "/api/v1/chat/completions", model=gateway.MODEL, pid=pid, headers=headers)
            )

    async def _round(self, number: int) -> None:
        shift = number % len(self._subjects)
        order = self._subjects[shift:] + self._subjects[:shift]
        for kind in ("json", "burst"):
            for subject in order:
                self._note(await self._loaded(kind, subject, number))
        if self._arguments.paced:
            for subject in order:
                if subject.name != "direct":  # there the CPU is the provider's own
                    self._note(await self._paced(subject, number))

    def _note(self, sample: Sample) -> None:
        self.samples.append(sample)
        line = f"round {sample.round} {sample.kind:5} {sample.subject:8} {sample.per_s:10,.0f}/s {sample.cpu_us:7.1f} us"
        if len(sample.cpu_us_by_process) > 1:
            line += " = " + " + ".join(f"{name} {used:.1f}" for name, used in sample.cpu_us_by_process.items())
        print(line + (f"  {sample.errors} ERRORS" if sample.errors else ""), file=sys.stderr)

    async def _loaded(self, kind: str, subject: Subject, number: int) -> Sample:
        before = cpu_by_process(subject.pid)
        report = await self._load(subject.target(stream=kind == "burst"), self._arguments.seconds)
        cpu_us = each_us(before, cpu_by_process(subject.pid), report.requests)
        return Sample(
            kind=kind,
            subject=subject.name,
            round=number,
            per_s=report.requests_per_s,
            cpu_us=sum(cpu_us.values()),
            cpu_us_by_process=cpu_us,
            errors=report.errors,
            latency_ms_p50=report.latency_ms_p50,
            latency_ms_p99=report.latency_ms_p99,
        )

    async def _load(self, target: Target, seconds: int) -> Report:
        if self._arguments.load == "wrk":
            return await wrk.run_wrk(target, connections=CONNECTIONS, seconds=seconds, core=self._load_core, folder=self._folder)
        body = self._folder / "body.json"
        body.write_bytes(target.body)
        command: list[str | Path] = [sys.executable, "-m", "bench.load", "--url", target.url, "--body", body]
        command += ["--connections", str(CONNECTIONS), "--seconds", str(seconds), *(["--stream"] if target.stream else [])]
        command += [part for name, value in target.headers.items() for part in ("--header", f"{name}:{value}")]
        async with child(command, core=self._load_core, log=self._folder / "load.log") as process:
            output, _ = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"bench.load failed: {(self._folder / 'load.log').read_text()[-500:]}")
        return msgspec.json.decode(output, type=Report)

    async def _paced(self, subject: Subject, number: int) -> Sample:
        """CPU per event while the streams run; opening and closing them is not counted."""
        seconds = self._arguments.seconds
        tokens = PACED_TOKENS_PER_S * (seconds + 30)
        sim = f"tokens={tokens};tokens_per_s={PACED_TOKENS_PER_S}"
        async with Paced(subject.target(stream=True, sim=sim, max_tokens=tokens), streams=self._arguments.paced) as paced:
            before, events, began = cpu_by_process(subject.pid), paced.events, time.perf_counter()
            await asyncio.sleep(seconds)  # the measured time itself
            after, seen, took_s = cpu_by_process(subject.pid), paced.events - events, time.perf_counter() - began
            errors = paced.errors
        cpu_us = each_us(before, after, seen)
        return Sample(
            kind="paced",
            subject=subject.name,
            round=number,
            per_s=seen / took_s,
            cpu_us=sum(cpu_us.values()),
            cpu_us_by_process=cpu_us,
            errors=errors,
        )


def each_us(before: dict[str, float], after: dict[str, float], count: int) -> dict[str, float]:
    """Microseconds per counted thing from two readings of CPU seconds, by process name."""
    return {name: max(0.0, used - before.get(name, 0.0)) * 1e6 / max(1, count) for name, used in after.items()}


def choose_cores() -> tuple[int | None, int | None]:
    """A core for the subjects and one for load and provider; one core alone is not pinned."""
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[0], allowed[1]) if len(allowed) > 1 else (None, None)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.hotpath", description="The gateway's hot path against its peers.")
    parser.add_argument("--seconds", type=int, default=5, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--paced", type=int, default=100, metavar="STREAMS", help="paced streams side by side; 0: leave out")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(SUBJECTS), metavar="NAMES", help=",".join(SUBJECTS))
    parser.add_argument("--load", choices=("wrk", "python"), default="wrk" if wrk.is_installed() else "python")
    parser.add_argument("--out", type=Path, default=None, help="results file; default bench/results/<date>-hotpath.json")
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(SUBJECTS):
        parser.error(f"--only knows {', '.join(SUBJECTS)}, not {', '.join(sorted(unknown))}")
    return arguments


async def main(arguments: argparse.Namespace) -> int:
    cores = choose_cores()
    if (settle := pin(cores[1])) is not None:
        settle()  # this process reads the paced streams
    with tempfile.TemporaryDirectory(prefix="hotpath-") as folder:
        hotpath = Hotpath(arguments, Path(folder), cores)
        await hotpath.run()
    result = Result(
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=sys.argv,
        machine=await describe_machine(cores),
        load=arguments.load,
        connections=CONNECTIONS,
        paced_streams=arguments.paced,
        samples=hotpath.samples,
    )
    out = arguments.out or RESULTS / f"{time.strftime('%Y-%m-%d-%H%M%S')}-hotpath.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(table(hotpath.samples))
    print(f"\n{out}")
    return 1 if any(sample.errors for sample in hotpath.samples) else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(uvloop.run(main(parse_arguments())))
