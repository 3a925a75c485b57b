"""Child processes of a bench: pinned to a core, waited for until ready, their CPU counted, ended by their own pid."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]

READY_S_MAX = 30.0
END_S_MAX = 10.0
_PR_SET_PDEATHSIG = 1


class ChildFailed(RuntimeError):
    """A child did not start; the message ends with its last lines on stderr."""


def pin(core: int | None) -> Callable[[], None] | None:
    """What a child does before exec to stay on that core; None: nothing."""
    return None if core is None else lambda: os.sched_setaffinity(0, {core})


def bound(core: int | None) -> Callable[[], None]:
    """The same, and it ends when its parent does, were it by SIGKILL (on Linux)."""
    parent, prctl, pinned = os.getpid(), getattr(ctypes.CDLL(None), "prctl", None), pin(core)

    def prepare() -> None:
        if pinned is not None:
            pinned()
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # which died in between
                os._exit(1)

    return prepare


@asynccontextmanager
async def child(
    command: Sequence[str | Path],
    *,
    core: int | None,
    log: Path,
    environ: Mapping[str, str] | None = None,
    stdout_to_log: bool = False,
    keep: Sequence[int] = (),
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs a process; on leaving, or when this process dies, it gets SIGTERM, and on leaving SIGKILL when it has not ended by
    END_S_MAX. stderr goes to `log`; stdout too where nobody reads it: a full pipe would stop the child. `keep`: descriptors that
    it inherits.
    """
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *map(str, command),
            stdout=stderr if stdout_to_log else asyncio.subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, **(environ or {})},
            preexec_fn=bound(core),
            pass_fds=keep,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(END_S_MAX):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def ready_url(process: asyncio.subprocess.Process, log: Path) -> str:
    """The URL of the line `ready URL` on the child's stdout. Raises ChildFailed."""
    assert process.stdout is not None
    try:
        async with asyncio.timeout(READY_S_MAX):
            line = (await process.stdout.readline()).decode().split()
    except TimeoutError:
        line = []
    if len(line) != 2 or line[0] != "ready":
        raise ChildFailed(f"no ready line; stderr ends with: {log.read_text(errors='replace')[-2000:]}")
    return line[1]


async def output_of(command: Sequence[str | Path], *, environ: Mapping[str, str] | None = None, timeout_s: float = 60.0) -> str:
    """stdout of a command that ends by itself. Raises ChildFailed when it fails, TimeoutError when it does not end."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **(environ or {})},
    )
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise ChildFailed(f"{command[0]} ended with {process.returncode}: {stderr.decode(errors='replace')[-2000:]}")
    return stdout.decode()


def cpu_by_process(pid: int) -> dict[str, float]:
    """CPU seconds used so far by a process and its living descendants, by `name_of`."""
    used: dict[str, float] = {}
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            name = name_of(process)
            used[name] = used.get(name, 0.0) + _own_cpu_seconds(process.pid)
    return used


def name_of(process: psutil.Process) -> str:
    """The module of `python -m`, else the program."""
    words: list[str] = process.cmdline()
    return words[words.index("-m") + 1] if "-m" in words[:-1] else str(process.name())


def _own_cpu_seconds(pid: int) -> float:
    """All threads, to the nanosecond where the kernel tells."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
    except OSError:  # no scheduler statistics in this kernel: clock ticks
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
