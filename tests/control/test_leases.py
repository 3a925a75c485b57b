"""Leases: their sizes, and that no credit is ever leased twice, whatever is lost on the way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.control import journals
from gateway.control import leases as leases_module
from gateway.control.leases import AHEAD, grant_nanos
from gateway.control.store import Account, Key, LeaseRow
from gateway.control.store.sqlite import SqliteStore
from gateway.domain.errors import StoreUnavailable
from gateway.link.messages import Back, Grant, Recall, Standing, Want
from tests.control.journaling import generation, rows
from tests.control.lease_world import ANN, CREDIT, World


@given(
    at_least=st.integers(0, 2**62),
    demand=st.integers(0, 2**62),
    free=st.integers(-(2**62), 2**62),
    total=st.integers(-(2**62), 2**62),
    edges=st.integers(0, 8),
)
def test_a_grant_covers_the_need_and_never_more_than_there_is(at_least: int, demand: int, free: int, total: int, edges: int) -> None:
    nanos = grant_nanos(Want("r", at_least, demand), total=total, free=free, edges=edges)
    if nanos is None:
        assert total < 0 or at_least > max(0, free)
    else:
        assert total >= 0
        assert at_least <= nanos <= max(0, free)
        if nanos > at_least:  # what goes beyond the need leaves the others their part
            assert nanos <= max(demand, AHEAD * at_least) and nanos <= free // (2 * max(1, edges))


@pytest.mark.parametrize(
    ("at_least", "demand", "free", "edges", "nanos"),
    [
        (1, 0, 1000, 1, AHEAD),  # ahead, for what will come
        (1, 400, 1000, 1, 400),
        (10, 4000, 1000, 1, 500),  # half
        (10, 4000, 1000, 4, 125),
        (900, 4000, 1000, 4, 900),  # need goes before fairness
        (1001, 0, 1000, 1, None),
        (0, 0, 0, 1, 0),  # a free model at balance 0
        (0, 500, -5, 1, 0),
        (0, 500, 600, 1, 300),
    ],
)
def test_sizes(at_least: int, demand: int, free: int, edges: int, nanos: int | None) -> None:
    assert grant_nanos(Want("r", at_least, demand), total=1000, free=free, edges=edges) == nanos


def test_a_negative_balance_serves_nothing() -> None:
    assert grant_nanos(Want("r", 0, 0), total=-1, free=0, edges=1) is None


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    store = await SqliteStore.open(tmp_path / "gateway.db")
    await store.create_account(
        Account(id="user_ann", email="a", created_at_ms=1),
        [
            Key(digest="limited", account_id="user_ann", name="", label="", created_at_ms=1, limit_nanos=500, limit_reset="daily"),
            Key(digest="lasting", account_id="user_ann", name="", label="", created_at_ms=1, limit_nanos=500),
            Key(digest="free", account_id="user_ann", name="", label="", created_at_ms=1),
        ],
        topup_nanos=CREDIT,
    )
    world = World(tmp_path, store)
    yield world
    world.running.cancel()
    await asyncio.wait([world.running])
    await store.close()


@pytest.mark.parametrize("seed", range(20))
async def test_credit_is_conserved_whatever_is_lost(world: World, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "NEWBORN_S", 0.0)  # here no file is without its lock
    chance = random.Random(seed)
    network = world.network
    network.join()
    for _ in range(250):
        edges = list(network.edges.values())
        edge = chance.choice(edges)
        step = chance.random()
        if step < 0.35:
            edge.hold(chance.choice((1, chance.randint(1, CREDIT // 20), chance.randint(1, CREDIT))))
        elif step < 0.55 and edge.holds:
            edge.settle(chance)
        elif step < 0.75 and edge.inbox:
            edge.listen()
        elif step < 0.80:
            edge.says(Back(ANN, edge.book.give_back(ANN)))
        elif step < 0.84:
            network.rejoin(edge)
        elif step < 0.86 and len(edges) > 1:
            network.kill(edge)
        elif step < 0.88 and len(edges) < 4:
            network.join()
        elif step < 0.92:
            await world.keeper.read_all()
        else:
            await asyncio.sleep(chance.choice((0, 0, 0.005, 0.03)))
        # What edges may spend now and have spent ever is within the credit, whatever control knows of it yet.
        assert network.spent + sum(each.may_spend for each in network.edges.values()) <= CREDIT, f"seed {seed}"
        open_nanos = sum(max(0, nanos) for nanos in world.leases().values())
        assert open_nanos <= await world.store.balance("user_ann"), f"seed {seed}"
    for edge in list(network.edges.values()):
        network.kill(edge)
    await world.settled()
    await world.keeper.read_all()
    assert world.leases() == {}
    assert await world.store.balance("user_ann") == CREDIT - network.spent
    assert network.dropped == []
    assert (await world.store.verify_ledger()).ok


async def test_an_edge_gets_what_another_leaves_unused(world: World) -> None:
    first, second = world.network.join(), world.network.join()
    first.says(Want(ANN, 900_000, 0))
    assert (await world.answer(first)).nanos == 900_000
    hold = first.book.hold((ANN,), 300_000, 0.0)
    second.says(Want(ANN, 700_000, 0))
    grant = await world.answer(second, [first])
    assert (grant.nanos, grant.refused) == (700_000, False)
    second.says(Want(ANN, 1, 0))
    grant = await world.answer(second, [first])
    assert (grant.refused, grant.free_nanos) == (True, 0)
    hold.release()
    first.says(Back(ANN, first.book.give_back(ANN)))
    second.says(Want(ANN, 300_000, 0))
    assert (await world.answer(second, [first])).nanos == 300_000


async def test_an_edge_that_does_not_answer_a_recall_is_waited_for_and_no_longer(world: World) -> None:
    silent, asking = world.network.join(), world.network.join()
    silent.says(Want(ANN, 900_000, 0))
    await world.answer(silent)
    asking.says(Want(ANN, 200_000, 0))
    grant = await world.answer(asking)
    assert (grant.refused, grant.free_nanos) == (True, 100_000)
    assert list(silent.inbox) == [Recall(ANN)]
    asking.says(Want(ANN, 200_000, 0))
    while len(silent.inbox) < 2:
        await asyncio.sleep(0.001)
    world.network.rejoin(silent)  # counts as an answer, though what it holds stays
    assert (await world.answer(asking)).refused


async def test_wants_of_one_resource_take_turns_over_a_recall(world: World) -> None:
    rich, *poor = (world.network.join() for _ in range(4))
    rich.says(Want(ANN, CREDIT, 0))
    await world.answer(rich)
    for edge in poor:
        edge.says(Want(ANN, CREDIT // 2, 0))
    grants: list[Grant] = []
    async with asyncio.timeout(5):
        while len(grants) < len(poor):
            for edge in (rich, *poor):
                grants += [message for message in edge.inbox if isinstance(message, Grant)]
                while edge.inbox:
                    edge.listen()
                    if edge is not rich and edge.book.available(ANN):
                        edge.book.hold((ANN,), CREDIT // 2, 0.0)
            await asyncio.sleep(0.001)
    assert sorted(grant.nanos for grant in grants) == [0, CREDIT // 2, CREDIT // 2]
    assert [grant.free_nanos for grant in grants if grant.refused] == [0]
    await world.settled()
    assert sum(world.leases().values()) == CREDIT


async def test_what_an_edge_gives_back_while_it_waits_is_granted_to_it_as_well_or_nothing_is(world: World) -> None:
    """Else edges that are short together would be granted parts that suffice for nobody, in turn and without end."""
    waiting, other = world.network.join(), world.network.join()
    waiting.says(Want(ANN, 500_000, 0))
    await world.answer(waiting)
    other.says(Want(ANN, 600_000, 0))
    while Recall(ANN) not in waiting.inbox:
        await asyncio.sleep(0.001)
    waiting.says(Want(ANN, 200_000, 0))  # it has not heard of the recall: together with what it has, 700,000
    waiting.listen()
    assert (await world.answer(other)).nanos == 600_000
    hold = other.book.hold((ANN,), 600_000, 0.0)
    refused = await world.answer(waiting, [other])
    assert (refused.refused, refused.nanos, refused.free_nanos) == (True, 0, 400_000)
    hold.release()
    waiting.says(Want(ANN, 700_000, 0))
    assert (await world.answer(waiting, [other])).nanos == 700_000


async def test_overspending_is_no_credit_for_others_and_made_up_for_by_its_edge(world: World) -> None:
    over, other = world.network.join(), world.network.join()
    over.says(Want(ANN, 500_000, 0))
    await world.answer(over)
    over.book.hold((ANN,), 500_000, 0.0).settle(700_000)
    over.journal.append(generation(nanos=700_000))
    await world.keeper.read_all()
    other.says(Want(ANN, 300_001, 0))
    grant = await world.answer(other, [over])
    assert (grant.refused, grant.free_nanos) == (True, 300_000)
    over.says(Want(ANN, 200_000 + 300_000, 0))  # what it lacks and what it needs
    assert (await world.answer(over)).nanos == 500_000
    assert over.book.available(ANN) == 300_000
    other.says(Want(ANN, 1, 0))
    assert (await world.answer(other)).refused


async def test_a_grant_on_a_lost_link_is_void(world: World) -> None:
    edge = world.network.join()
    edge.says(Want(ANN, 1000, 0))
    world.network.rejoin(edge)  # before it was decided
    await world.settled()
    assert not edge.inbox and world.leases().get(edge.name, 0) == 0
    edge.says(Want(ANN, 1000, 0))
    await world.settled()
    world.network.rejoin(edge)  # after, but before it was heard
    await world.settled()
    assert world.leases()[edge.name] == 0
    edge.says(Want(ANN, CREDIT, 0))
    assert (await world.answer(edge)).nanos == CREDIT


async def test_where_an_edge_stands_is_its_own_to_say(world: World) -> None:
    edge = world.network.join()
    edge.says(Want(ANN, 1000, 0))
    granted = (await world.answer(edge)).nanos
    edge.journal.append(generation(nanos=300))
    await world.keeper.read_all()
    edge.says(Standing({ANN: granted - 100, "balance:user_other": 7}))
    await world.settled()
    assert rows(world.database, "SELECT resource, granted_nanos, settled_nanos FROM leases ORDER BY 1") == [
        (ANN, granted - 100, 300),
        ("balance:user_other", 7, 0),
    ]
    edge.says(Standing({}))
    await world.settled()
    assert rows(world.database, "SELECT resource, granted_nanos, settled_nanos FROM leases ORDER BY 1") == [
        (ANN, 300, 300),
        ("balance:user_other", 0, 0),
    ]


@pytest.mark.parametrize("is_lost", [False, True])
async def test_what_an_edge_forgot_is_free_again_also_when_the_link_was_lost_before_it_said_so(world: World, is_lost: bool) -> None:
    window = "key:limited:2025-11-25"  # 500 a day
    edge, other = world.network.join(), world.network.join()
    edge.says(Want(window, 500, 0))
    assert (await world.answer(edge)).nanos == 500
    hold = edge.book.hold((window,), 200, 0.0)
    assert edge.book.forget(window) is None  # held
    hold.settle(200)
    edge.journal.append(generation(nanos=200, key_digest="limited"))
    unused = edge.book.forget(window)
    assert unused == 300 and edge.book.standing() == {}
    if not is_lost:
        edge.says(Back(window, unused))
        await world.settled()
    world.network.rejoin(edge)
    await world.settled()
    await world.keeper.read_all()
    other.says(Want(window, 301, 0))
    grant = await world.answer(other)
    assert (grant.refused, grant.free_nanos) == (True, 300)
    other.says(Want(window, 300, 0))
    assert (await world.answer(other)).nanos == 300


async def test_more_than_was_granted_cannot_come_back(world: World) -> None:
    edge = world.network.join()
    edge.says(Want(ANN, 1000, 0))
    granted = (await world.answer(edge)).nanos
    for message in (Back(ANN, granted + 1), Back("balance:user_x", 1)):
        edge.says(message)
    await world.settled()
    assert world.leases()[edge.name] == granted


async def test_amounts_that_cannot_be_end_the_link(world: World) -> None:
    edge = world.network.join()
    for message in (Back(ANN, -1), Back(ANN, 2**64), Standing({ANN: -1}), Standing({ANN: 2**63})):
        edge.says(message)
    assert world.network.dropped == [edge.name] * 4
    edge.says(Want(ANN, -1, 0))
    assert (await world.answer(edge)).unavailable
    edge.says(Want(ANN, 2**64 - 1, 2**64 - 1))
    assert (await world.answer(edge)).refused


async def test_key_limits_are_leased_by_their_window(world: World) -> None:
    edge = world.network.join()
    edge.journal.append(
        generation(nanos=200, key_digest="limited"),
        generation(nanos=100, key_digest="limited", created_at_ms=1_764_000_000_000),
        generation(nanos=450, key_digest="lasting"),
    )
    await world.keeper.read_all()
    windows = {"limited:2025-11-25": 300, "limited:2025-11-26": 500, "limited:2025-11-24": 200, "lasting:": 50}
    for window, free in windows.items():
        resource = f"key:{window}"
        edge.says(Want(resource, 501, 0))
        grant = await world.answer(edge)
        assert (grant.refused, grant.free_nanos) == (True, free)
        edge.says(Want(resource, free, 0))
        assert (await world.answer(edge)).nanos == free
    for resource in ("key:free:", "key:none:", "key:", "key:limited", "balance:user_none", "balance:", "", "x"):
        edge.says(Want(resource, 0, 0))
        grant = await world.answer(edge)
        assert (grant.refused, grant.nanos) == (True, 0)


async def test_a_store_that_fails_is_unavailable_and_what_came_back_is_not_forgotten(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    edge = world.network.join()
    edge.says(Want(ANN, 1000, 0))
    granted = (await world.answer(edge)).nanos
    leasing = world.store.leasing

    def failing() -> object:
        raise StoreUnavailable("down")

    monkeypatch.setattr(world.store, "leasing", failing)
    edge.says(Want(ANN, 5, 0))
    edge.says(Back(ANN, edge.book.give_back(ANN)))
    assert (await world.answer(edge)).unavailable
    with pytest.raises(StoreUnavailable):
        await world.desk.release("nobody")
    monkeypatch.setattr(world.store, "leasing", leasing)
    await world.settled()
    assert granted and world.leases()[edge.name] == 0


async def test_a_fault_of_ours_costs_one_batch_and_its_edges_their_link(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    edge = world.network.join()
    await world.settled()
    monkeypatch.setattr(leases_module.LeaseDesk, "_on_back", lambda *_: 1 / 0)
    edge.says(Want(ANN, 5, 0))
    edge.says(Back(ANN, 0))
    while not world.network.dropped:
        await asyncio.sleep(0.001)
    assert world.network.dropped == [edge.name]
    monkeypatch.undo()
    edge.says(Want(ANN, 5, 0))
    assert (await world.answer(edge)).nanos >= 5


async def test_the_queue_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    edge = world.network.join()
    await world.settled()
    monkeypatch.setattr(leases_module, "QUEUE_MAX", 3)
    for _ in range(5):
        edge.says(Want(ANN, 1, 0))
    assert [message.unavailable for message in edge.inbox if isinstance(message, Grant)] == [True, True]
    await world.settled()
    assert sum(not message.unavailable for message in edge.inbox if isinstance(message, Grant)) == 3


async def test_a_dead_edge_s_leases_are_returned_and_refusals_forgotten(world: World) -> None:
    doomed, other = world.network.join(), world.network.join()
    doomed.says(Want(ANN, CREDIT, 0))
    await world.answer(doomed)
    doomed.journal.append(generation(nanos=400_000))
    world.network.kill(doomed)
    other.says(Want(ANN, 600_000, 0))
    assert (await world.answer(other)).refused  # nobody knows yet what it has spent
    await world.keeper.read_all()
    assert world.network.funded == [ANN]
    other.says(Want(ANN, 600_001, 0))
    grant = await world.answer(other)
    assert (grant.refused, grant.free_nanos) == (True, 600_000)
    other.says(Want(ANN, 600_000, 0))
    assert (await world.answer(other)).nanos == 600_000


async def test_lease_rows_are_whole(world: World) -> None:
    async with world.store.leasing() as book:
        await book.write([LeaseRow(ANN, "a", 5, 0), LeaseRow(ANN, "b", 6, 0), LeaseRow("balance:x", "b", 7, 0)])
    async with world.store.leasing() as book:
        assert {(row.resource, row.incarnation) for row in await book.rows(resources=[ANN], incarnations=["b"])} == {
            (ANN, "a"),
            (ANN, "b"),
            ("balance:x", "b"),
        }
        await book.delete("b")
        assert await book.totals([ANN, "balance:x", "key:free:"]) == {ANN: CREDIT}
    with pytest.raises(RuntimeError):
        async with world.store.leasing() as book:
            await book.delete("a")
            raise RuntimeError
    assert await world.store.lease_holders() == {"a"}
