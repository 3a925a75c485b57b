"""The guard that does not time: bytecodes and memory of one fixed request, held against what was accepted before.

    python -m bench.guard [--record]

Counts of `bench.replay`, with a fixed hash seed, in a process of its own: `json` and `sse` are whole requests, `event` is one paced
event of an open stream. Counts depend on the interpreter and its C extensions, so a record is of exact versions and compared with
those alone; on others the guard says so and passes. It fails when a count grew by more than 5 %, and names the functions that did.
`--record` accepts the counts of now.

CPython cannot count allocations without a debugger, so `bytes` is the most memory that one step held at once beyond what it began
with (tracemalloc), and `blocks` what it left behind: the blocks still allocated after it, per step over 100 steps.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import gc
import os
import platform
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import CodeType

import msgspec
import uvloop

from bench.replay import Replay, bytecodes

RECORDS = Path(__file__).parent / "results" / "guard.json"
ROOT = Path(__file__).parent.parent
PACKAGES = ("uvloop", "aiohttp", "msgspec")
KINDS = ("json", "sse", "event")
SHARE_MAX = 0.05
BLOCKS_LEFT_MAX = 0.5  # per step: less is caches and free lists, not a leak
REPEATS = 5
NAMED = 8  # functions in a complaint


class Count(msgspec.Struct, frozen=True, kw_only=True):
    """What one step cost."""

    bytecodes: int
    bytes: int
    blocks: float
    functions: dict[str, int]  # bytecodes by `file.py function`


class Record(msgspec.Struct, frozen=True, kw_only=True):
    versions: dict[str, str]
    counts: dict[str, Count]  # by kind


def versions() -> dict[str, str]:
    """What the counts depend on."""
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return {"python": python} | {name: metadata.version(name) for name in PACKAGES}


def read_records(path: Path = RECORDS) -> list[Record]:
    return msgspec.json.decode(path.read_bytes(), type=list[Record]) if path.exists() else []


def accepted(records: list[Record]) -> Record | None:
    """The record of the versions that run here."""
    return next((record for record in records if record.versions == versions()), None)


def write_record(counts: dict[str, Count], path: Path = RECORDS) -> None:
    """Accept these counts; records of other versions stay."""
    kept = [record for record in read_records(path) if record.versions != versions()]
    records = sorted([*kept, Record(versions=versions(), counts=counts)], key=lambda record: sorted(record.versions.items()))
    path.write_bytes(msgspec.json.format(msgspec.json.encode(records), indent=1) + b"\n")


def grown(before: dict[str, Count], now: dict[str, Count]) -> list[str]:
    """What is more than 5 % above the record, a complaint a line; empty: nothing."""
    found = []
    for kind, old in before.items():
        new = now[kind]
        if new.bytecodes > old.bytecodes * (1 + SHARE_MAX):
            names = _grown_functions(old.functions, new.functions)
            found.append(f"{kind}: {old.bytecodes:,} -> {new.bytecodes:,} bytecodes; grown: {', '.join(names)}")
        if new.bytes > old.bytes * (1 + SHARE_MAX):
            found.append(f"{kind}: {old.bytes:,} -> {new.bytes:,} bytes held at once")
        if new.blocks > old.blocks + BLOCKS_LEFT_MAX:
            found.append(f"{kind}: {old.blocks:.2f} -> {new.blocks:.2f} blocks left behind by each")
    return found


def _grown_functions(old: dict[str, int], new: dict[str, int]) -> list[str]:
    more = {name: number - old.get(name, 0) for name, number in new.items() if number > old.get(name, 0)}
    most = sorted(more, key=lambda name: -more[name])
    return [f"{name} +{more[name]}" for name in most[:NAMED]]


def count_in_child() -> dict[str, Count]:
    """The counts of a fresh interpreter with PYTHONHASHSEED=0. Raises CalledProcessError."""
    command = [sys.executable, "-m", "bench.guard", "--count"]
    environ = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, env=environ, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return msgspec.json.decode(done.stdout, type=dict[str, Count])


async def count() -> dict[str, Count]:
    """The counts, taken in this process."""
    counts = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            replay = Replay(Path(folder), "json" if kind == "json" else "sse")
            for _ in range(50):
                replay.once()
            step: Callable[[], object] = replay.once
            if kind == "event":
                replay.begin_events()
                step = replay.event
            counts[kind] = await _count(step)
    return counts


async def _count(step: Callable[[], object]) -> Count:
    # Of several, the least: a second that ended in between shows as work of the caches that hold its text.
    best = min((bytecodes(step) for _ in range(REPEATS)), key=lambda counted: counted.total())
    return Count(bytecodes=best.total(), functions=_by_name(best), bytes=_bytes_at_once(step), blocks=await _blocks_left(step))


def _by_name(counted: collections.Counter[CodeType]) -> dict[str, int]:
    names: collections.Counter[str] = collections.Counter()
    for code, number in counted.items():
        names[f"{Path(code.co_filename).name} {code.co_qualname}"] += number
    return dict(sorted(names.items()))


def _bytes_at_once(step: Callable[[], object]) -> int:
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        step()
        peaks = []
        for _ in range(REPEATS):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            step()
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
        gc.enable()
    return min(peaks)


async def _blocks_left(step: Callable[[], object]) -> float:
    await asyncio.sleep(0)  # what steps left for the loop's next turn is not left behind
    gc.collect()
    gc.disable()  # what only the collector would find is
    try:
        before = sys.getallocatedblocks()
        for _ in range(100):
            step()
        await asyncio.sleep(0)
        return round((sys.getallocatedblocks() - before) / 100, 2)
    finally:
        gc.enable()


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.guard", description="Counts of the hot path against the accepted ones.")
    parser.add_argument("--record", action="store_true", help="accept the counts of now")
    parser.add_argument("--count", action="store_true", help="count in this process, as JSON")
    arguments = parser.parse_args()
    if arguments.count:
        sys.stdout.buffer.write(msgspec.json.encode(uvloop.run(count())))
        return 0
    now, record = count_in_child(), accepted(read_records())
    for kind, each in now.items():
        print(f"{kind:6} {each.bytecodes:6,} bytecodes {each.bytes:8,} bytes at once {each.blocks:6.2f} blocks left")
    if arguments.record:
        write_record(now)
        return 0
    if record is None:
        print(f"no record for {versions()}: nothing to compare with; `python -m bench.guard --record` makes one")
        return 0
    complaints = grown(record.counts, now)
    print("\n".join(complaints) or "within 5 % of the record")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
