"""The runtime directory of a gateway: where its processes find each other's unix sockets.

Socket paths over 107 bytes do not fit into a unix address; for those the directory is named by a file descriptor
(`/proc/self/fd/N/link.sock`), which the kernel resolves to the same file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

LINK = "link.sock"  # edge <-> control messages
PUBLIC = "public.sock"  # HTTP relayed for callers
ADMIN = "admin.sock"  # HTTP for the command line and the supervisor: never reachable by callers
LOCK = "supervisor.lock"

UNIX_PATH_BYTES_MAX = 107


class RuntimeDir:
    """Makes the directory (mode 0700) and gives addresses in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)
        self._fd: int | None = None

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Makes this process the directory's supervisor. Raises BlockingIOError when another one is, OSError.

        Two gateways in one directory would join each other's edges, and take each other's sockets away.
        """
        fd = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(fd)  # the file stays: removing it would let two owners in

    def socket(self, name: str) -> str:
        """An address usable for bind and connect in this process."""
        plain = str(self.path / name)
        if len(os.fsencode(plain)) <= UNIX_PATH_BYTES_MAX:
            return plain
        if self._fd is None:
            self._fd = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._fd}/{name}"
