"""The runtime directory of a gateway: where its processes find each other's unix sockets.

Socket paths over 107 bytes do not fit into a unix address; for those the directory is named by a file descriptor
(`/proc/self/fd/N/link.sock`), which the kernel resolves to the same file.
"""

from __future__ import annotations

import os
from pathlib import Path

LINK = "link.sock"  # edge <-> control messages
PUBLIC = "public.sock"  # HTTP relayed for callers
ADMIN = "admin.sock"  # HTTP for the command line and the supervisor: never reachable by callers

UNIX_PATH_BYTES_MAX = 107


class RuntimeDir:
    """Makes the directory (mode 0700) and gives addresses in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)
        self._fd: int | None = None

    def socket(self, name: str) -> str:
        """An address usable for bind and connect in this process."""
        plain = str(self.path / name)
        if len(os.fsencode(plain)) <= UNIX_PATH_BYTES_MAX:
            return plain
        if self._fd is None:
            self._fd = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._fd}/{name}"
