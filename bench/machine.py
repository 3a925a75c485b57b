"""What a result must say about where it was measured."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import msgspec

from bench.children import ChildFailed, output_of

PACKAGES = ("aiohttp", "uvloop", "msgspec")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    cpu: str
    cores: int
    subject_core: int | None
    load_core: int | None
    kernel: str
    python: str
    packages: dict[str, str]
    commit: str  # "" where there is none; "-dirty" when files differ from it
    load_average_1m: float  # at the end: noise of neighbours shows here


async def describe_machine(cores: tuple[int | None, int | None]) -> Machine:
    return Machine(
        cpu=_cpu(),
        cores=os.cpu_count() or 1,
        subject_core=cores[0],
        load_core=cores[1],
        kernel=platform.release(),
        python=platform.python_version(),
        packages={name: metadata.version(name) for name in PACKAGES},
        commit=await _commit(),
        load_average_1m=round(os.getloadavg()[0], 2),
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


async def _commit() -> str:
    folder = str(Path(__file__).parent)
    try:
        commit = (await output_of(["git", "-C", folder, "rev-parse", "--short", "HEAD"])).strip()
        changes = await output_of(["git", "-C", folder, "status", "--porcelain", "--untracked-files=no"])
    except (ChildFailed, OSError):
        return ""
    return commit + ("-dirty" if changes.strip() else "")
