"""The lock that makes one process the only one with a store open.

A lock on a file beside the database, held for life and released by the kernel with the process, however it ends.
SQLite's own locks do not do this: they let a second writer in between two transactions, and versions before 3.51.3
can corrupt the log when two connections of different processes checkpoint at once.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from gateway.control.store import StoreLocked


class StoreLock:
    """`acquire()` or StoreLocked; the file itself stays, since removing it would let two holders in."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def acquire(self) -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise StoreLocked(f"{self._path.name} is held by another process: this store is open already") from None
        self._fd = fd

    def release(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
