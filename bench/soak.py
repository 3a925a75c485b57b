"""Mixed load for long, with callers who hang up and a provider that fails: does anything grow, and does the money agree?

    python -m bench.soak [--minutes 2] [--callers 24]

JSON, bursts, paced streams, hang-ups mid-stream, provider errors and broken streams, from a fixed seed. Told at the end: the slope of
the edge's and control's memory and their descriptors, first and last tenth of p99, how late the event loops were, and the ledger against
the provider's own books, answer by answer: every whole answer is charged once for exactly its tokens, every cut one for no more than was
made. Exit status 1 when the money differs, or memory grows by more than 1 MiB a minute in the second half. The cache of the store's pages
fills in the first minutes; twenty minutes is the real length.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import linear_regression

import aiohttp
import msgspec
import psutil  # type: ignore[import-untyped]
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from bench import gateway
from bench.books import Entry
from bench.load import Target, percentile
from bench.provider import Provider
from bench.rounds import choose_cores
from bench.subjects import request_body
from gateway.domain.generation import Generation, decode

LOOK_S = 1.0
SETTLE_S_MAX = 30.0
SLOPE_MIB_MAX = 1.0  # a minute
PROMPT_NANOS, COMPLETION_NANOS = 100, 400  # a token, as bench.gateway's catalog says
MIX = (  # weight, stream, sim, share of callers who hang up
    (50, False, "tokens=16", 0.0),
    (20, True, "tokens=16", 0.0),
    (15, True, "tokens=40;tokens_per_s=200", 0.0),
    (8, True, "tokens=200;tokens_per_s=200", 1.0),
    (4, False, "status=500", 0.0),
    (3, True, "tokens=20;tokens_per_s=200;reset_after_events=6", 0.0),
)


class Look(msgspec.Struct, frozen=True):
    """One look at the processes."""

    at_s: float
    rss_mib: float
    fds: int


class Soak:
    """The callers, and what they and the provider saw."""

    def __init__(self, url: str, key: str) -> None:
        self._target = Target(url=url + "/api/v1/chat/completions", body=b"", headers={"Authorization": f"Bearer {key}"})
        self.latencies: list[tuple[float, float]] = []  # when it ended, seconds; of bare JSON answers
        self.statuses: dict[str, int] = {}

    async def call(self, chance: random.Random, until_s: float) -> None:
        """One caller, a connection a request, as short-lived callers do."""
        while time.monotonic() < until_s:
            _, stream, sim, hangs = chance.choices(MIX, [each[0] for each in MIX])[0]
            body = request_body(gateway.PREFIX + "sage-1", stream, sim, 256)
            request = msgspec.structs.replace(self._target, body=body, stream=stream).request()
            began = time.monotonic()
            status = await self._ask(request, chance.randrange(1, 20) if hangs else 0)
            self.statuses[status] = self.statuses.get(status, 0) + 1
            if status == "200" and not stream:
                self.latencies.append((time.monotonic(), time.monotonic() - began))

    async def _ask(self, request: bytes, events: int) -> str:
        """The status; "hung up" after that many reads where `events` is not 0."""
        reader, writer = await asyncio.open_connection(*self._target.address)
        try:
            writer.write(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
            head = (await reader.readuntil(b"\r\n\r\n"))[9:12].decode()
            reads = 0
            while await reader.read(65_536):
                reads += 1
                if events and reads >= events:
                    return "hung up"
            return head
        except (OSError, asyncio.IncompleteReadError):
            return "broken"
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def look(pid: int) -> Look:
    """All processes of the gateway together."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    rss = sum(process.memory_info().rss for process in processes)
    return Look(time.monotonic(), rss / 2**20, sum(process.num_fds() for process in processes))


def slope_mib(looks: Sequence[Look]) -> float:
    """MiB a minute over the second half: the first fills caches."""
    half = looks[len(looks) // 2 :]
    return linear_regression([each.at_s / 60 for each in half], [each.rss_mib for each in half]).slope if len(half) > 2 else 0.0


def generations(store: Path) -> list[Generation]:
    with contextlib.closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True, timeout=30)) as database:
        return [decode(row[0]) for row in database.execute("SELECT record FROM generations")]


def differences(books: dict[str, Entry], ledger: Sequence[Generation]) -> list[str]:
    """Where the ledger and the provider's books do not agree, a line each."""
    found, seen = [], set()
    for each in ledger:
        entry = books.get(each.upstream_id)
        if each.upstream_id in seen:
            found.append(f"{each.id}: {each.upstream_id} is charged twice")
        seen.add(each.upstream_id or each.id)
        if entry is None:
            if each.charged_nanos:
                found.append(f"{each.id}: charged for an answer that the provider does not know")
            continue
        most = entry.prompt_tokens * PROMPT_NANOS + entry.completion_tokens * COMPLETION_NANOS
        if each.charged_nanos > most or (each.error is None and each.charged_nanos != most):
            found.append(f"{each.id}: charged {each.charged_nanos}, made {most} nanos' worth")
    whole = [entry for entry in books.values() if entry.status == 200 and entry.finished and not entry.cancelled]
    found += [f"{entry.answer_id}: whole, and not in the ledger" for entry in whole if entry.answer_id not in seen]
    return found


async def _watch(provider: Provider, pid: int, books: dict[str, Entry], looks: list[Look], until_s: float) -> None:
    """Looks, and keeps the provider's entries, of which it forgets the oldest itself; they go on changing in place."""
    began = time.monotonic()
    while (now := time.monotonic()) < until_s:
        looks.append(look(pid))
        keep(provider, books)
        print(f"\r{(now - began) / (until_s - began):5.0%} {looks[-1].rss_mib:7.1f} MiB", end="", file=sys.stderr, flush=True)
        await asyncio.sleep(LOOK_S)
    print(file=sys.stderr)


def keep(provider: Provider, books: dict[str, Entry]) -> None:
    books.update((entry.answer_id, entry) for entry in provider.books.entries)


async def lateness(log: Path) -> dict[str, float]:
    """By process, the milliseconds that its event loop was late at most in 99 of 100 looks: the bound of a bucket."""
    listening = next(line for line in log.read_text().splitlines() if '"operations_listening"' in line)
    url = f"http://127.0.0.1:{msgspec.json.decode(listening)['port']}/metrics"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        text = await answer.text()
    return {name: 1000 * kept_to(looks, 0.99) for name, looks in loop_lags(text).items()}


def loop_lags(metrics: str) -> dict[str, Counter[float]]:
    """By process, how often its event loop was late by at most each bound, in seconds."""
    found: dict[str, Counter[float]] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples if family.name == "gateway_loop_lag_seconds" else ():
            if sample.name.endswith("_bucket"):
                found.setdefault(sample.labels["process"], Counter())[float(sample.labels["le"])] += int(sample.value)
    return found


def kept_to(looks: Counter[float], share: float) -> float:
    """The bound that this share of the looks kept to."""
    return next(bound for bound in sorted(looks) if looks[bound] >= share * max(looks.values()))


async def main(wish: argparse.Namespace) -> int:
    books: dict[str, Entry] = {}
    looks: list[Look] = []
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        async with (
            Provider(name="North") as provider,
            gateway.gateway(provider.url, core=choose_cores()[0], folder=folder) as (url, pid, key),
        ):
            soak = Soak(url, key)
            until_s = time.monotonic() + wish.minutes * 60
            async with asyncio.TaskGroup() as group:
                group.create_task(_watch(provider, pid, books, looks, until_s))
                for number in range(wish.callers):
                    group.create_task(soak.call(random.Random(number), until_s))
            keep(provider, books)
            wrong = await _settled(folder / "gateway.db", books)
            rest = look(pid)
            late = await lateness(folder / "gateway.log")
    ended = sorted(soak.latencies)
    tenth = max(1, len(ended) // 10)
    first, last = (percentile(sorted(took for _, took in part), 0.99) * 1000 for part in (ended[:tenth], ended[-tenth:]))
    slope = slope_mib(looks)
    print(f"answers {soak.statuses}")
    print(f"memory {looks[0].rss_mib:.1f} -> {looks[-1].rss_mib:.1f} MiB, {slope:+.2f} MiB a minute in the second half")
    print(f"descriptors {looks[0].fds} at first, {max(each.fds for each in looks)} at most, {rest.fds} at rest")
    print(f"JSON p99 {first:.1f} ms in the first tenth, {last:.1f} in the last")
    print("event loops late p99 <= " + ", ".join([f"{ms:g} ms ({name})" for name, ms in late.items()]))
    print("\n".join(wrong[:20]) or f"ledger and books agree on {len(books):,} answers")
    return 1 if wrong or (wish.minutes >= 2 and slope > SLOPE_MIB_MAX) else 0


async def _settled(store: Path, books: dict[str, Entry]) -> list[str]:
    """The differences once control has read all journals; it says so nowhere, so this looks until there is none or time is up."""
    give_up_s = time.monotonic() + SETTLE_S_MAX
    while (wrong := differences(books, generations(store))) and time.monotonic() < give_up_s:
        await asyncio.sleep(0.25)
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench.soak", description="Mixed load for long.")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--callers", type=int, default=24)
    sys.exit(uvloop.run(main(parser.parse_args())))
