"""`python -m tests.simulation [--seeds N] [--first N] [--steps N] [--processes N]`, or one seed again: `--seed N [--lines]`."""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.runs import run, simulate
from tests.simulation.world import STEPS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description="The money core on virtual time.")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--lines", action="store_true", help="print every event of it")
    options = parser.parse_args()
    if options.seed is not None:
        print(simulate(options.seed, steps=options.steps, lines=options.lines))
        return 0
    began_s = time.monotonic()
    result = run(range(options.first, options.first + options.seeds), steps=options.steps, processes=options.processes)
    print(*result.failures[:10], sep="\n")
    print(
        f"seeds {options.first}..{options.first + options.seeds - 1}: {len(result.failures)} failed, {result.served} served, "
        f"{result.refused} refused, {result.kills} kills, {result.virtual_s:.0f} virtual s in {time.monotonic() - began_s:.1f} s, "
        f"hash {result.hash}"
    )
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
