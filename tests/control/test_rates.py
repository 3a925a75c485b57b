"""Requests a minute as control leases them: by balance, over all edges, in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.control.allowances import UNLIMITED, free_requests_per_day, paid_requests_per_minute
from gateway.control.leases import LeaseDesk
from gateway.control.rates import Desks, RateBook
from gateway.control.store import NOBODY, Account, JournalSlice, LeaseRow
from gateway.control.store.sqlite import SqliteStore
from gateway.domain.money import NANOS_PER_USD as USD
from gateway.domain.resources import CLOCKS_S, end_s, free_day, free_minute, key_limit, paid_minute
from gateway.link.messages import Back, Grant, Recall, Standing, Want
from gateway.log import Log
from gateway.settings import Limits
from tests.control.journaling import generation, rows

LOG = Log("test", fd=-1)
NOW = 1_800_000_000.0
PAID, FREE = paid_minute("user_ann", 30_000_000), free_minute("user_ann", 30_000_000)
BALANCE = "balance:user_ann"


def encoded(**fields: Any) -> bytes:
    return msgspec.msgpack.encode(generation(**fields))


class Door:
    """Edges that are joined, and what is sent to them."""

    def __init__(self, *edges: str) -> None:
        self.sent: list[tuple[str, Grant | Recall]] = []
        self.joined_edges = list(edges)
        self._heard = asyncio.Event()

    def session(self, incarnation: str) -> int | None:
        return 1 if incarnation in self.joined_edges else None

    def send_to(self, incarnation: str, message: Grant | Recall, *, session: int | None = None) -> bool:
        self.sent.append((incarnation, message))
        self._heard.set()
        return True

    def push_funded(self, resource: str) -> None:
        raise AssertionError

    def drop(self, incarnation: str) -> None:
        raise AssertionError

    async def next(self) -> tuple[str, Grant | Recall]:
        async with asyncio.timeout(5):
            while not self.sent:
                self._heard.clear()
                await self._heard.wait()
        return self.sent.pop(0)


class World:
    def __init__(self, store: SqliteStore, limits: Limits) -> None:
        self.store = store
        self.now = NOW
        self.door = Door("a", "b")
        self.book = RateBook(store=store, limits=limits, clock=lambda: self.now)
        durable, rates = LeaseDesk(store=store, log=LOG, limits=limits), LeaseDesk(store=self.book, log=LOG)
        self.desks = Desks(durable, rates)
        for desk in (durable, rates):
            desk.attach(self.door)
        self.running = [asyncio.create_task(desk.run()) for desk in (durable, rates)]

    async def granted(self, edge: str, resource: str, at_least: int = 1, demand: int = 0) -> Grant:
        self.desks.want(edge, Want(resource, at_least, demand))
        told, grant = await self.door.next()
        assert told == edge and isinstance(grant, Grant) and grant.resource == resource
        return grant


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    store = await SqliteStore.open(tmp_path / "gateway.db")
    await store.create_account(Account(id="user_ann", email="a", created_at_ms=1), [], topup_nanos=USD // 2)
    world = World(store, Limits(requests_per_minute_min=10, free_requests_per_day=4))
    yield world
    for task in world.running:
        task.cancel()
    await asyncio.wait(world.running)
    await store.close()


@pytest.mark.parametrize(
    ("nanos", "limits", "requests"),
    [
        (-USD, Limits(), 60), (0, Limits(), 60), (USD + 1, Limits(), 61), (2 * USD, Limits(), 120), (10**6 * USD, Limits(), 30_000),
        (2 * USD, Limits(requests_per_minute_max=0), 0), (2 * USD, Limits(requests_per_minute_per_usd=0), 60),
        (2 * USD, Limits(requests_per_minute_per_usd=0, requests_per_minute_min=0), 0),
        (2 * USD, Limits(requests_per_minute_max=30, requests_per_minute_min=90), 30),
    ],
)  # fmt: skip
def test_the_rate_follows_the_balance_between_the_least_and_the_most(nanos: int, limits: Limits, requests: int) -> None:
    assert paid_requests_per_minute(limits, nanos) == requests


@pytest.mark.parametrize(("bought", "requests"), [(0, 200), (10 * USD - 1, 200), (10 * USD, 1000)])
def test_the_free_quota_follows_what_was_ever_bought(bought: int, requests: int) -> None:
    assert free_requests_per_day(Limits(), bought) == requests


async def test_a_rate_is_leased_to_the_last_request_and_recalled_before_anybody_is_refused(world: World) -> None:
    assert (await world.granted("a", PAID, demand=1000)).nanos == 7  # 30 by the balance, a part for each of two edges
    assert (await world.granted("a", PAID, at_least=0, demand=1000)).nanos == 5
    assert (await world.granted("b", PAID, at_least=18)).nanos == 18
    world.desks.want("b", Want(PAID, 1, 0))
    assert await world.door.next() == ("a", Recall(PAID))
    world.desks.back("a", Back(PAID, 2))
    assert await world.door.next() == ("b", Grant(PAID, 1))
    assert (await world.granted("b", PAID)).nanos == 1
    world.desks.want("b", Want(PAID, 1, 0))
    assert await world.door.next() == ("a", Recall(PAID))
    world.desks.back("a", Back(PAID, 0))
    assert await world.door.next() == ("b", Grant(PAID, 0, refused=True, limit=30))


async def test_a_limit_rises_with_credit_that_comes_and_stays_when_credit_goes(world: World) -> None:
    assert (await world.granted("a", PAID, at_least=30)).nanos == 30
    await world.store.apply_journal([JournalSlice("f", "a", 0, 1, [encoded(nanos=USD // 4)])])
    world.door.joined_edges = ["a"]
    assert (await world.granted("a", PAID)).limit == 30
    await world.store.add_credits("user_ann", USD, note="")
    assert (await world.granted("a", PAID, at_least=45)).nanos == 45
    assert (await world.granted("a", PAID)).limit == 75


async def test_what_an_edge_had_that_died_is_used_up_for_its_minute(world: World) -> None:
    assert (await world.granted("a", FREE, at_least=15)).nanos == 15
    world.door.joined_edges = ["b"]
    world.desks.left("a")
    assert (await world.granted("b", FREE, at_least=6)).free_nanos == 5
    assert (await world.granted("b", FREE, at_least=5)).nanos == 5


async def test_a_control_that_is_replaced_learns_what_is_out_from_those_who_have_it(world: World) -> None:
    world.desks.standing("a", Standing({PAID: 25, BALANCE: 1000}))
    assert (await world.granted("b", PAID, at_least=5)).nanos == 5
    async with world.store.leasing() as book:
        assert await book.rows(resources=[PAID, BALANCE], incarnations=[]) == [LeaseRow(BALANCE, "a", 1000)]  # no disk for a rate


async def test_minutes_that_are_over_are_forgotten(world: World) -> None:
    for minute in range(30_000_000, 30_000_050):
        await world.granted("a", paid_minute("user_ann", minute))
        world.now += 60.0
    assert len(world.book) <= 3


async def test_a_rate_that_is_off_is_no_limit(world: World, tmp_path: Path) -> None:
    book = RateBook(store=world.store, limits=Limits(free_requests_per_minute=0, requests_per_minute_max=0), clock=lambda: NOW)
    assert await book.totals([PAID, FREE]) == {PAID: UNLIMITED, FREE: UNLIMITED}


async def test_a_quota_is_used_up_by_what_was_served_and_outlives_the_edge_that_served_it(world: World, tmp_path: Path) -> None:
    day = free_day("user_ann", NOW)
    world.door.joined_edges = ["a"]
    assert (await world.granted("a", day, at_least=3)).nanos == 3
    counts = {"nanos": 0, "settles": (BALANCE, day)}
    records = [encoded(**counts), encoded(**counts), encoded(**counts, error="timeout", usage=None)]
    applied = await world.store.apply_journal([JournalSlice("f", "a", 0, 1, records)])
    assert applied.generations == 3
    found = rows(tmp_path / "gateway.db", "SELECT incarnation, granted_nanos, settled_nanos FROM leases ORDER BY 1")
    assert found == [(NOBODY, 2, 0), ("a", 3, 2)]
    assert await world.store.free_requests("user_ann", NOW) == 2 and await world.store.free_requests("user_ann", NOW + 86_400) == 0
    assert await world.store.lease_holders() == {"a"}
    async with world.store.leasing() as book:
        await book.delete("a")  # it died: what it did not use comes back
    world.door.joined_edges = ["b"]
    assert (await world.granted("b", day, at_least=2)).nanos == 2
    grant = await world.granted("b", day)
    assert (grant.refused, grant.free_nanos, grant.limit) == (True, 0, 4)
    assert (await world.granted("b", free_day("user_ann", NOW + 86_400), at_least=4)).nanos == 4


async def test_windows_that_are_over_leave_the_store_when_nothing_of_them_is_out(world: World) -> None:
    day = free_day("user_ann", NOW)
    kept = [LeaseRow(day, "still-has-some", 3), LeaseRow(BALANCE, "a", 0), LeaseRow(key_limit("k", None, NOW), "a", 0)]
    gone = [LeaseRow(day, NOBODY, 2), LeaseRow(day, "a", 0), LeaseRow(key_limit("k", "daily", NOW), "a", 0)]
    async with world.store.leasing() as book:
        await book.write([*kept, *gone])
    assert await world.store.forget_windows(end_s(day) + CLOCKS_S) == 0
    assert await world.store.forget_windows(end_s(day) + 2 * CLOCKS_S) == 2
    async with world.store.leasing() as book:
        left = await book.rows(resources=[row.resource for row in (*kept, *gone)], incarnations=[])
    assert sorted(left, key=repr) == sorted(kept, key=repr)
