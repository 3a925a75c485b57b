"""LED-16: the money core is simulated, not only tested; and the simulator finds what it is for."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.simulation.machine import Failed
from tests.simulation.planted import MISTAKES
from tests.simulation.runs import run, simulate

SEEDS, FRESH = 80, 40
SOAK_SEEDS = 2000
SOAK_S = 60.0
SEARCH = 120  # seeds within which a planted mistake must be found; most are at once


def test_led_16_no_seed_breaks_a_promise() -> None:
    fresh = random.SystemRandom().randrange(10**6, 10**9)  # printed with its failure
    result = run([*range(1, SEEDS + 1), *range(fresh, fresh + FRESH)])
    assert not result.failures, "\n".join(result.failures)
    assert result.served > 10 * SEEDS and result.refused > SEEDS and result.kills > SEEDS


def test_led_16_one_seed_is_one_history_in_every_process() -> None:
    said = []
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-m", "tests.simulation", "--seeds", "12", "--processes", "1"]
        done = subprocess.run(
            command, cwd=REPOSITORY, env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, timeout=60, check=True
        )
        said.append(done.stdout.rpartition("hash ")[2])
    assert said[0] == said[1] and len(said[0].strip()) == 16


@pytest.mark.parametrize("name", MISTAKES)
def test_the_simulator_finds_a_planted_mistake(name: str) -> None:
    with MISTAKES[name]():
        for seed in range(1, SEARCH + 1):
            try:
                simulate(seed)
            except Failed as failure:
                assert f"--seed {seed}" in str(failure)
                return
    pytest.fail(f"{SEARCH} seeds, and nobody noticed")


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_led_16_two_thousand_fresh_seeds_in_a_minute_of_two_cores() -> None:
    fresh = random.SystemRandom().randrange(10**6, 10**9)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run(range(fresh, fresh + SOAK_SEEDS), processes=2)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"seeds from {fresh}: {result.served} served, {result.refused} refused, {result.kills} kills, {cpu_s:.0f} s of CPU")
    assert not result.failures, "\n".join(result.failures)
    assert cpu_s <= 2 * SOAK_S
