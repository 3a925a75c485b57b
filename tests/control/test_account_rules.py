"""What accounts allow, as the store keeps it: one truth for all keys of an account, and the defaults where nobody said."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from gateway.control.account_rules import Told
from gateway.control.store import Account, Key
from gateway.control.store.sqlite import SqliteStore
from gateway.domain.errors import NotFound
from gateway.domain.keys import KeyRecord
from gateway.domain.rules import NO_RULES, AccountRules, RulesChange
from gateway.log import Log


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = await SqliteStore.open(tmp_path / "gateway.db")
    for name in ("ann", "bob"):
        keys = [key(f"{name}-{number}", f"user_{name}") for number in (1, 2)]
        await store.create_account(Account(id=f"user_{name}", email=name, created_at_ms=1), keys, topup_nanos=0)
    yield store
    await store.close()


def key(digest: str, account_id: str) -> Key:
    return Key(digest=digest, account_id=account_id, name=digest, label="x", created_at_ms=1)


async def rules_of(store: SqliteStore, digest: str) -> AccountRules:
    return (await store.find_keys([digest]))[digest].rules


async def test_all_keys_of_an_account_have_its_rules_and_no_others(store: SqliteStore) -> None:
    rules, records = await store.change_rules("user_ann", RulesChange(zdr=True, ignored=("north", "south/fp8")))
    assert rules == AccountRules(zdr=True, ignored=("north", "south/fp8"))
    assert {record.digest: record.rules for record in records} == {"ann-1": rules, "ann-2": rules}
    await store.create_key(key("ann-3", "user_ann"))
    for number in (1, 2, 3):
        assert await rules_of(store, f"ann-{number}") == rules
    assert {listed.rules for listed in await store.list_keys("user_ann")} == {rules}
    assert (await store.find_key("ann-1")) is not None
    assert await rules_of(store, "bob-1") is NO_RULES


async def test_what_is_not_named_stays(store: SqliteStore) -> None:
    await store.change_rules("user_ann", RulesChange(train_paid=True, allowed=("north",)))
    rules, _ = await store.change_rules("user_ann", RulesChange(zdr=True))
    assert rules == AccountRules(train_paid=True, zdr=True, allowed=("north",))
    assert await rules_of(store, "ann-1") == rules


async def test_rules_set_back_are_the_very_defaults_by_which_edges_know_them(store: SqliteStore) -> None:
    await store.change_rules("user_ann", RulesChange(zdr=True))
    rules, records = await store.change_rules("user_ann", RulesChange(zdr=False))
    assert rules is NO_RULES and records[0].rules is NO_RULES
    assert await rules_of(store, "ann-1") is NO_RULES
    assert "rules" not in json.loads(_json(records[0]))  # nothing of them crosses the link


async def test_every_rule_is_written_out_so_that_later_defaults_change_nothing(store: SqliteStore, tmp_path: Path) -> None:
    await store.change_rules("user_ann", RulesChange())
    with contextlib.closing(sqlite3.connect(tmp_path / "gateway.db")) as db:
        [(text,)] = db.execute("SELECT rules FROM account_rules").fetchall()
    assert json.loads(text).keys() == set(AccountRules.__struct_fields__)


async def test_nobody_has_no_rules(store: SqliteStore) -> None:
    with pytest.raises(NotFound):
        await store.change_rules("user_none", RulesChange(zdr=True))


@pytest.mark.parametrize("keeps", [False, True])
async def test_edges_are_told_that_prompts_are_kept_only_where_they_can_be(store: SqliteStore, keeps: bool) -> None:
    told = Told(keeps_content=keeps, log=Log("test", fd=-1))
    await store.change_rules("user_ann", RulesChange(log_prompts=True, zdr=True))
    await store.change_rules("user_bob", RulesChange(log_prompts=True))
    found = {name: told(record) for name, record in (await store.find_keys(["ann-1", "bob-1"])).items()}
    assert found["ann-1"].rules == AccountRules(zdr=True, log_prompts=keeps)
    assert (found["bob-1"].rules is NO_RULES) is not keeps
    assert msgspec.structs.replace(found["bob-1"], rules=NO_RULES) == key("bob-1", "user_bob").record()


def _json(record: KeyRecord) -> bytes:
    return msgspec.json.encode(record)
