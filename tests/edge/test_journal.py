"""The journal's file, by itself: records before the last byte, whole files, and a failure that is told."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.domain.errors import Overloaded, StoreUnavailable
from gateway.domain.generation import Generation, decode
from gateway.edge import journal as journal_module
from gateway.edge.journal import Fsync, Journal
from gateway.log import Log
from gateway.wire import records

LOG = Log("test", fd=-1)


def generation(number: int) -> Generation:
    return Generation(id=f"gen-{number}", account_id="user_ann", key_digest="abc", created_at_ms=1, model="a/b", charged_nanos=number)


def opened(folder: Path, *, fsync: Fsync = "never", bytes_max: int = 10**9) -> Journal:
    made = Journal(
        folder, slot=0, incarnation="a", fsync=fsync, fsync_s=0.01, bytes_max=bytes_max, on_appended=lambda: None, log=LOG
    )  # fmt: skip
    made.open()
    return made


def read(folder: Path) -> list[str]:
    """Ids in all files; fails where a file does not end with a whole record."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda path: int(path.suffix[1:])):
        run = records.split(data := path.read_bytes(), records_max=10_000)
        assert run.consumed == len(data) and not run.corrupt
        found += [decode(each).id for each in run.records]
    return found


async def appended(journal: Journal, number: int, seen: Callable[[], Any] = lambda: None) -> Any:
    """What `seen()` is at the moment when the last byte may leave."""
    done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    journal.append([records.encode(generation(number))], lambda: done.set_result(seen()))
    return await asyncio.wait_for(done, 5.0)


@pytest.mark.parametrize("fsync", ["always", "batch", "never"])
async def test_a_record_is_in_the_file_before_the_last_byte_leaves(tmp_path: Path, fsync: Fsync) -> None:
    journal = opened(tmp_path / "j", fsync=fsync)
    for number in range(5):
        assert await appended(journal, number, lambda: read(tmp_path / "j")[-1]) == f"gen-{number}"
    await journal.close()
    assert read(tmp_path / "j") == [f"gen-{number}" for number in range(5)]


@pytest.fixture
async def syncs(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[int]]:
    """Sizes that were synced, by a disk that takes its time."""
    made: list[int] = []
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        time.sleep(0.002)
        real(fd)
        made.append(os.fstat(fd).st_size)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    yield made


async def test_always_means_that_the_last_byte_waits_for_the_sync(tmp_path: Path, syncs: list[int]) -> None:
    journal = opened(tmp_path / "j", fsync="always")
    for number in range(3):
        synced = await appended(journal, number, lambda: syncs[-1])
        assert synced == (tmp_path / "j" / "edge-0-a.1").stat().st_size
    await journal.close()


@pytest.mark.parametrize("fsync", ["always", "batch"])
async def test_a_new_file_may_be_begun_while_the_old_one_is_being_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syncs: list[int], fsync: Fsync
) -> None:
    """The sync under way has a descriptor of its own: the old file's may be closed, and its number belong to another file."""
    monkeypatch.setattr(journal_module, "ROTATE_BYTES", 1)
    journal = opened(tmp_path / "j", fsync=fsync)
    await asyncio.gather(*(later(journal, number) for number in range(200)))
    journal.require_room()  # it has not failed
    await journal.close()
    assert sorted(read(tmp_path / "j")) == sorted(f"gen-{number}" for number in range(200))
    assert len(list((tmp_path / "j").iterdir())) > 2  # how many, the machine's pace decides


async def later(journal: Journal, number: int) -> None:
    await asyncio.sleep(number * 0.0005)
    await appended(journal, number)


async def test_a_write_that_fails_closes_admission_and_leaves_whole_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = opened(tmp_path / "j")
    await appended(journal, 1)
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))  # as a disk does that is about to be full
    await appended(journal, 2)
    with pytest.raises(StoreUnavailable):
        journal.require_room()
    monkeypatch.undo()
    await journal.close()
    assert read(tmp_path / "j") == ["gen-1"]


async def test_a_sync_that_fails_closes_admission_and_lets_nobody_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fdatasync(fd: int) -> None:
        time.sleep(0.002)
        raise OSError(errno.EIO, "Input/output error")

    journal = opened(tmp_path / "j", fsync="always")
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    await asyncio.gather(*(later(journal, number) for number in range(20)))
    with pytest.raises(StoreUnavailable):
        journal.require_room()
    await journal.close()
    assert len(read(tmp_path / "j")) == 20


async def test_what_control_has_not_read_counts_until_it_has(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j", bytes_max=200)
    number = 0
    with pytest.raises(Overloaded):
        while True:
            await appended(journal, number)
            number += 1
            journal.require_room()
    journal.committed("edge-0-a.1", journal.pending_bytes)
    journal.require_room()
    assert journal.pending_bytes == 0
    journal.committed("edge-0-other.1", 10**6)  # of another life
    assert journal.pending_bytes == 0
    await journal.close()


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def run() -> None:
        with pytest.raises(OSError):
            opened(tmp_path / "file" / "j")

    asyncio.run(run())
