"""More work than can be done: what is served, and how the rest is refused, at one, two and five times the capacity (OVL-01).

    python -m bench.overload [--seconds 20] [--times 1,2,5] [--connections 4000] [--tokens 400] [--ttft-ms 300]

The gateway has one core, load and provider another. A closed loop measures the capacity, then streams are due at multiples of it,
whatever comes back. The provider is silent for `--ttft-ms` and then sends all `--tokens` at once: work enough for the gateway that the
generator can offer five times what it can do. The generator is bounded: what is due while all its connections are busy is not sent,
and counted as that. A request's time counts from when it was due; goodput is whole answers a second, once the first ones are back.

Exit status 1 when a promise is broken: goodput at least 90 % of the peak at the capacity and at twice it and 80 % at five times it; p99 of
what was accepted at most twice that of an unloaded gateway; each refusal 429 or 503 with Retry-After. A shared machine may not give the
gateway its whole core while it wants it: goodput then is compared by the CPU it got, and times may be longer by as much as it got less.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from array import array
from collections import Counter, deque
from functools import partial
from pathlib import Path

import msgspec
import uvloop

from bench import findings, gateway
from bench.children import child, cpu_by_process, pin, ready_url
from bench.load import LoadConnection, Tally, Target, closed_loop, percentile
from bench.machine import Machine, describe_machine
from bench.rounds import choose_cores, each_us
from bench.subjects import request_body

TICK_S = 0.001
RAMP_S = 1.0  # until answers come as steadily as requests go
DRAIN_S = 5.0
CLOSED_CONNECTIONS = 800  # so many that some always wait
UNLOADED_SHARE = 0.2  # of the capacity
GOODPUT_MIN = {1.0: 0.9, 2.0: 0.9, 5.0: 0.8}  # of the peak
P99_TIMES_MAX = 2.0
P99_FLOOR_MS = 500.0  # a shared machine stands still for that long now and then
REFUSALS = frozenset({b"429", b"503"})


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of requests due at a fixed rate."""

    times: float  # the capacity
    due_per_s: float
    sent_per_s: float
    goodput_per_s: float
    refused_per_s: float
    accepted_ms_p50: float
    accepted_ms_p99: float
    refused_ms_p99: float
    unsent: int  # due while all connections were busy
    bare: int  # refusals without Retry-After, or of another status
    broken: int  # connections lost, and answers that did not come
    late_ms_p99: float  # the generator's own lateness
    statuses: dict[str, int] = {}
    cpu_us: dict[str, float] = {}  # of the gateway by process, per request sent

    @property
    def core(self) -> float:
        """How much of one core the gateway had, 0-1."""
        return sum(self.cpu_us.values()) * self.sent_per_s / 1e6


class Overload(msgspec.Struct, frozen=True, kw_only=True):
    date: str
    command: list[str]
    machine: Machine
    capacity_per_s: float  # in a closed loop
    capacity_per_cpu_s: float  # by the gateway's own CPU time
    tokens: int  # of an answer, in one burst
    ttft_ms: float
    offers: list[Offer]


class _Crowd:
    """Connections that are free, and counts of all."""

    def __init__(self) -> None:
        self.idle: deque[_Connection] = deque()
        self.accepted_s, self.refused_s, self.late_s = array("d"), array("d"), array("d")
        self.statuses: Counter[bytes] = Counter()
        self.bare = self.sent = self.unsent = 0

    @property
    def answers(self) -> int:
        return len(self.accepted_s) + len(self.refused_s)

    async def ask(self, rate_per_s: float, seconds: float) -> None:
        """What is due while nobody is idle is not sent."""
        began, due, wanted = time.perf_counter(), 0, int(rate_per_s * seconds)
        while due < wanted:
            reached = min(wanted, int((time.perf_counter() - began) * rate_per_s) + 1)
            sent = min(reached - due, len(self.idle))
            for number in range(due, due + sent):
                self.idle.popleft().ask(began + number / rate_per_s)  # who has been idle longest: all of them take part
            self.sent += sent
            self.unsent += reached - due - sent
            due = reached
            await asyncio.sleep(TICK_S)  # the rhythm itself

    def answered(self, status: bytes, waits: bool, took_s: float) -> None:
        self.statuses[status] += 1
        if status == b"200":
            self.accepted_s.append(took_s)
        else:
            self.refused_s.append(took_s)
            self.bare += status not in REFUSALS or not waits


class _Connection(LoadConnection):
    """Takes any status for an answer, and is idle in between."""

    def __init__(self, target: Target, request: bytes, tally: Tally, crowd: _Crowd) -> None:
        super().__init__(target, request, tally)
        self._crowd = crowd
        self._status = b""
        self._waits = False

    def ask(self, due_s: float) -> None:
        self._send()
        self._crowd.late_s.append(self._sent_s - due_s)
        self._sent_s = due_s

    def _next(self) -> None:
        self._crowd.idle.append(self)

    def _read_head(self, head: bytes) -> None:
        self._status = head[9:12]
        self._waits = self._status != b"200" and b"\r\nretry-after: " in head.lower()
        self._in_body = True
        self._left = self.length_of(head)

    def _complete(self) -> None:
        whole = self._status != b"200" or b"[DONE]" in self._tail
        self._crowd.answered(self._status if whole else b"cut", self._waits, time.perf_counter() - self._sent_s)
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._crowd.idle:
            self._crowd.idle.remove(self)
        super().connection_lost(exc)


async def offered(target: Target, *, times: float, rate_per_s: float, connections: int, seconds: float, pid: int) -> Offer:
    """`rate_per_s` requests for that long after RAMP_S of it, and DRAIN_S for the last answers. Raises OSError."""
    tally, crowd, request, loop = Tally(), _Crowd(), target.request(), asyncio.get_running_loop()
    opened: list[_Connection] = []
    try:
        for _ in range(connections):
            _, connection = await loop.create_connection(partial(_Connection, target, request, tally, crowd), *target.address)
            opened.append(connection)
        await crowd.ask(rate_per_s, RAMP_S)
        cpu, asked, served, refused, began = (
            cpu_by_process(pid),
            crowd.sent,
            len(crowd.accepted_s),
            len(crowd.refused_s),
            time.perf_counter(),
        )
        await crowd.ask(rate_per_s, seconds)
        took_s, sent = time.perf_counter() - began, crowd.sent - asked
        served, refused = len(crowd.accepted_s) - served, len(crowd.refused_s) - refused
        cpu_us = each_us(cpu, cpu_by_process(pid), sent)
        give_up_s = time.perf_counter() + DRAIN_S
        while crowd.answers + tally.errors < crowd.sent and time.perf_counter() < give_up_s:
            await asyncio.sleep(TICK_S)
    finally:
        for connection in opened:
            connection.stop()
        for connection in opened:
            await connection.lost
    accepted, refusals, late = sorted(crowd.accepted_s), sorted(crowd.refused_s), sorted(crowd.late_s)
    return Offer(
        times=times, due_per_s=rate_per_s, sent_per_s=sent / took_s, goodput_per_s=served / took_s, refused_per_s=refused / took_s,
        accepted_ms_p50=percentile(accepted, 0.5) * 1000, accepted_ms_p99=percentile(accepted, 0.99) * 1000,
        refused_ms_p99=percentile(refusals, 0.99) * 1000, late_ms_p99=percentile(late, 0.99) * 1000,
        unsent=crowd.unsent, bare=crowd.bare, broken=crowd.sent - crowd.answers,
        statuses={status.decode(): number for status, number in crowd.statuses.items()}, cpu_us=cpu_us,
    )  # fmt: skip


def broken_promises(found: Overload) -> list[str]:
    """A line each."""
    bare = [
        f"{each.times:g}x: {each.bare} refusals without Retry-After or of other statuses, {each.broken} without an answer"
        for each in found.offers
        if each.bare or each.broken
    ]
    return [*bare, *lacking(found), *late(found)]


def lacking(found: Overload) -> list[str]:
    """Where goodput is less than promised. The peak is the best seen, the closed loop's included."""
    loaded = found.offers[1:]  # the first is of an unloaded gateway
    peak_per_s = max(found.capacity_per_s, *(each.goodput_per_s for each in loaded))
    peak_per_cpu_s = max(found.capacity_per_cpu_s, *(each.goodput_per_s / each.core for each in loaded))
    lines = []
    for each in loaded:
        share, wanted = each.goodput_per_s / peak_per_s, GOODPUT_MIN.get(each.times, 0.0)
        share = max(share, each.goodput_per_s / each.core / peak_per_cpu_s)
        if share < wanted:
            lines.append(f"{each.times:g}x: goodput is {share:.0%} of the peak of {peak_per_s:,.0f}/s, not {wanted:.0%}")
    return lines


def late(found: Overload) -> list[str]:
    """Where what was accepted took longer than promised."""
    unloaded, *loaded = found.offers
    lines = []
    for each in loaded:
        p99_ms_max = max(P99_FLOOR_MS, P99_TIMES_MAX * unloaded.accepted_ms_p99 / min(1.0, each.core))
        if each.accepted_ms_p99 > p99_ms_max:
            lines.append(f"{each.times:g}x: p99 of accepted requests is {each.accepted_ms_p99:.0f} ms, not {p99_ms_max:.0f}")
    return lines


def table(found: Overload) -> str:
    """A line an offer."""
    names = f"{'offered':>8}{'due/s':>8}{'sent/s':>8}{'goodput':>9}{'refused/s':>10}{'p50 ms':>8}{'p99 ms':>8}{'late p99':>9}{'core':>6}"
    lines = [f"capacity {found.capacity_per_s:,.0f}/s, {found.capacity_per_cpu_s:,.0f} per CPU second", names]
    for each in found.offers:
        lines.append(
            f"{each.times:>7g}x{each.due_per_s:>8,.0f}{each.sent_per_s:>8,.0f}{each.goodput_per_s:>9,.0f}{each.refused_per_s:>10,.0f}"
            f"{each.accepted_ms_p50:>8.0f}{each.accepted_ms_p99:>8.0f}{each.late_ms_p99:>9.0f}{each.core:>6.0%}"
            f"  {each.statuses} unsent {each.unsent}"
        )
    return "\n".join(lines)


async def measure(wish: argparse.Namespace) -> Overload:
    """A gateway, its capacity, and the offers. Raises ChildFailed, OSError."""
    cores = choose_cores()
    if (settle := pin(cores[1])) is not None:
        settle()
    with tempfile.TemporaryDirectory(prefix="overload-") as name:
        folder = Path(name)
        log = folder / "provider.log"
        command: list[str | Path] = [sys.executable, "-m", "bench.provider", "--behaviour", f"tokens={wish.tokens};ttft_ms={wish.ttft_ms}"]
        async with child(command, core=cores[1], log=log) as provider:
            url = await ready_url(provider, log)
            async with gateway.gateway(url, core=cores[0], folder=folder) as (at, pid, key):
                body = request_body(gateway.PREFIX + "sage-1", True, "", wish.tokens)
                target = Target(url=at + "/api/v1/chat/completions", body=body, stream=True, headers={"Authorization": f"Bearer {key}"})
                await closed_loop(target, connections=CLOSED_CONNECTIONS, seconds=1)  # warm
                cpu = cpu_by_process(pid)
                closed = await closed_loop(target, connections=CLOSED_CONNECTIONS, seconds=min(5.0, wish.seconds))
                each_cpu_us = sum(each_us(cpu, cpu_by_process(pid), closed.requests).values())
                capacity_per_s = closed.requests / (closed.seconds - wish.ttft_ms / 1000)  # the first answers come after that
                offers = []
                for times in (UNLOADED_SHARE, *wish.times):
                    offer = await offered(
                        target, times=times, rate_per_s=capacity_per_s * times, connections=wish.connections, seconds=wish.seconds, pid=pid
                    )
                    offers.append(offer)
    return Overload(
        date=findings.now(), command=sys.argv, machine=await describe_machine(cores),
        capacity_per_s=capacity_per_s, capacity_per_cpu_s=1e6 / each_cpu_us, tokens=wish.tokens, ttft_ms=wish.ttft_ms, offers=offers,
    )  # fmt: skip


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.overload", description="More work than can be done.")
    parser.add_argument("--seconds", type=float, default=20.0, help="of one offer")
    parser.add_argument("--ttft-ms", type=float, default=300.0, help="from a request to the first token of its answer")
    parser.add_argument("--tokens", type=int, default=400, help="of an answer")
    parser.add_argument("--connections", type=int, default=4000)
    parser.add_argument("--times", type=lambda text: [float(part) for part in text.split(",")], default=[1.0, 2.0, 5.0])
    return parser.parse_args(words)


def main() -> int:
    found = uvloop.run(measure(arguments()))
    broken = broken_promises(found)
    print(table(found))
    print("\n".join(broken) or "all promises kept")
    out = findings.result_file("overload")
    findings.write(found, out)
    print(f"\n{out}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
