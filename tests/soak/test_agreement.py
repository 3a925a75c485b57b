"""Four edges under steady calls with hang-ups while anything of the gateway is killed: at the end the provider's books, what callers
read and the ledger agree, and nothing is held.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from bench.books import Entry
from gateway.domain.generation import Generation
from gateway.domain.money import format_usd
from tests.conftest import eventually
from tests.edge.test_hang_ups import leave
from tests.money.shop import Account, Shop, exactly, nanos, opened, sim, stored
from tests.money.test_refusals import ASKED, HOLD_NANOS, SPENDS_IT_ALL

EDGES = 4
SHORT_SEED = 6  # kills an edge, then both
TOKENS_PER_S = 50  # of streams that last
HOLDS = 4000  # what the account with exact credit has
MARK_S = 2.0  # how old a stream is by its second mark, at the latest
REACH_S = 1.0  # how long before and after a kill something may have been on its way
BACK_S = 10.0
PATIENCE_S = 20.0


class Transcript(msgspec.Struct):
    """What a caller has of one answer."""

    generation_id: str
    cost: int | None = None  # nanos; None: it did not come to the end
    seen: int = 0  # events of content
    left_at: float | None = None  # of its own accord


class Callers:
    """Calls at a steady pace, whatever becomes of the earlier ones."""

    def __init__(self, shop: Shop, exact: Account, chance: random.Random, per_s: float) -> None:
        self.transcripts: list[Transcript] = []
        self.calls = self.refused = self.broken = 0
        self._shop, self._exact, self._chance, self._per_s = shop, exact, chance, per_s
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, seconds: float) -> None:
        began = time.monotonic()
        while (passed := time.monotonic() - began) < seconds:
            while self.calls < passed * self._per_s:
                self.calls += 1
                self._tasks.add(task := asyncio.create_task(self._call(self._chance.random())))
                task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(0.01)
        if self._tasks:
            await asyncio.wait(list(self._tasks))

    async def _call(self, kind: float) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ValueError):
            try:
                async with asyncio.timeout(PATIENCE_S):
                    if kind < 0.1:
                        await self._whole(self._exact, SPENDS_IT_ALL)
                    elif kind < 0.6:
                        await self._whole(self._shop.account, sim(tokens=5), stream=kind < 0.35)
                    else:
                        await self._stream(leaves=kind < 0.8)
                    return
            except (aiohttp.ClientError, OSError, TimeoutError):
                pass
        self.broken += 1

    async def _whole(self, account: Account, asked: dict[str, Any], *, stream: bool = False) -> None:
        answered = await self._shop.ask(account=account, stream=stream, **asked)
        if answered.status != 200:
            self.refused += 1
        elif not stream or answered.body.endswith(b"[DONE]\n\n"):
            self.transcripts.append(Transcript(answered.headers["X-Generation-Id"], _cost(answered.body, stream=stream)))

    async def _stream(self, *, leaves: bool) -> None:
        tokens = self._chance.choice((3, 20, 100))
        after = self._chance.randrange(1, tokens)
        how = self._chance.choice(("close", "reset"))
        async with self._shop.asking("acme/plain", stream=True, **sim(tokens=tokens, tokens_per_s=TOKENS_PER_S)) as caller:
            status, headers = await caller.head()
            if status != 200:
                self.refused += 1
                return
            transcript, body = Transcript(headers["x-generation-id"]), b""
            self.transcripts.append(transcript)
            while part := await caller.chunk():
                body += part
                transcript.seen = body.count(b'"content":" ')
                if leaves and transcript.seen >= after:
                    transcript.left_at = time.monotonic()
                    leave(caller, how)
                    return
            if body.endswith(b"[DONE]\n\n"):
                transcript.cost = _cost(body, stream=True)


def _cost(body: bytes, *, stream: bool) -> int:
    told = body.removesuffix(b"data: [DONE]\n\n").strip().rpartition(b"data: ")[2] if stream else body
    return nanos(exactly(told)["usage"]["cost"])


class Killer:
    """Kills an edge, control, both or everything, and remembers when."""

    def __init__(self, shop: Shop, chance: random.Random) -> None:
        self.times: list[float] = []
        self._killed: set[int] = set()
        self._shop, self._chance = shop, chance

    async def run(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await asyncio.sleep(self._chance.uniform(1.0, 3.0))
            health = await asyncio.to_thread(self._shop.gateway.health)
            kind = self._chance.random()
            self.times.append(time.monotonic())
            if kind < 0.15:
                await self._kill_all()
            elif len(health["edges"]) == EDGES and health["control"] and self._shop.gateway.ready_status() == 200:
                edge = self._chance.choice(health["edges"])
                for pid in [edge] if kind < 0.6 else [health["control"]] if kind < 0.8 else [edge, health["control"]]:
                    self._killed.add(pid)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def is_over(self) -> bool:
        """Whether control and all edges are there again, none of them one that was killed."""
        health = self._shop.gateway.health()
        return bool(health["control"]) and len(health["edges"]) == EDGES and self._killed.isdisjoint((health["control"], *health["edges"]))

    async def _kill_all(self) -> None:
        gateway = self._shop.gateway
        os.killpg(gateway.pid, signal.SIGKILL)
        await eventually(lambda: not gateway.processes())
        await asyncio.to_thread(gateway.wait)
        await asyncio.to_thread(gateway.start)


@pytest.mark.parametrize(
    ("seed", "seconds", "per_s"),
    [(SHORT_SEED, 5.0, 60.0), *(pytest.param(seed, 30.0, 200.0, marks=pytest.mark.soak) for seed in (2, 3, 4))],
)
@pytest.mark.timeout(300)
async def test_provider_callers_and_ledger_agree_whoever_is_killed(tmp_path: Path, seed: int, seconds: float, per_s: float) -> None:
    chance = random.Random(seed)
    async with opened(tmp_path, workers=EDGES) as shop:
        exact = await shop.new_account("exact@example.com", format_usd(HOLDS * HOLD_NANOS))
        callers, killer = Callers(shop, exact, chance, per_s), Killer(shop, random.Random(f"kills {seed}"))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(callers.run(seconds))
            tasks.create_task(killer.run(seconds))
        # Killed so often, control is a process that crashes in a loop: its next start may be a while off.
        await eventually(lambda: killer.is_over() and shop.gateway.ready_status() == 200, 60.0)
        ended = time.monotonic()
        journal = shop.gateway.folder / "journal"
        await eventually(lambda: len(list(journal.glob("edge-*"))) == EDGES and not list(journal.glob("running-*")), BACK_S)
        assert (await shop.verify())["ok"]
        assert _lease_holders(shop) <= EDGES
        assert time.monotonic() - ended <= 2 * BACK_S
        found = stored(shop.gateway)
        for transcript in callers.transcripts:
            _agrees(transcript, found.get(transcript.generation_id), killer.times)
        _all_accounted_for(list(shop.good.books.entries), found, killer.times)
        for account in (shop.account, exact):
            charged = sum(record.charged_nanos for record in found.values() if record.account_id == account.id)
            assert await shop.used(account) == charged
        assert len(callers.transcripts) > 0.3 * callers.calls, (callers.calls, callers.refused, callers.broken)
        await _spend_the_rest(shop, exact)


def _agrees(transcript: Transcript, record: Generation | None, kills: list[float]) -> None:
    if transcript.cost is not None:
        assert record is not None and not record.error and record.charged_nanos == transcript.cost
    elif record is None:
        left_at = transcript.left_at  # an edge that was killed at that moment cannot have noticed
        assert left_at is None or any(abs(kill - left_at) <= REACH_S for kill in kills), "a caller left, and nobody noticed"
        assert transcript.seen <= TOKENS_PER_S * MARK_S, "a stream that was marked is not charged"
    else:
        assert record.usage is not None
        assert record.error != "edge_lost" or record.usage.completion_tokens <= transcript.seen + 3  # on their way to the caller


def _all_accounted_for(entries: list[Entry], found: dict[str, Generation], kills: list[float]) -> None:
    """Every call that the provider answered is one generation; those without one were under way when something was killed."""
    by_upstream: dict[str, Generation] = {}
    for record in found.values():
        if record.upstream_id:
            assert by_upstream.setdefault(record.upstream_id, record) is record, "one answer, charged twice"
    books = {entry.answer_id: entry for entry in entries}
    for upstream_id, record in by_upstream.items():
        if record.charged_nanos:
            assert record.usage is not None and record.usage.completion_tokens <= books[upstream_id].completion_tokens
    for entry in entries:
        if entry.answer_id not in by_upstream and entry.first is not None:
            over = entry.cancelled or entry.finished or time.monotonic()
            assert any(entry.started - REACH_S <= kill <= over + REACH_S for kill in kills), entry


def _lease_holders(shop: Shop) -> int:
    with contextlib.closing(sqlite3.connect(f"file:{shop.gateway.folder}/gateway.db?mode=ro", uri=True)) as db:
        (count,) = db.execute("SELECT COUNT(DISTINCT incarnation) FROM leases").fetchone()
    return int(count)


async def _spend_the_rest(shop: Shop, exact: Account) -> None:
    """To the last nano: nothing is held any more, by nobody, alive or dead."""
    used = await shop.used(exact)
    assert used % HOLD_NANOS == 0
    left = HOLDS - used // HOLD_NANOS
    places = asyncio.Semaphore(32)

    async def one() -> int:
        async with places:
            return (await shop.ask(account=exact, **SPENDS_IT_ALL)).status

    statuses = await asyncio.gather(*(one() for _ in range(left + 20)))
    assert (statuses.count(200), statuses.count(402)) == (left, 20)
    assert (await shop.ask(account=exact, **ASKED)).status == 402
    await shop.until_used(HOLDS * HOLD_NANOS, exact)
