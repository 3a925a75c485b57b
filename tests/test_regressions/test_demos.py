"""A second demo failed, and one that was killed left its processes, so that no demo started any more."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from bench import demo
from tests.conftest import REPOSITORY, fetch

START_S_MAX = 60.0  # four processes, on a machine that does much else
END_S_MAX = 20.0  # as long as the drain of a demo at the most


class Demo:
    """`python -m bench.demo`, once it has said all that it says."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.demo"], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        hung = threading.Timer(START_S_MAX, self.process.kill)
        hung.start()
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith("Ctrl-C"):
                break
        hung.cancel()
        self.said = "".join(lines)
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def field(self, name: str) -> str:
        found = re.search(rf"^{name} +(\S+)", self.said, re.MULTILINE)
        assert found, self.said
        return found[1]

    def serves(self) -> bool:
        status, body = fetch(f"{self.field('base URL')}/key", headers={"Authorization": f"Bearer {self.field('key')}"})
        return status == 200 and self.field("key")[-3:].encode() in body

    def end(self, number: signal.Signals) -> None:
        """By this signal, and then none of its processes is left."""
        self.process.send_signal(number)
        self.process.wait(END_S_MAX)
        _, left = psutil.wait_procs(self.children, END_S_MAX)
        assert not left

    def close(self) -> None:
        for process in (self.process, *self.children):
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                process.kill()
        self.process.wait(END_S_MAX)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def demos() -> Iterator[list[Demo]]:
    started: list[Demo] = []
    yield started
    for each in started:
        each.close()


def test_two_demos_run_beside_each_other_and_one_that_is_killed_leaves_nothing(demos: list[Demo]) -> None:
    demos += [Demo(), Demo()]
    first, second = demos
    assert first.serves() and second.serves()
    folders = {Path(each.field("logs")).parent for each in demos}
    assert len(folders) == 2 and folders <= set(demo.STATES)
    first.end(signal.SIGKILL)
    demos.append(Demo())  # in the folder of the first
    assert demos[2].serves() and second.serves() and Path(demos[2].field("logs")).parent == Path(first.field("logs")).parent
    for each in demos[1:]:
        each.end(signal.SIGINT)
        assert each.process.returncode == 0


def test_a_folder_is_taken_by_one_demo_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STATES", [tmp_path / "a", tmp_path / "b"])
    with demo.free_state() as (first, lock), demo.free_state() as (second, _):
        assert (first, second) == (tmp_path / "a", tmp_path / "b") and os.fstat(lock).st_ino
        with pytest.raises(demo.DemoError, match="2 demos run already"), demo.free_state():
            pass
    with demo.free_state() as (again, _):
        assert again == first
