"""Cost curves: edges, open idle streams, keys, endpoints; a superlinear term shows as a rising column.

    python -m bench.scale [--curves edges,streams,keys,endpoints] [--seconds 5] [--top 1.0]

Each point is a fresh gateway with everything on, on one core (edges: not pinned). Streams: resident memory of the edge per open stream
that has had its first event and waits. The rest: requests/s and CPU per JSON request; keys take turns, one a request, so each point
of that curve has them all in use. `--top 0.01` ends each curve at a hundredth. JSON goes to `bench/results/`.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import msgspec
import psutil  # type: ignore[import-untyped]
import uvloop

from bench import gateway
from bench.children import child, cpu_by_process, ready_url
from bench.load import LoadConnection, Paced, Tally, Target
from bench.machine import Machine, describe_machine
from bench.rounds import RESULTS, choose_cores, each_us
from bench.subjects import PACED_MODEL, request_body

CURVES = {
    "edges": tuple(range(1, (os.cpu_count() or 1) + 1)),
    "streams": (1, 10, 100, 1000, 10_000),
    "keys": (1, 10, 100, 1000, 10_000, 100_000),
    "endpoints": (1, 10, 100, 1000),
}
SETTINGS = gateway.SETTINGS + "[upstream]\ninflight_max = 20000\n"
CONNECTIONS = 32


class Point(msgspec.Struct, frozen=True, kw_only=True):
    curve: str
    number: int  # of edges, streams, keys or endpoints
    per_s: float | None = None
    cpu_us: float | None = None  # per request, of all processes
    rss_kib_each: float | None = None  # per open stream
    rss_mib: float  # of all edges, under this
    errors: int = 0


class Curves(msgspec.Struct, frozen=True, kw_only=True):
    date: str
    command: list[str]
    machine: Machine
    points: list[Point]


class KeyedConnection(LoadConnection):
    """Each request is the next of a cycle."""

    def __init__(self, target: Target, requests: itertools.cycle[bytes], tally: Tally) -> None:
        super().__init__(target, b"", tally)
        self._requests = requests

    def _send(self) -> None:
        self._request = next(self._requests)
        super()._send()


async def point(curve: str, number: int, seconds: float) -> Point:
    """One point. Raises ChildFailed, OSError."""
    cores = choose_cores()
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        folder = Path(name)
        async with AsyncExitStack() as stack:
            log = folder / "provider.log"
            command: list[str | Path] = [sys.executable, "-m", "bench.provider", "--behaviour", "tokens=16"]
            command += ["--model", PACED_MODEL, "tokens=1000;tokens_per_s=0.05"]
            provider = await stack.enter_async_context(child(command, core=None if curve == "edges" else cores[1], log=log))
            url = await ready_url(provider, log)
            workers = number if curve == "edges" else 1
            running = gateway.gateway(
                url,
                core=None if curve == "edges" else cores[0],
                folder=folder,
                settings=SETTINGS.replace("workers = 1", f"workers = {workers}"),
                catalog=catalog_of(url, number) if curve == "endpoints" else None,
            )
            at, pid, key = await stack.enter_async_context(running)
            target = Target(url=at + "/api/v1/chat/completions", body=b"", headers={"Authorization": f"Bearer {key}"})
            if curve == "streams":
                return await _streams(target, pid, number, seconds)
            keys = add_keys(folder / "gateway.db", key, number) if curve == "keys" else [key]
            return await _requests(curve, target, pid, number, keys, seconds)


async def _streams(target: Target, pid: int, number: int, seconds: float) -> Point:
    body = request_body(gateway.PREFIX + PACED_MODEL, True, "", 1000)
    asked = msgspec.structs.replace(target, body=body, stream=True)
    async with Paced(asked, streams=1):
        await asyncio.sleep(1)  # what comes with the first request of all is not a stream's
        before = edges_rss(pid)
    async with Paced(asked, streams=number) as paced:
        await asyncio.sleep(seconds)
        after, errors = edges_rss(pid), paced.errors
    return Point(curve="streams", number=number, rss_kib_each=(after - before) / 1024 / number, rss_mib=after / 2**20, errors=errors)


async def _requests(curve: str, target: Target, pid: int, number: int, keys: Sequence[str], seconds: float) -> Point:
    body, tally = request_body(gateway.PREFIX + "sage-1", False, "", 64), Tally()
    asked = [msgspec.structs.replace(target, body=body, headers={"Authorization": f"Bearer {key}"}).request() for key in keys]
    cycle, loop, opened = itertools.cycle(asked), asyncio.get_running_loop(), []
    try:
        for _ in range(CONNECTIONS):
            _, connection = await loop.create_connection(partial(KeyedConnection, target, cycle, tally), *target.address)
            opened.append(connection)
        await asyncio.sleep(1)  # warm
        cpu, done, began = cpu_by_process(pid), len(tally.latencies_s), time.perf_counter()
        await asyncio.sleep(seconds)  # the measured time itself
        requests, took_s = len(tally.latencies_s) - done, time.perf_counter() - began
        cpu_us = sum(each_us(cpu, cpu_by_process(pid), requests).values())
        rss = edges_rss(pid)
    finally:
        for connection in opened:
            connection.stop()
        for connection in opened:
            await connection.lost
    return Point(curve=curve, number=number, per_s=requests / took_s, cpu_us=cpu_us, rss_mib=rss / 2**20, errors=tally.errors)


def edges_rss(pid: int) -> int:
    """Resident bytes of the gateway's edges. Raises psutil.NoSuchProcess."""
    children = psutil.Process(pid).children(recursive=True)
    return sum(int(process.memory_info().rss) for process in children if "gateway.edge" in process.cmdline())


def catalog_of(url: str, endpoints: int) -> str:
    """The bench's first model at that many providers, all of them the same one."""
    providers, places = [], []
    for number in range(endpoints):
        slug = f"north{number}"
        one = gateway.CATALOG.format(url=url, variable=gateway.KEY_VARIABLE)
        providers.append(one.replace('slug = "north"', f'slug = "{slug}"').replace('name = "North"', f'name = "North {number}"'))
        places.append(slug)
    head, _, endpoint = gateway.ENDPOINT.format(prefix=gateway.PREFIX, name="sage-1").partition("[[models.endpoints]]")
    models = [f"[[models.endpoints]]{endpoint}".replace('"north"', f'"{slug}"') for slug in places]
    return "\n".join([*providers, head, *models])


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
    """A line a point."""
    lines = [f"{'curve':12}{'number':>9}{'per s':>10}{'CPU us':>9}{'KiB each':>10}{'RSS MiB':>9}{'errors':>8}"]
    for each in points:
        figures = [each.per_s, each.cpu_us, each.rss_kib_each]
        cells = "".join(f"{'-' if value is None else f'{value:,.1f}':>{width}}" for value, width in zip(figures, (10, 9, 10), strict=True))
        lines.append(f"{each.curve:12}{each.number:>9,}{cells}{each.rss_mib:>9.1f}{each.errors:>8}")
    return "\n".join(lines)


async def main(wish: argparse.Namespace) -> int:
    wanted = [(curve, number) for curve in wish.curves for number in CURVES[curve] if number <= max(1, max(CURVES[curve]) * wish.top)]
    points = []
    for done, (curve, number) in enumerate(wanted):
        bar = "#" * (20 * done // len(wanted))
        print(f"\r[{bar:20}] {done}/{len(wanted)} {curve} {number:,}    ", end="", file=sys.stderr, flush=True)
        points.append(await point(curve, number, wish.seconds))
    print(f"\r[{'#' * 20}] {len(wanted)}/{len(wanted)}{' ' * 24}", file=sys.stderr)
    machine = await describe_machine(choose_cores())
    result = Curves(date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), command=sys.argv, machine=machine, points=points)
    out = wish.out or RESULTS / f"{time.strftime('%Y-%m-%d-%H%M%S')}-scale.json"
    out.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(f"{show(points)}\n\n{out}")
    return 1 if any(each.errors for each in points) else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench.scale", description="Cost curves.")
    parser.add_argument("--curves", type=lambda text: text.split(","), default=list(CURVES), metavar="NAMES", help=",".join(CURVES))
    parser.add_argument("--seconds", type=float, default=5.0, help="of one point")
    parser.add_argument("--top", type=float, default=1.0, help="share of each curve's largest number to end at")
    parser.add_argument("--out", type=Path, default=None)
    sys.exit(uvloop.run(main(parser.parse_args())))
