"""The folder of journal files: which there are, what of them is unread, whose writer is dead. Blocking calls; no books.

A file is `edge-<slot>-<incarnation>.<n>`, written by one edge, which holds an exclusive lock on its newest file for its
life. It is closed (nothing will be appended) once the same edge has a newer one, or its writer is dead: the lock is free,
and control has no link to it. An edge has its first file before it joins, and its files go only after it is dead, but
for those that a newer one follows: an edge without files is dead, or has never admitted anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from gateway.wire import records

CORRUPT_FOLDER = "corrupt"  # ends of files that hold no records, kept for a person to look at
NEWBORN_S = 1.0  # an empty file this young may be between its making and its lock: asking for the lock could take it away
READ_BYTES = 64 * 1024

_NAME = re.compile(r"edge-(\d+)-(.+)\.(\d+)")


class JournalFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file as it was when looked at."""

    name: str
    incarnation: str
    number: int
    size: int  # bytes
    closed: bool
    abandoned: bool  # closed because its writer is dead


class Journals:
    """Looks into `folder`. `is_joined` says whether an edge is linked to control now."""

    def __init__(self, folder: Path, *, is_joined: Callable[[str], bool]) -> None:
        self._folder = folder
        self._is_joined = is_joined

    def files(self) -> list[JournalFile]:
        """All files, those of one edge in the order they were written. Raises OSError."""
        found: dict[str, list[tuple[int, str]]] = {}
        with contextlib.suppress(FileNotFoundError):  # no edge has made it yet
            for entry in os.scandir(self._folder):
                match = _NAME.fullmatch(entry.name)
                if match is not None:
                    found.setdefault(match[2], []).append((int(match[3]), entry.name))
        return [file for incarnation, names in sorted(found.items()) for file in self._of_one(incarnation, sorted(names))]

    def _of_one(self, incarnation: str, names: list[tuple[int, str]]) -> Iterator[JournalFile]:
        newest = names[-1]
        # First whether it is dead, then how long its files are: the other way round it could write in between.
        abandoned = not self._is_joined(incarnation) and self._is_unlocked(newest[1])
        for number, name in names:
            yield JournalFile(
                name=name,
                incarnation=incarnation,
                number=number,
                size=(self._folder / name).stat().st_size,
                closed=abandoned or (number, name) != newest,
                abandoned=abandoned,
            )

    def read(self, file: JournalFile, start: int, *, bytes_max: int, records_max: int) -> records.Run:
        """Records from byte `start` on; at least one if there is a whole one. Raises OSError."""
        data = self._bytes(file.name, start, min(bytes_max, file.size - start))
        run = records.split(data, records_max)
        if run.consumed == 0 and not run.unreadable and len(data) < file.size - start:
            data = self._bytes(file.name, start, min(records.HEADER.size + records.RECORD_BYTES_MAX, file.size - start))
            run = records.split(data, records_max)
        return run

    def count(self, file: JournalFile, start: int, *, bytes_max: int) -> tuple[int, int]:
        """How many whole records begin at byte `start`, and where they end; looks at `bytes_max` at most. Raises OSError."""
        count, at, end = 0, start, min(file.size, start + bytes_max)
        window, window_at = b"", start
        while at + records.HEADER.size <= end:
            if at + records.HEADER.size > window_at + len(window):
                window, window_at = self._bytes(file.name, at, READ_BYTES), at
                if len(window) < records.HEADER.size:
                    break
            length, _ = records.HEADER.unpack_from(window, at - window_at)
            if not 0 < length <= records.RECORD_BYTES_MAX or at + records.HEADER.size + length > file.size:
                break
            at += records.HEADER.size + length
            count += 1
        return count, at

    def keep_torn(self, file: JournalFile, start: int) -> None:
        """Copy the end of a file, from byte `start`, to the folder of corrupt ends, durably. Raises OSError."""
        folder = self._folder / CORRUPT_FOLDER
        folder.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(folder / f"{file.name}.{start}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as kept:
            for at in range(start, file.size, records.RECORD_BYTES_MAX):
                kept.write(self._bytes(file.name, at, min(records.RECORD_BYTES_MAX, file.size - at)))
            kept.flush()
            os.fsync(fd)

    def running(self, file: JournalFile) -> list[bytes]:
        """The marks that the writer of this file left of streams that died with it, as records. Raises OSError."""
        try:
            data = (self._folder / _running_beside(file.name)).read_bytes()
        except FileNotFoundError:
            return []
        return records.split(data, len(data)).records

    def forget_running(self, file: JournalFile) -> None:
        """Raises OSError."""
        marks = self._folder / _running_beside(file.name)
        marks.unlink(missing_ok=True)
        marks.with_name(f".{marks.name}").unlink(missing_ok=True)  # the writer may have died over it

    def remove(self, names: Iterable[str]) -> None:
        """Raises OSError."""
        for name in names:
            (self._folder / name).unlink(missing_ok=True)

    def _bytes(self, name: str, start: int, length: int) -> bytes:
        fd = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, length, start)
        finally:
            os.close(fd)

    def _is_unlocked(self, name: str) -> bool:
        """Whether nobody holds the file's lock. The kernel frees it when its holder dies, however it dies."""
        fd = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if status.st_size == 0 and time.time() - status.st_ctime < NEWBORN_S:
                return False
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True


def _running_beside(name: str) -> str:
    match = _NAME.fullmatch(name)
    assert match is not None
    return records.running_name(int(match[1]), match[2])
