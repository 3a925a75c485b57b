"""Mixed load for long, with callers who hang up and a provider that fails: does anything grow, and does the money agree?

    python -m bench.soak [--minutes 20] [--callers 24]

JSON, bursts, paced streams, hang-ups mid-stream, provider errors and broken streams, from a fixed seed. Told at the end, and written to
`bench/results/`: the slope of the gateway's memory, how its descriptors and event loops' tasks grew, p99 of bare JSON answers from
window to window, how late the event loops were, and the ledger against the provider's own books, answer by answer: every whole answer is
charged once for exactly its tokens, every cut one for no more than was made. Exit status 1 when something of that is wrong; what needs
time to be told (memory, p99) is judged in runs of at least ten minutes, for the cache of the store's pages fills in the first ones.
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
from statistics import linear_regression, median

import aiohttp
import msgspec
import psutil  # type: ignore[import-untyped]
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from bench import findings, gateway
from bench.books import Entry
from bench.children import name_of
from bench.load import Target, percentile
from bench.machine import Machine, describe_machine
from bench.provider import Provider
from bench.rounds import choose_cores
from bench.subjects import request_body
from gateway.domain.generation import Generation, decode

LOOK_S = 1.0
AT_REST = ("gateway_inflight_requests", "gateway_inflight_attempts", "gateway_connections", "gateway_journal_pending_records")
WINDOWS = 10  # of the run, for p99
SETTLE_S_MAX = 30.0
LONG_MINUTES = 10.0  # from here on memory and p99 are judged
SLOPE_MIB_MAX = 1.0  # a minute
FDS_GROWN_MAX = 16  # with the number of callers, which comes and goes
TASKS_GROWN_MAX = 4
DRIFT_MAX = 1.5  # p99 of the last windows over that of the first
DRIFT_MS_MIN = 25.0  # less is noise
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
    """One look at the gateway's processes, all together."""

    at_s: float
    rss_mib: dict[str, float]  # by process
    fds: int
    tasks: int  # of the event loops


class Found(msgspec.Struct, frozen=True, kw_only=True):
    date: str
    command: list[str]
    machine: Machine
    minutes: float
    answers: dict[str, int]
    slope_mib: dict[str, float]  # by process, a minute, over the second half
    fds_grown: float
    tasks_grown: float
    p99_ms: list[float]  # of bare JSON answers, by window
    late_ms: dict[str, float]  # by process, what 99 of 100 looks at its event loop kept to
    booked: int  # answers in the provider's books
    left: dict[str, float]  # gauges that must be 0 when nobody asks any more
    wrong: list[str]  # where ledger and books differ
    looks: list[Look]


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


async def look(pid: int, log: Path) -> Look:
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    rss_mib = {name_of(process): process.memory_info().rss / 2**20 for process in processes}
    fds = sum(process.num_fds() for process in processes)
    return Look(time.monotonic(), rss_mib, fds, int(total(await metrics(log), "gateway_tasks")))


def slope_mib(looks: Sequence[Look]) -> dict[str, float]:
    """MiB a minute by process, over the second half: the first fills caches."""
    half = looks[len(looks) // 2 :]
    if len(half) < 3:
        return {}
    minutes = [each.at_s / 60 for each in half]
    return {name: linear_regression(minutes, [each.rss_mib.get(name, 0.0) for each in half]).slope for name in half[0].rss_mib}


def grown(figures: Sequence[int]) -> float:
    """How much more there is in the last fifth than in the second; the load is the same in both."""
    fifth = len(figures) // 5
    return median(figures[-fifth:]) - median(figures[fifth : 2 * fifth]) if fifth else 0.0


def p99_by_window(latencies: Sequence[tuple[float, float]]) -> list[float]:
    """Milliseconds, of WINDOWS equal parts of the time in which answers ended."""
    first, last = min(latencies)[0], max(latencies)[0]
    parts: list[list[float]] = [[] for _ in range(WINDOWS)]
    for ended, took in latencies:
        parts[min(WINDOWS - 1, int((ended - first) / max(1e-9, last - first) * WINDOWS))].append(took)
    return [1000 * percentile(sorted(part), 0.99) for part in parts]


def broken_promises(found: Found) -> list[str]:
    """A line each."""
    lines = [f"{name} is {value:g} when nobody asks" for name, value in found.left.items() if value]
    lines += found.wrong[:20]
    if found.fds_grown > FDS_GROWN_MAX:
        lines.append(f"{found.fds_grown:g} descriptors more in the last fifth than in the second")
    if found.tasks_grown > TASKS_GROWN_MAX:
        lines.append(f"{found.tasks_grown:g} tasks more in the last fifth than in the second")
    if found.minutes >= LONG_MINUTES:
        lines += [f"{name} grows by {mib:.2f} MiB a minute" for name, mib in found.slope_mib.items() if mib > SLOPE_MIB_MAX]
        early, late = median(found.p99_ms[1:4]), median(found.p99_ms[-3:])
        if late > early * DRIFT_MAX and late > early + DRIFT_MS_MIN:
            lines.append(f"p99 went from {early:.0f} to {late:.0f} ms")
    return lines


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


async def _watch(provider: Provider, pid: int, log: Path, books: dict[str, Entry], looks: list[Look], until_s: float) -> None:
    """Looks, and keeps the provider's entries, of which it forgets the oldest itself; they go on changing in place."""
    began = time.monotonic()
    while (now := time.monotonic()) < until_s:
        looks.append(await look(pid, log))
        keep(provider, books)
        done = (now - began) / (until_s - began)
        state = f"{sum(looks[-1].rss_mib.values()):.1f} MiB, {looks[-1].fds} descriptors, {looks[-1].tasks} tasks"
        print(f"\r[{'#' * int(20 * done):20}] {done:4.0%} {state}    ", end="", file=sys.stderr, flush=True)
        await asyncio.sleep(LOOK_S)
    print(file=sys.stderr)


def keep(provider: Provider, books: dict[str, Entry]) -> None:
    books.update((entry.answer_id, entry) for entry in provider.books.entries)


async def metrics(log: Path) -> str:
    """What the gateway with this log shows at /metrics."""
    listening = next(line for line in log.read_text().splitlines() if '"operations_listening"' in line)
    url = f"http://127.0.0.1:{msgspec.json.decode(listening)['port']}/metrics"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return await answer.text()


def total(metrics: str, name: str) -> float:
    """A counter's or gauge's value, over all its labels."""
    families = text_string_to_metric_families(metrics)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


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


async def run(wish: argparse.Namespace) -> Found:
    """The load, and what was found. Raises ChildFailed, OSError."""
    books: dict[str, Entry] = {}
    looks: list[Look] = []
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        log = folder / "gateway.log"
        async with (
            Provider(name="North") as provider,
            gateway.gateway(provider.url, core=choose_cores()[0], folder=folder) as (url, pid, key),
        ):
            soak = Soak(url, key)
            until_s = time.monotonic() + wish.minutes * 60
            async with asyncio.TaskGroup() as group:
                group.create_task(_watch(provider, pid, log, books, looks, until_s))
                for number in range(wish.callers):
                    group.create_task(soak.call(random.Random(number), until_s))
            keep(provider, books)
            left = await _left(log)
            wrong = differences(books, generations(folder / "gateway.db"))
            late_ms = {process: 1000 * kept_to(lags, 0.99) for process, lags in loop_lags(await metrics(log)).items()}
    return Found(
        date=findings.now(), command=sys.argv, machine=await describe_machine(choose_cores()),
        minutes=wish.minutes, answers=soak.statuses, slope_mib=slope_mib(looks), fds_grown=grown([each.fds for each in looks]),
        tasks_grown=grown([each.tasks for each in looks]), p99_ms=p99_by_window(soak.latencies), late_ms=late_ms, booked=len(books),
        left=left, wrong=wrong, looks=looks,
    )  # fmt: skip


async def _left(log: Path) -> dict[str, float]:
    """What is under way and what waits for the ledger once nobody asks any more: looks until it is nothing, or time is up."""
    give_up_s = time.monotonic() + SETTLE_S_MAX
    while True:
        text = await metrics(log)
        left = {name: total(text, name) for name in AT_REST}
        if not any(left.values()) or time.monotonic() > give_up_s:
            return left
        await asyncio.sleep(0.25)


def show(found: Found) -> str:
    looks, grown = found.looks, f"{found.fds_grown:+g} and {found.tasks_grown:+g}"
    return "\n".join(
        [
            f"answers {found.answers}",
            *(
                f"memory {name} {looks[0].rss_mib[name]:.1f} -> {looks[-1].rss_mib[name]:.1f} MiB, {slope:+.2f} a minute in the second half"
                for name, slope in found.slope_mib.items()
            ),
            f"descriptors {max(each.fds for each in looks)} at most, tasks {max(each.tasks for each in looks)} at most; grown by {grown}",
            "JSON p99 ms by window: " + " ".join(f"{each:.1f}" for each in found.p99_ms),
            "event loops late p99 <= " + ", ".join(f"{ms:g} ms ({name})" for name, ms in found.late_ms.items()),
            f"ledger and books {'differ' if found.wrong else 'agree'} on {found.booked:,} answers",
        ]
    )


async def main(wish: argparse.Namespace) -> int:
    found = await run(wish)
    broken = broken_promises(found)
    print(show(found))
    print("\n".join(broken) or "all promises kept")
    out = findings.result_file("soak")
    findings.write(found, out)
    print(f"\n{out}")
    return 1 if broken else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench.soak", description="Mixed load for long.")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--callers", type=int, default=24)
    sys.exit(uvloop.run(main(parser.parse_args())))
