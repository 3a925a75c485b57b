"""One seed, or many over some processes, and what they came to."""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import random
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

import msgspec

from tests.simulation.machine import Failed, Machine
from tests.simulation.world import STARTS, STEPS, World

CHUNK = 20


class Outcome(msgspec.Struct, frozen=True):
    """How a seed went; raised as Failed when it did not go well."""

    seed: int
    hash: str
    served: int
    refused: int
    kills: int
    virtual_s: float


def simulate(seed: int, *, steps: int = STEPS, lines: bool = False) -> Outcome:
    """Run one seed. Raises Failed, with the seed in its words."""
    chance = random.Random(f"world {seed}")
    machine = Machine(seed, wall_s=chance.choice(STARTS), lines=lines)
    with machine.running():
        world = World(seed, machine, chance)
        try:
            machine.loop.run_until_complete(world.run(steps))
        except (Exception, asyncio.CancelledError) as error:
            raise Failed(
                f"seed {seed}: {error or repr(error)}\n  again, with every event: python -m tests.simulation --seed {seed} --lines"
            ) from error
        finally:
            world.end()
        return Outcome(seed, machine.trace.hash, len(world.promises.expected), world.refusals, world.kills, machine.loop.time() - 1000)


class Result(msgspec.Struct, frozen=True):
    failures: list[str]  # each with the command that shows it again
    served: int
    refused: int
    kills: int
    virtual_s: float
    hash: str  # of all seeds: the same wherever and however often they are run


def run(seeds: Iterable[int], *, steps: int = STEPS, processes: int = 1) -> Result:
    jobs = [(seed, steps) for seed in seeds]
    if processes > 1:
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(_one, jobs, chunksize=CHUNK))
    else:
        results = [_one(job) for job in jobs]
    outcomes = [each for each in results if isinstance(each, Outcome)]
    return Result(
        failures=[each for each in results if isinstance(each, str)],
        served=sum(each.served for each in outcomes),
        refused=sum(each.refused for each in outcomes),
        kills=sum(each.kills for each in outcomes),
        virtual_s=sum(each.virtual_s for each in outcomes),
        hash=hashlib.blake2b("".join(each.hash for each in outcomes).encode(), digest_size=8).hexdigest(),
    )


def _one(job: tuple[int, int]) -> Outcome | str:
    seed, steps = job
    try:
        return simulate(seed, steps=steps)
    except Failed as failure:
        return str(failure)
