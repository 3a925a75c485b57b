"""What edges are told of keys and sessions, over a real store and a clock of ours."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.control.key_lookup import SESSION_LABEL, KeyLookup
from gateway.control.store import Account, Key
from gateway.control.store.management import IDLE_S, SESSION_S, TOUCH_S, Session
from gateway.control.store.sqlite import SqliteStore
from gateway.domain.errors import StoreUnavailable
from gateway.domain.rules import RulesChange
from gateway.domain.sessions import session_name

BEGAN_S = 1_764_000_000
KEY, SESSION = "a" * 64, "b" * 64
NAME = session_name(SESSION)


class World:
    def __init__(self, store: SqliteStore) -> None:
        self.store = store
        self.now = float(BEGAN_S)
        self.lookup = KeyLookup(store=store, told=lambda record: record, now=lambda: self.now)

    async def used_at_s(self) -> int:
        session = await self.store.find_session(SESSION)
        assert session is not None
        return session.used_at_s

    async def is_used_at(self, at_s: float) -> None:
        """Once it was written down."""
        async with asyncio.timeout(10.0):
            while await self.used_at_s() != at_s:
                await asyncio.sleep(0.01)  # the writer tells nobody


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    store = await SqliteStore.open(tmp_path / "gateway.db")
    account = Account(id="user_ada", email="ada@example.com", created_at_ms=1, password_hash="hash")
    await store.create_account(
        account, [Key(digest=KEY, account_id=account.id, name="x", label="sk-or-v1-abc...def", created_at_ms=1)], topup_nanos=0
    )
    session = Session(digest=SESSION, account_id=account.id, created_at_s=BEGAN_S, used_at_s=BEGAN_S)
    assert await store.open_session(session, proven="hash", ended_before_s=0)
    there = World(store)
    running = asyncio.create_task(there.lookup.run())
    yield there
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    await store.close()


async def test_keys_and_sessions_are_found_by_names_that_never_meet(world: World) -> None:
    found = await world.lookup.find([KEY, NAME, SESSION, session_name(KEY), session_name("c" * 64), "session:", ""])
    assert set(found) == {KEY, NAME}
    assert not found[KEY].session and found[KEY].digest == KEY
    record = found[NAME]
    assert record.session and (record.digest, record.label, record.account_id) == ("", SESSION_LABEL, "user_ada")
    assert not record.management and record.limit_nanos is None and record.expires_at_s == BEGAN_S + IDLE_S


async def test_a_session_is_bound_by_what_its_account_allows(world: World) -> None:
    await world.store.change_rules("user_ada", RulesChange(zdr=True, ignored=("north",)))
    rules = (await world.lookup.find([NAME]))[NAME].rules
    assert rules.zdr and rules.ignored == ("north",)


async def test_inference_keeps_a_session_in_use_up_to_its_age(world: World) -> None:
    await world.lookup.find([NAME])
    world.now += TOUCH_S - 1
    await world.lookup.find([NAME])
    assert await world.used_at_s() == BEGAN_S  # not every question is a write
    while world.now + IDLE_S - TOUCH_S < BEGAN_S + SESSION_S:
        world.now += IDLE_S - TOUCH_S
        assert NAME in await world.lookup.find([NAME])
        await world.is_used_at(world.now)
    record = (await world.lookup.find([NAME]))[NAME]
    assert record.expires_at_s == BEGAN_S + SESSION_S
    world.now = BEGAN_S + SESSION_S
    assert await world.lookup.find([NAME]) == {}


async def test_an_idle_session_is_over_and_asking_does_not_wake_it(world: World) -> None:
    world.now += IDLE_S
    for _ in range(2):
        assert await world.lookup.find([NAME, KEY]) == await world.lookup.find([KEY])
    assert await world.used_at_s() == BEGAN_S


async def test_a_store_that_cannot_write_still_tells_who_it_is(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: asyncio.Queue[str] = asyncio.Queue(10)

    async def refuse(digest: str, used_at_s: int) -> None:
        refused.put_nowait(digest)
        raise StoreUnavailable("locked")

    with monkeypatch.context() as patched:
        patched.setattr(world.store, "touch_session", refuse)
        world.now += TOUCH_S
        assert NAME in await world.lookup.find([NAME])
        async with asyncio.timeout(10.0):
            assert await refused.get() == SESSION
    assert NAME in await world.lookup.find([NAME])
    await world.is_used_at(world.now)
