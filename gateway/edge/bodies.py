"""How many bytes of requests an edge holds: a body that came in pieces stays until its request is answered, for another provider
may need it.

One body is bounded by `body_bytes_max`, all of them together by a share of the memory there is. Without that a few hundred callers,
with or without a key, could take all of it.
"""

from __future__ import annotations

import os
from pathlib import Path

from gateway.settings import Server

MEMORY_SHARE = 4  # a quarter for all edges: put together and sent on, a body is there up to three times
BODIES_MIN = 2  # of the largest size, however small the machine


class Bodies:
    """Counts bytes held, up to `bytes_max`."""

    __slots__ = ("bytes_max", "held")

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.held = 0

    def __repr__(self) -> str:
        return f"<Bodies {self.held}/{self.bytes_max}>"

    def take(self, size: int) -> bool:
        """Whether there is room for so many more bytes; then they are held until `give_back`."""
        if self.held + size > self.bytes_max:
            return False
        self.held += size
        return True

    def give_back(self, size: int) -> None:
        self.held -= size
        assert self.held >= 0


def bodies_of(settings: Server, edges: int) -> Bodies:
    """For one of so many edges."""
    wanted = settings.bodies_bytes_max or memory_bytes() // MEMORY_SHARE
    return Bodies(max(BODIES_MIN * settings.body_bytes_max, wanted // edges))


def memory_bytes() -> int:
    """What this machine has, or this process's control group may have of it, if that is less."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in limits():
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # not "max"
            found.append(int(text))
    return min(found)


def limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """The files that may hold a limit: of this group and of all above it, in either version of control groups."""
    files = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        group = folder / path.lstrip("/")
        files += [each / name for each in (group, *group.parents) if each == folder or folder in each.parents]
    return files
