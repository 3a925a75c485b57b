"""The hot path: the gateway with everything on, and with off what settings can turn off, against Envoy as a plain proxy.

    python -m bench.hotpath [--seconds 5] [--rounds 3] [--paced 100] [--wide] [--open] [--only direct,envoy,gateway,gateway-off]

Any error makes the exit status 1. bench/README.md tells the method and its limits.
"""

from __future__ import annotations

import sys

import uvloop

from bench.rounds import OFF, arguments_of, run_rounds
from bench.summary import table

SUBJECTS = ("direct", "envoy", "gateway", OFF)


def main() -> int:
    wish = arguments_of("hotpath", SUBJECTS, SUBJECTS, seconds=5, rounds=3)
    result = uvloop.run(run_rounds(wish))
    print(table(result.samples))
    print(f"\n{wish.out}")
    return 1 if any(sample.errors for sample in result.samples) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
