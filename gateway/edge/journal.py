"""This edge's journal: one record per finished exchange, appended before the caller's last byte leaves.

`write` alone survives the death of every process of ours; how soon the disk has it is `[journal] fsync`. A lock on the
file tells control that this edge lives: the kernel gives it back when the edge dies, however it dies. A failed write
or sync closes the journal, and with it admission: nothing is served that could be forgotten. What was served already
and could not be written waits in memory; once a second a new file is tried, and gets it first.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from gateway.domain.errors import Overloaded, StoreUnavailable
from gateway.log import Log

ROTATE_BYTES = 64 * 1024 * 1024

Fsync = Literal["batch", "always", "never"]


class Journal:
    """Appends framed records to `edge-<slot>-<incarnation>.<n>` in `folder`. `on_appended` is called after each append."""

    def __init__(
        self,
        folder: Path,
        *,
        slot: int,
        incarnation: str,
        fsync: Fsync,
        fsync_s: float,
        bytes_max: int,
        on_appended: Callable[[], None],
        log: Log,
    ) -> None:
        self._folder = folder
        self._stem = f"edge-{slot}-{incarnation}"
        self._number = 0
        self._fsync = fsync
        self._fsync_s = fsync_s
        self._bytes_max = bytes_max
        self._on_appended = on_appended
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._fd = -1
        self._sizes: dict[int, int] = {}  # bytes per file, from the one that control is reading to the one being written
        self._failed = False
        self._unwritten: list[bytes] = []  # records of what was served before the failure was known
        self._unsynced: list[Callable[[], None]] = []
        self._sync: asyncio.Future[None] | None = None
        self._dirty = False
        self.pending_bytes = 0

    def __repr__(self) -> str:
        return f"<Journal {self._stem}.{self._number} pending {self.pending_bytes} bytes{' failed' if self._failed else ''}>"

    def open(self) -> None:
        """Make the first file. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._open_next()

    def require_room(self) -> None:
        """Admission asks first. Raises StoreUnavailable (a write failed) or Overloaded (control is too far behind)."""
        if self._failed:
            raise StoreUnavailable("charges cannot be recorded now; try again later", retry_after_s=5.0)
        if self.pending_bytes > self._bytes_max:
            raise Overloaded("too many charges wait to be recorded; try again shortly", retry_after_s=1.0)

    def append(self, batch: list[bytes], then: Callable[[], None]) -> None:
        """Write these records, then call `then`; with `fsync = "always"` after their sync."""
        left = self._write(batch)
        self._unwritten += left
        if self._fsync == "always" and not left:
            self._unsynced.append(then)
        else:
            # When there is some left: these answers were made and paid for, and it is not the callers' fault that we cannot note them.
            then()

    def _write(self, batch: list[bytes]) -> list[bytes]:
        """Append these records; what remains of them when the journal failed over it."""
        data = b"".join(batch)
        try:
            if self._sizes[self._number] + len(data) > ROTATE_BYTES:
                self._open_next()
            written = os.write(self._fd, data)
            if written != len(data):
                self._fail(OSError(errno.ENOSPC, "short write"))
        except OSError as error:
            written = 0
            self._fail(error)
        left: list[bytes] = []
        whole = written
        if written < len(data):
            left, whole = list(batch), 0
            while whole + len(left[0]) <= written:
                whole += len(left.pop(0))
            if written > whole:  # cut off the begun record: what is there stays readable to its end
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self._sizes[self._number] + whole)
        if whole:
            self._sizes[self._number] += whole
            self.pending_bytes += whole
            self._dirty = True
            if self._fsync != "never":
                self._sync_soon(0.0 if self._fsync == "always" else self._fsync_s)
            self._on_appended()
        return left

    @property
    def failed(self) -> bool:
        return self._failed

    def retry(self) -> None:
        """After a failure, once a second: a new file, and what waits in memory goes first."""
        if not self._failed:
            return
        try:
            if self._sizes[self._number]:
                self._open_next()
        except OSError:
            return
        waiting = len(self._unwritten)
        if waiting:
            self._unwritten = self._write(self._unwritten)
        if not self._unwritten:
            self._failed = False
            self._log.info("journal_recovered", records=waiting)

    def committed(self, file: str, offset: int) -> None:
        """Control has everything of `file` up to `offset` in the store."""
        stem, _, number = file.rpartition(".")
        if stem != self._stem:
            return
        for read in [each for each in self._sizes if each < int(number)]:
            del self._sizes[read]
        self.pending_bytes = sum(self._sizes.values()) - offset
        assert self.pending_bytes >= 0

    async def close(self) -> None:
        """Sync what is there and give the lock back."""
        while self._sync is not None:
            await asyncio.wait((self._sync,))
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            if not self._failed and self._fsync != "never":
                await asyncio.to_thread(os.fdatasync, fd)
            os.close(fd)

    def _open_next(self) -> None:
        path = self._folder / f"{self._stem}.{self._number + 1}"
        unnamed = self._folder / f".{path.name}"
        fd = os.open(unnamed, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unnamed.rename(path)  # control must never see it without the lock: it would take us for dead
        except OSError:
            os.close(fd)
            raise
        old, self._fd = self._fd, fd
        self._number += 1
        self._sizes[self._number] = 0
        if old >= 0:
            try:
                os.fdatasync(old)
            except OSError as error:
                self._fail(error)
            finally:
                os.close(old)

    def _sync_soon(self, delay_s: float) -> None:
        if self._sync is None:
            self._sync = self._loop.create_task(self._sync_after(delay_s))

    async def _sync_after(self, delay_s: float) -> None:
        try:
            if delay_s:
                await asyncio.sleep(delay_s)  # the group's window
            self._dirty = False
            waiting, self._unsynced = self._unsynced, []
            try:
                fd = os.dup(self._fd)  # its own: a new file may take the old one's place while the disk is busy
                try:
                    await asyncio.to_thread(os.fdatasync, fd)
                finally:
                    os.close(fd)
            except OSError as error:
                self._fail(error)
            for then in waiting:
                then()
        finally:
            self._sync = None
            if self._dirty:  # appended while the disk was busy: the next group, and after a failure too, for callers wait
                self._sync_soon(delay_s)

    def _fail(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            self._log.error("journal_failed", errno=error.errno, reason=error.strerror)
