"""Cost curves: edges, open idle streams, keys, endpoints, rivals; a superlinear term shows as a rising column.

    python -m bench.scale [--curves edges,streams,keys,endpoints,rivals] [--seconds 5] [--top 1.0] [--ends] [--per-s 2000]

Each point is a fresh gateway with everything on, on one core (edges: not pinned). Streams: the CPU of an open stream that has had its
first event and waits, per second and above that of the gateway at rest, and the memory it takes in the edge. The rest: CPU per JSON
request, in a closed loop, or at an even rate (`--per-s`): in a closed loop what makes requests dearer makes them fewer, so that each
bears more of what is done each second, and finds its peers asleep. Of keys and endpoints all are in use: keys take turns, one a request,
and have been used once before (that first time has a column of its own, for it asks control); endpoints have had some requests each.
Endpoints are those of the whole catalog, RIVALS of each model, whose models take turns; rivals are the endpoints of one model. Requests/s
is shown, and means nothing on a shared machine. `--top 0.01` ends each curve at a hundredth, `--ends` leaves out what is between. JSON
goes to `bench/results/`.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import os
import resource
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import msgspec
import psutil  # type: ignore[import-untyped]
import uvloop

from bench import findings, gateway
from bench.children import child, cpu_by_process, ready_url
from bench.load import LoadConnection, Paced, Tally, Target
from bench.machine import Machine, describe_machine
from bench.rounds import choose_cores, each_us
from bench.subjects import PACED_MODEL, request_body

CURVES = {
    "edges": tuple(range(1, (os.cpu_count() or 1) + 1)),
    "streams": (1, 10, 100, 1000, 10_000),
    "keys": (1, 10, 100, 1000, 10_000, 100_000),
    "endpoints": (1, 10, 100, 1000),
    "rivals": (1, 3, 10, 30, 100, 1000),
}
RIVALS = 10  # endpoints of each model, in the curve of endpoints
FLAT = {"keys": (1000, 100_000), "endpoints": (10, 1000)}  # between these a request's cost is to change by no more than FLAT_MAX
FLAT_MAX = 0.10
SETTINGS = gateway.SETTINGS + "[upstream]\ninflight_max = 20000\n"
CONNECTIONS = 32
DESCRIPTORS_OWN = 128  # of a process, for what is not a stream
STREAMS_PER_S_MIN = 50  # opened, on a machine that is busy with other things
ASKED_EACH = 2  # requests to each endpoint, on the average, before it is measured
POLL_S = 0.01

Progress = Callable[[str], None]


class Point(msgspec.Struct, frozen=True, kw_only=True):
    curve: str
    number: int  # of edges, streams, keys or endpoints
    per_s: float | None = None
    cpu_us: float  # of all processes, per request; of streams: per stream and second
    cpu_us_by_process: dict[str, float] = {}
    rest_ms: float | None = None  # CPU of all processes each second when nothing is asked, after all that was
    first_us: float | None = None  # keys: the same for the first request with each
    rss_kib_each: float | None = None  # per open stream
    rss_mib: float  # of all edges, under this
    setup_s: float  # until the measurement could begin
    errors: int = 0


class Curves(msgspec.Struct, frozen=True, kw_only=True):
    date: str
    command: list[str]
    machine: Machine
    points: list[Point]


class KeyedConnection(LoadConnection):
    """Each request is the next one, sent when its predecessor was answered and `gap_s` after that one was due."""

    def __init__(self, target: Target, requests: Iterator[bytes], tally: Tally, gap_s: float) -> None:
        super().__init__(target, b"", tally)
        self._requests = requests
        self._gap_s = gap_s
        self._due_s = asyncio.get_running_loop().time()

    def _send(self) -> None:
        loop = asyncio.get_running_loop()
        now_s, due_s = loop.time(), self._due_s
        if due_s > now_s:
            loop.call_at(due_s, self._send)
        elif not self.stopped:
            self._due_s = max(due_s, now_s - self._gap_s) + self._gap_s  # what is late is not made up for in a burst
            self._request = next(self._requests)
            super()._send()


async def point(curve: str, number: int, seconds: float, progress: Progress, per_s: float | None = None) -> Point:
    """One point; `per_s`: requests at an even rate. Raises ChildFailed, OSError, TimeoutError."""
    cores, began = choose_cores(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        folder = Path(name)
        async with AsyncExitStack() as stack:
            log = folder / "provider.log"
            command: list[str | Path] = [sys.executable, "-m", "bench.provider", "--behaviour", "tokens=16"]
            command += ["--model", PACED_MODEL, "tokens=1000;tokens_per_s=0.01"]
            provider = await stack.enter_async_context(child(command, core=None if curve == "edges" else cores[1], log=log))
            url = await ready_url(provider, log)
            workers = number if curve == "edges" else 1
            running = gateway.gateway(
                url,
                core=None if curve == "edges" else cores[0],
                folder=folder,
                settings=SETTINGS.replace("workers = 1", f"workers = {workers}"),
                catalog=catalog_of(url, number, number if curve == "rivals" else RIVALS) if curve in ("endpoints", "rivals") else None,
            )
            at, pid, key = await stack.enter_async_context(running)
            target = Target(url=at + "/api/v1/chat/completions", body=b"", headers={"Authorization": f"Bearer {key}"})
            if curve == "streams":
                found = await _streams(target, pid, number, seconds, progress)
            else:
                keys = add_keys(folder / "gateway.db", key, number) if curve == "keys" else [key]
                models = models_of(number, RIVALS) if curve == "endpoints" else models_of(1, 1)
                gap_s = CONNECTIONS / per_s if per_s is not None else 0.0
                found = await _requests(curve, target, pid, number, list(requests_of(target, keys, models)), gap_s, seconds, progress)
            return msgspec.structs.replace(found, setup_s=found.setup_s - began)


async def _streams(target: Target, pid: int, number: int, seconds: float, progress: Progress) -> Point:
    body = request_body(gateway.PREFIX + PACED_MODEL, True, "", 1000)
    asked = msgspec.structs.replace(target, body=body, stream=True)
    async with Paced(asked, streams=1):
        await asyncio.sleep(1)  # what comes with the first request of all is not a stream's
        before = edges_rss(pid)
    idle_us = await _cpu_us_per_s(pid, seconds)

    def begun(open_streams: int) -> None:
        if open_streams % 100 == 0:
            progress(f"{open_streams:,} have begun")

    async with Paced(asked, streams=number, begin_s_max=30 + number / STREAMS_PER_S_MIN, on_begun=begun) as paced:
        await asyncio.sleep(1)  # what their beginning left to do
        ready = time.monotonic()
        cpu_us = max(0.0, await _cpu_us_per_s(pid, seconds) - idle_us) / number
        after, errors = edges_rss(pid), paced.errors
    each_kib = (after - before) / 1024 / number
    return Point(curve="streams", number=number, cpu_us=cpu_us, rss_kib_each=each_kib, rss_mib=after / 2**20, setup_s=ready, errors=errors)


async def _cpu_us_per_s(pid: int, seconds: float) -> float:
    """What all processes use while nothing is asked."""
    cpu, began = cpu_by_process(pid), time.monotonic()
    await asyncio.sleep(seconds)  # the measured time itself
    return sum(each_us(cpu, cpu_by_process(pid), 1).values()) / (time.monotonic() - began)


def requests_of(target: Target, keys: Sequence[str], models: Sequence[str]) -> Iterator[bytes]:
    """One for each key and, where there are more of them, model."""
    bodies = [request_body(gateway.PREFIX + model, False, "", 64) for model in models]
    for number in range(max(len(keys), len(models))):
        headers = {"Authorization": f"Bearer {keys[number % len(keys)]}"}
        yield msgspec.structs.replace(target, body=bodies[number % len(models)], headers=headers).request()


async def _requests(
    curve: str, target: Target, pid: int, number: int, asked: Sequence[bytes], gap_s: float, seconds: float, progress: Progress
) -> Point:
    tally, requests = Tally(), itertools.cycle(asked)
    loop, opened = asyncio.get_running_loop(), []
    first_us = None
    try:
        for _ in range(CONNECTIONS):
            _, connection = await loop.create_connection(partial(KeyedConnection, target, requests, tally, gap_s), *target.address)
            opened.append(connection)
        cpu = cpu_by_process(pid)
        first = 0 if curve == "edges" else number
        await _asked(tally, first, progress)
        if curve == "keys":
            first_us = sum(each_us(cpu, cpu_by_process(pid), len(tally.latencies_s)).values())
        await _asked(tally, first * ASKED_EACH, progress)
        await asyncio.sleep(1)  # warm
        cpu, done, ready = cpu_by_process(pid), len(tally.latencies_s), time.monotonic()
        await asyncio.sleep(seconds)  # the measured time itself
        answered, took_s = len(tally.latencies_s) - done, time.monotonic() - ready
        by_process = each_us(cpu, cpu_by_process(pid), answered)
        rss = edges_rss(pid)
    finally:
        for connection in opened:
            connection.stop()
        for connection in opened:
            await connection.lost
    await asyncio.sleep(1)  # what the last requests left to do
    rest_ms = await _cpu_us_per_s(pid, seconds) / 1000
    return Point(
        curve=curve, number=number, per_s=answered / took_s, cpu_us=sum(by_process.values()), cpu_us_by_process=by_process,
        rest_ms=rest_ms, first_us=first_us, rss_mib=rss / 2**20, setup_s=ready, errors=tally.errors,
    )  # fmt: skip


async def _asked(tally: Tally, number: int, progress: Progress) -> None:
    """Until so many requests have been answered, or one went wrong."""
    while (done := len(tally.latencies_s)) < number and not tally.errors:
        progress(f"{done:,} of {number:,} warm")
        await asyncio.sleep(POLL_S)


def edges_rss(pid: int) -> int:
    """Resident bytes of the gateway's edges. Raises psutil.NoSuchProcess."""
    children = psutil.Process(pid).children(recursive=True)
    return sum(int(process.memory_info().rss) for process in children if "gateway.edge" in process.cmdline())


def models_of(endpoints: int, rivals: int) -> list[str]:
    """Names of so many models that each has `rivals` of the endpoints; the last one has what is left."""
    return [f"sage-{number + 1}" for number in range(-(-endpoints // rivals))]


def catalog_of(url: str, endpoints: int, rivals: int) -> str:
    """So many endpoints, `rivals` of each model, those at a provider each; all of them are the same one."""
    providers = []
    for number in range(min(endpoints, rivals)):
        one = gateway.CATALOG.format(url=url, variable=gateway.KEY_VARIABLE)
        providers.append(one.replace('slug = "north"', f'slug = "north{number}"').replace('name = "North"', f'name = "North {number}"'))
    parts, left = providers, endpoints
    for name in models_of(endpoints, rivals):
        head, _, endpoint = gateway.ENDPOINT.format(prefix=gateway.PREFIX, name=name).partition("[[models.endpoints]]")
        own = [f"[[models.endpoints]]{endpoint}".replace('"north"', f'"north{number}"') for number in range(min(rivals, left))]
        parts += [head, *own]
        left -= len(own)
    return "\n".join(parts)


def add_keys(store: Path, key: str, number: int) -> list[str]:
    """That many keys of the account of `key`, itself among them: copies of its row with other digests."""
    secrets = [f"sk-or-v1-{hashlib.sha256(str(n).encode()).hexdigest()}" for n in range(number - 1)]
    with sqlite3.connect(store, timeout=30) as database:
        columns = [row[1] for row in database.execute("PRAGMA table_info(keys)") if row[1] != "digest"]
        names = ", ".join(columns)
        digest = hashlib.sha256(key.encode()).hexdigest()
        copy = f"INSERT INTO keys (digest, {names}) SELECT ?, {names} FROM keys WHERE digest = ?"
        database.executemany(copy, [(hashlib.sha256(secret.encode()).hexdigest(), digest) for secret in secrets])
    database.close()
    return [key, *secrets]


def show(points: Sequence[Point]) -> str:
    """A line a point; `x first` is the cost over that of the curve's first point."""
    names = ("CPU us", "x first", "first use", "rest ms/s", "per s", "KiB each", "RSS MiB", "setup s", "errors")
    lines = [f"{'curve':10}{'number':>9}" + "".join(f"{name:>10}" for name in names)]
    for each in points:
        base = next(other.cpu_us for other in points if other.curve == each.curve)
        ratio = each.cpu_us / base if base else None
        figures = (each.cpu_us, ratio, each.first_us, each.rest_ms, each.per_s, each.rss_kib_each, each.rss_mib, each.setup_s)
        cells = ("-" if value is None else f"{value:,.2f}" if value < 10 else f"{value:,.0f}" for value in figures)
        lines.append(f"{each.curve:10}{each.number:>9,}" + "".join(f"{cell:>10}" for cell in cells) + f"{each.errors:>10}" + _split(each))
    return "\n".join(lines)


def _split(point: Point) -> str:
    """The edge's and control's part of the CPU."""
    parts = {name.removeprefix("gateway."): used for name, used in point.cpu_us_by_process.items() if used >= 1}
    return "".join(f"  {name} {used:,.0f}" for name, used in parts.items())


def changes(points: Sequence[Point]) -> dict[str, float]:
    """By curve whose cost is to stay level, the change between the two numbers: 0.1 is a tenth more."""
    cost = {(each.curve, each.number): each.cpu_us for each in points}
    return {
        curve: cost[curve, high] / cost[curve, low] - 1
        for curve, (low, high) in FLAT.items()
        if (curve, low) in cost and (curve, high) in cost
    }


def plan(wish: argparse.Namespace) -> list[tuple[str, int]]:
    """The points. Each stream takes two descriptors of the edge: where the hard limit does not allow them, that curve ends sooner."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    streams_max = (1 << 20 if hard == resource.RLIM_INFINITY else hard - DESCRIPTORS_OWN) // 2
    points: list[tuple[str, int]] = []
    for curve in wish.curves:
        numbers = [number for number in CURVES[curve] if number <= max(1, max(CURVES[curve]) * wish.top)]
        if wish.ends:
            numbers = sorted({numbers[0], *FLAT.get(curve, ()), numbers[-1]} & set(numbers))
        if curve == "streams" and numbers[-1] > streams_max:
            print(f"streams end at {streams_max:,}: ulimit -n is {hard:,}", file=sys.stderr)
            numbers = [*(number for number in numbers if number < streams_max), streams_max]
        points += [(curve, number) for number in numbers]
    return points


async def main(wish: argparse.Namespace) -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # children get it too
    wanted, points = plan(wish), list[Point]()
    out = wish.out or findings.result_file("scale")
    for done, (curve, number) in enumerate(wanted):

        def progress(state: str, done: int = done, name: str = f"{curve} {number:,}") -> None:
            bar = "#" * (20 * done // len(wanted))
            print(f"\r[{bar:20}] {done}/{len(wanted)} {name}: {state:30}", end="", file=sys.stderr, flush=True)

        progress("starts")
        try:
            points.append(await point(curve, number, wish.seconds, progress, wish.per_s))
        except (TimeoutError, RuntimeError, OSError) as error:
            print(f"\nwithout {curve} {number:,}: {error or type(error).__name__}", file=sys.stderr)
            continue
        machine = await describe_machine(choose_cores())
        result = Curves(date=findings.now(), command=sys.argv, machine=machine, points=points)
        findings.write(result, out)
    print(f"\r[{'#' * 20}] {len(points)}/{len(wanted)}{' ' * 50}", file=sys.stderr)
    print(show(points))
    for curve, change in changes(points).items():
        low, high = FLAT[curve]
        print(f"{curve} {low:,} -> {high:,}: {change:+.1%} a request, at most {FLAT_MAX:+.0%}: {'met' if change <= FLAT_MAX else 'MISSED'}")
    print(f"\n{out}")
    return 1 if len(points) < len(wanted) or any(each.errors for each in points) else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench.scale", description="Cost curves.")
    parser.add_argument("--curves", type=lambda text: text.split(","), default=list(CURVES), metavar="NAMES", help=",".join(CURVES))
    parser.add_argument("--seconds", type=float, default=5.0, help="of one point")
    parser.add_argument("--top", type=float, default=1.0, help="share of each curve's largest number to end at")
    parser.add_argument("--ends", action="store_true", help="of each curve only the ends, and what is compared")
    parser.add_argument("--per-s", type=float, default=None, help="requests at an even rate instead of a closed loop")
    parser.add_argument("--out", type=Path, default=None)
    sys.exit(uvloop.run(main(parser.parse_args())))
