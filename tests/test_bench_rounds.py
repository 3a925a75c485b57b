"""A long bench loses nothing: not by a peer that dies, not by an interruption."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

import msgspec
import pytest

from bench.proxies import free_port
from bench.rounds import Result, Rounds
from bench.subjects import Place, Subject


class Prepared(Rounds):
    """Rounds whose subjects are the provider itself under several names; those named "dead" have ended meanwhile."""

    async def _admit(self, name: str, place: Place) -> None:
        port, pid = (free_port(), 2**22 + 1) if name.startswith("dead") else (place.upstream_url.rpartition(":")[2], place.provider_pid)
        self.subjects.append(Subject(name=name.removeprefix("dead "), url=f"http://127.0.0.1:{port}/v1/chat/completions", pid=pid))


def wished(*names: str, rounds: int = 1, minutes_max: float = 9.0) -> argparse.Namespace:
    return argparse.Namespace(
        only=list(names), rounds=rounds, seconds=1, paced=2, wide=False, open=True, load="python", minutes_max=minutes_max
    )


async def test_a_peer_that_dies_is_reported_and_the_others_are_measured(tmp_path: Path) -> None:
    rounds = Prepared(wished("dead nginx", "haproxy"), tmp_path, (None, None))
    await rounds.run()
    assert {sample.subject for sample in rounds.samples} == {"haproxy"}
    assert [sample.kind for sample in rounds.samples] == ["json", "burst", "paced", "open"]
    assert list(rounds.unavailable) == ["nginx from here on"] and rounds.unavailable["nginx from here on"]
    assert [subject.name for subject in rounds.subjects] == ["haproxy"]


async def test_our_own_death_is_no_result(tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, OSError, ExceptionGroup)):
        await Prepared(wished("dead gateway", "haproxy"), tmp_path, (None, None)).run()


async def test_no_round_begins_that_would_not_end_in_time(tmp_path: Path) -> None:
    rounds = Prepared(wished("haproxy", rounds=5, minutes_max=0.0), tmp_path, (None, None))
    await rounds.run()
    assert rounds.finished == 1  # one there is always
    assert {sample.round for sample in rounds.samples} == {1}


async def test_what_was_measured_before_an_interruption_is_written(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "bench.hotpath", "--only", "direct", "--rounds", "100", "--seconds", "1", "--paced", "0"]
    command += ["--load", "python", "--out", str(out)]
    process = await asyncio.create_subprocess_exec(*command, env=os.environ, stderr=asyncio.subprocess.PIPE, start_new_session=True)
    assert process.stderr is not None
    async with asyncio.timeout(60):
        while b"round 2" not in (line := await process.stderr.readline()):
            assert line, "it ended by itself"
        process.send_signal(signal.SIGINT)
        said, _ = await asyncio.gather(process.stderr.read(), process.wait())
    assert process.returncode == 130
    result = msgspec.json.decode(out.read_bytes(), type=Result)
    assert result.rounds >= 1 and len(result.samples) >= 3
    assert str(out).encode() in said and b"Traceback" not in said
