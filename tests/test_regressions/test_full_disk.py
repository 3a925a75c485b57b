"""A disk that is full for a while: nothing is served that cannot be recorded, and nothing that was served is forgotten."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from gateway.domain.errors import StoreUnavailable
from gateway.domain.generation import Generation, decode
from gateway.edge.journal import Fsync, Journal
from gateway.log import Log
from gateway.wire import records


def opened(folder: Path, fsync: Fsync) -> Journal:
    journal = Journal(
        folder, slot=0, incarnation="a", fsync=fsync, fsync_s=0.01, bytes_max=10**9, on_appended=lambda: None, log=Log("test", fd=-1)
    )
    journal.open()
    return journal


async def append(journal: Journal, *names: str) -> None:
    """Returns when their last bytes may leave."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    made = [Generation(id=name, account_id="user_ann", key_digest="abc", created_at_ms=1, model="a/b", charged_nanos=1) for name in names]
    journal.append([records.encode(each) for each in made], lambda: done.set_result(None))
    async with asyncio.timeout(5.0):
        await done


def recorded(folder: Path) -> list[str]:
    """Ids in all files, each of which ends with a whole record."""
    found = []
    for path in sorted(folder.iterdir()):
        run = records.split(data := path.read_bytes(), records_max=10_000)
        assert run.consumed == len(data) and not run.corrupt
        found += [decode(each).id for each in run.records]
    return found


@pytest.mark.parametrize("fsync", ["always", "batch", "never"])
@pytest.mark.parametrize("room_records", [0.0, 0.5, 1.0, 1.5, 2.99])
async def test_what_was_served_when_the_disk_filled_up_is_recorded_once_it_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: Fsync, room_records: float
) -> None:
    journal = opened(tmp_path / "j", fsync)
    await append(journal, "a")
    size = (tmp_path / "j" / "edge-0-a.1").stat().st_size
    left = int(size * room_records)
    real = os.write

    def write(fd: int, data: bytes) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(fd, data[:left])
        left -= written
        return written

    monkeypatch.setattr(os, "write", write)
    await append(journal, "b", "c", "d")
    await append(journal, "e")
    for _ in range(3):
        journal.retry()
        assert journal.failed
        with pytest.raises(StoreUnavailable):
            journal.require_room()
    monkeypatch.undo()
    journal.retry()
    journal.require_room()
    await append(journal, "f")
    await journal.close()
    assert recorded(tmp_path / "j") == ["a", "b", "c", "d", "e", "f"]


async def test_after_a_sync_that_failed_a_new_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fdatasync(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    journal = opened(tmp_path / "j", "always")
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    await append(journal, "a")
    assert journal.failed
    monkeypatch.undo()
    journal.retry()
    journal.require_room()
    await append(journal, "b")
    await journal.close()
    assert recorded(tmp_path / "j") == ["a", "b"]
    assert len(list((tmp_path / "j").iterdir())) == 2
