"""What accounts have kept, on real files: encrypted, theirs alone, bounded, deleted when it should be, and nobody else's trouble."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gateway.control.chores import DAY_MS
from gateway.control.content import ContentUnreadable, Exchange, Rotated
from gateway.control.content import intake as intake_module
from gateway.control.content.file import CHUNK
from gateway.control.content.retention import Retention
from gateway.control.content.store import ROTATED_AT_ONCE
from gateway.domain.content_keys import ContentKey, new_key, read_keys
from gateway.domain.errors import StoreUnavailable
from tests.conftest import eventually
from tests.control.kept import LOST, NEW, NOW_MS, OLD, Kept, said

CANARY = "canary-7f3a9c"

Opened = Callable[..., Kept]


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Opened]:
    """One content store after another in one folder; each is closed before the next, the last one at the end."""
    there: list[Kept] = []

    def opened(keys: Sequence[ContentKey] = (NEW,), **more: Any) -> Kept:
        there.append(Kept(tmp_path, keys, **more))
        return there[-1]

    yield opened
    for kept in there:
        await kept.close()


def rows(path: Path, sql: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(sql).fetchall()


def write(path: Path, sql: str, *arguments: Any) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(sql, arguments)


async def found(kept: Kept, number: int, account: str = "user_ann") -> Exchange | None:
    return await kept.store.find(said(number).generation_id, account)


async def test_what_was_said_is_kept_as_it_came_and_nowhere_on_the_disk_as_it_is(opened: Opened) -> None:
    kept = opened()
    contents = [said(number, text=CANARY + "x" * 3000) for number in range(20)]
    await kept.take(*contents)
    for content in contents:
        exchange = await kept.store.find(content.generation_id, "user_ann")
        assert exchange == Exchange(content.request, content.answer)
    files = kept.on_disk()
    assert files.keys() == {"content.sqlite", "content.sqlite-wal", "content.sqlite-shm", "content.sqlite.lock"}
    assert len(files["content.sqlite-wal"]) > 100_000  # the records are in there, and not in the file yet
    logged = str(kept.logged())
    await kept.close()
    files |= kept.on_disk()
    for name, data in files.items():
        assert CANARY.encode() not in data and b"acme/sage-1" not in data, name
    assert b"gen-1764031697" in files["content.sqlite"]  # the search finds what is there
    assert stat.S_IMODE(kept.path.stat().st_mode) == 0o600
    assert CANARY not in logged


async def test_every_record_has_a_nonce_of_its_own_and_the_same_text_is_never_the_same_bytes(opened: Opened) -> None:
    kept = opened()
    same = said(1)
    await kept.take(*(said(number, request=same.request, answer=same.answer) for number in range(50)))
    sealed = rows(kept.path, "SELECT key_id, nonce, data FROM content")
    assert len({nonce for _, nonce, _ in sealed}) == len({data for _, _, data in sealed}) == 50
    assert {key_id for key_id, _, _ in sealed} == {NEW.id} and all(len(nonce) == 12 for _, nonce, _ in sealed)


async def test_what_is_kept_is_an_accounts_own(opened: Opened) -> None:
    kept = opened()
    await kept.take(said(1))
    assert await found(kept, 1) is not None
    assert await found(kept, 1, "user_bob") is None
    assert await kept.store.delete(said(1).generation_id, "user_bob") is False
    assert await kept.store.delete_all("user_bob") == 0
    assert await found(kept, 1) is not None


async def test_a_wrong_key_a_moved_record_and_a_flipped_bit_are_clear_errors_and_no_garbage(opened: Opened) -> None:
    kept = opened((OLD,))
    await kept.take(said(1, text=CANARY), said(2), said(3, "user_bob"), said(4))
    await kept.close()
    kept = opened((NEW,))
    with pytest.raises(ContentUnreadable, match=f"kept under the key {OLD.id}, which the gateway was not given") as refused:
        await found(kept, 1)
    assert CANARY not in str(refused.value) and (refused.value.status, refused.value.code) == (500, "content_unreadable")
    await kept.close()

    write(kept.path, "UPDATE content SET key_id = ? WHERE generation_id = ?", NEW.id, said(1).generation_id)  # what the key never sealed
    write(kept.path, "UPDATE content SET account_id = 'user_ann' WHERE account_id = 'user_bob'")  # to read it under a key of one's own
    [(data,)] = rows(kept.path, f"SELECT data FROM content WHERE generation_id = '{said(2).generation_id}'")
    flipped = data[:10] + bytes([data[10] ^ 1]) + data[11:]
    write(kept.path, "UPDATE content SET data = ? WHERE generation_id = ?", flipped, said(2).generation_id)
    write(kept.path, "UPDATE content SET nonce = x'00' WHERE generation_id = ?", said(4).generation_id)
    kept = opened((NEW, OLD))
    for number in (1, 2, 3, 4):
        with pytest.raises(ContentUnreadable, match="damaged"):
            await found(kept, number)


async def test_the_newest_key_encrypts_and_all_of_them_decrypt(opened: Opened) -> None:
    kept = opened((OLD,))
    await kept.take(said(1))
    await kept.close()
    kept = opened((NEW, OLD))
    await kept.take(said(2))
    assert await found(kept, 1) is not None and await found(kept, 2) is not None
    assert rows(kept.path, "SELECT key_id FROM content ORDER BY generation_id") == [(OLD.id,), (NEW.id,)]


async def test_rotation_encrypts_everything_anew_in_parts_so_that_the_old_key_can_go(opened: Opened) -> None:
    many = ROTATED_AT_ONCE * 2 + 3
    kept = opened((OLD,))
    await kept.take(*(said(number) for number in range(many)))
    await kept.close()
    kept = opened((LOST,))
    await kept.take(said(100))
    await kept.close()

    kept = opened((NEW, OLD))
    before = dict(rows(kept.path, "SELECT generation_id, data FROM content"))
    parts: list[Rotated] = []
    after: tuple[str, int] | None = ("", 0)
    while after is not None:
        parts.append(await kept.store.rotate(after))
        await kept.take(said(1000 + len(parts)))  # it goes on meanwhile
        after = parts[-1].after
    assert sum(part.rotated for part in parts) == many and sum(part.unreadable for part in parts) == 1
    assert len(parts) > 2 and all(part.rotated + part.unreadable <= ROTATED_AT_ONCE for part in parts)
    assert await kept.store.rotate(("", 0)) == Rotated(rotated=0, unreadable=1, after=None)
    files = kept.on_disk()
    await kept.close()
    for number in range(many):
        old = before[said(number).generation_id]
        assert not [name for name, data in files.items() if old in data]  # what the old key opens is gone

    kept = opened((NEW,))
    for number in range(many):
        assert await found(kept, number) == Exchange(said(number).request, said(number).answer)
    with pytest.raises(ContentUnreadable):
        await found(kept, 100)


async def test_what_is_old_enough_goes_in_parts_and_leaves_the_file_and_its_log(opened: Opened) -> None:
    kept = opened()
    old = CHUNK + 5
    await kept.take(*(said(number) for number in range(old)))
    await kept.take(*(said(number, created_at_ms=NOW_MS + DAY_MS) for number in range(1000, 1003)))
    sealed = [data for (data,) in rows(kept.path, "SELECT data FROM content ORDER BY created_at_ms")]
    retention = Retention(store=kept.store, days=90, log=kept.log, clock=lambda: NOW_MS / 1000 + 90 * 86_400)
    assert await retention.look() == 0
    later = Retention(store=kept.store, days=90, log=kept.log, clock=lambda: (NOW_MS + 1000) / 1000 + 90 * 86_400)
    assert await later.look() == old
    assert rows(kept.path, "SELECT COUNT(*) FROM content") == [(3,)]
    files = b"".join(kept.on_disk().values())
    assert not any(data in files for data in sealed[:old]) and all(data in files for data in sealed[old:])
    assert await found(kept, 1000) is not None and await found(kept, 0) is None
    assert [line["count"] for line in kept.logged() if line["event"] == "content_expired"] == [old]


async def test_a_deletion_leaves_nothing_of_the_account_and_all_of_others(opened: Opened) -> None:
    kept = opened()
    await kept.take(*(said(number) for number in range(CHUNK * 2 + 1)), said(900, "user_bob"))
    sealed = [data for (data,) in rows(kept.path, "SELECT data FROM content WHERE account_id = 'user_ann'")]
    assert await kept.store.delete(said(7).generation_id, "user_ann") is True
    assert await kept.store.delete(said(7).generation_id, "user_ann") is False
    assert await kept.store.delete_all("user_ann") == CHUNK * 2
    files = b"".join(kept.on_disk().values())
    assert not any(data in files for data in sealed)
    assert await found(kept, 900, "user_bob") is not None


async def test_a_foreign_read_keeps_a_deletion_from_the_log_until_the_hour_and_no_longer(opened: Opened) -> None:
    kept = opened()
    await kept.take(*(said(number) for number in range(5)))
    sealed = [data for (data,) in rows(kept.path, "SELECT data FROM content")]
    with contextlib.closing(sqlite3.connect(kept.path)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT COUNT(*) FROM content").fetchone() == (5,)
        assert await kept.store.delete_all("user_ann") == 5
        assert await found(kept, 1) is None
        assert sealed[0] in kept.on_disk()["content.sqlite-wal"]
    assert await kept.store.expire(0) == 0
    files = b"".join(kept.on_disk().values())
    assert not any(data in files for data in sealed)


async def test_what_was_said_before_everything_was_deleted_is_not_stored_after_it(opened: Opened) -> None:
    kept = opened()
    kept.intake.offer(said(1, created_at_ms=NOW_MS - 5))
    kept.intake.offer(said(2, "user_bob", created_at_ms=NOW_MS - 5))
    assert await kept.store.delete_all("user_ann") == 0
    await kept.take(said(3, created_at_ms=NOW_MS), said(4, created_at_ms=NOW_MS + 1))
    assert [await found(kept, number) is not None for number in (1, 3, 4)] == [False, False, True]
    assert await found(kept, 2, "user_bob") is not None
    assert kept.dropped == {"deleted": 2} and kept.stored == 2


async def test_nothing_is_stored_of_an_account_that_has_it_off_by_now(opened: Opened) -> None:
    kept = opened()
    kept.logging = {"user_bob"}
    await kept.take(said(1), said(2, "user_bob"), said(3))
    assert await found(kept, 1) is None and await found(kept, 2, "user_bob") is not None
    assert (kept.stored, kept.dropped) == (1, {"off": 2})
    assert kept.logged() == []


async def test_without_a_key_nothing_is_kept_not_even_a_file(opened: Opened) -> None:
    kept = opened(())
    await kept.take(said(1), said(2))
    assert await found(kept, 1) is None and await kept.store.delete_all("user_ann") == 0 and await kept.store.expire(NOW_MS) == 0
    assert kept.dropped == {"no_key": 2} and kept.on_disk() == {}
    assert [(line["level"], line["event"], line["reason"]) for line in kept.logged()] == [("error", "content_dropped", "no_key")]


async def test_without_a_key_what_was_kept_is_deleted_all_the_same(opened: Opened) -> None:
    kept = opened()
    await kept.take(said(1), said(2), said(3, "user_bob"))
    await kept.close()
    kept = opened(())
    assert await kept.store.delete(said(1).generation_id, "user_ann") is True
    assert await kept.store.delete_all("user_ann") == 1 and await kept.store.expire(NOW_MS + 10) == 1


async def test_what_does_not_fit_the_queue_is_dropped_and_the_rest_is_stored(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "QUEUE_BYTES_MAX", 20_000)
    kept = opened()
    large = said(2, request=b"x" * 20_000)
    kept.intake.offer(said(1))
    kept.intake.offer(large)
    for number in range(3, 50):
        kept.intake.offer(said(number, request=b"x" * 3_000))
    assert kept.dropped["queue"] == 48 - 4
    await kept.intake.write_all()
    assert kept.stored == 5 and await found(kept, 1) is not None and await found(kept, 2) is None
    await kept.take(said(60, request=b"x" * 15_000))  # there is room again
    assert await found(kept, 60) is not None
    assert [line["reason"] for line in kept.logged()] == ["queue"]  # told once


async def test_a_full_file_takes_no_more_loses_nothing_and_takes_again_once_something_went(opened: Opened) -> None:
    kept = opened(total_bytes_max=200_000)
    for number in range(40):
        await kept.take(said(number, answer=b"x" * 10_000))
    assert 15 <= kept.stored <= 25 and kept.dropped == {"full": 40 - kept.stored}
    assert rows(kept.path, "SELECT COUNT(*) FROM content") == [(kept.stored,)]
    await kept.store.expire(NOW_MS + 5)
    await kept.take(said(100))
    assert await found(kept, 100) is not None
    assert [line["reason"] for line in kept.logged()] == ["full"]


async def test_a_file_that_fails_is_counted_told_once_and_opened_again_when_it_can_be(opened: Opened) -> None:
    kept = opened()
    kept.path.parent.mkdir()
    kept.path.write_bytes(b"no database, this" * 1000)
    for number in range(3):
        await kept.take(said(number))
    with pytest.raises(StoreUnavailable):
        await found(kept, 1)
    assert kept.dropped == {"failed": 3} and kept.stored == 0
    assert [line["reason"] for line in kept.logged()] == ["failed"]
    kept.path.unlink()
    await kept.take(said(4))
    assert await found(kept, 4) is not None and kept.stored == 1


async def test_a_file_of_a_newer_program_and_one_that_another_process_has_are_left_alone(opened: Opened) -> None:
    kept = opened()
    await kept.take(said(1))
    other = opened()
    with pytest.raises(StoreUnavailable, match="held by another process"):
        await found(other, 1)
    await kept.close()
    write(kept.path, "PRAGMA user_version = 2")
    with pytest.raises(StoreUnavailable, match="newer than this program"):
        await found(other, 1)
    assert rows(kept.path, "SELECT COUNT(*) FROM content") == [(1,)]


async def test_a_store_of_rules_that_does_not_answer_means_that_nothing_is_stored(opened: Opened) -> None:
    kept = opened()
    kept.rules_fail = True
    await kept.take(said(1), said(2))
    kept.rules_fail = False
    await kept.take(said(3))
    assert kept.dropped == {"failed": 2} and kept.stored == 1 and await found(kept, 1) is None


async def test_one_that_cannot_be_written_does_not_end_the_writing(opened: Opened) -> None:
    kept = opened()
    running = asyncio.create_task(kept.intake.run())
    try:
        kept.intake.offer(said(1, generation_id="gen-\ud800"))
        await eventually(lambda: kept.dropped["failed"] == 1)
        kept.intake.offer(said(2))
        await eventually(lambda: kept.stored == 1)
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def test_the_same_exchange_told_twice_is_stored_once_and_as_it_was(opened: Opened) -> None:
    kept = opened()
    await kept.take(said(1), said(1, text="again"))
    await kept.take(said(1, "user_bob", text="mine"))
    exchange = await found(kept, 1)
    assert exchange is not None and exchange.request == said(1).request and kept.stored == 1


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_no_text_is_no_key(text: str) -> None:
    assert read_keys(text) == ()


def test_keys_are_read_in_their_order_each_once_in_either_alphabet() -> None:
    first, second = new_key(), new_key()
    assert first != second and len(first) == 44
    read = read_keys(f" {first}, {second} ,{first.rstrip('=')},{second.replace('+', '-').replace('/', '_')}")
    assert [key.id for key in read] == [read_keys(first)[0].id, read_keys(second)[0].id]
    assert first not in repr(read) and read[0].secret.hex() not in repr(read)


@pytest.mark.parametrize("wrong", ["hunter2", "A" * 42, "A" * 45, "é" * 43, "A" * 20 + "\n" + "A" * 23, "A" * 43 + "=="])
def test_a_malformed_key_is_named_by_its_place_and_never_shown(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"^the key is not base64 of 32 bytes") as caught:
        read_keys(wrong)
    assert wrong not in str(caught.value)
    with pytest.raises(ValueError, match=r"^key 2 of 3 is not base64"):
        read_keys(f"{new_key()},{wrong},{new_key()}")
    with pytest.raises(ValueError, match=r"^key 2 of 2 is not base64"):
        read_keys(f"{new_key()},")
