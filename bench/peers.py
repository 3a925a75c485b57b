"""The gateway with everything on against what people use today: same load, same run, one core each in turn.

    python -m bench.peers [--seconds 3] [--rounds 3] [--only direct,envoy,nginx,haproxy,vllm-router,portkey,litellm,gateway]

Prints the peers' versions, medians and ranges, and the gateway's ratio to each; writes JSON and, beside it, a chart. A peer that
cannot be had, or that answers wrongly, is reported with the reason and left out.
"""

from __future__ import annotations

import sys

import uvloop

from bench.chart import bars
from bench.rounds import arguments_of, run_rounds
from bench.subjects import ALL
from bench.summary import ratio_table, ratios, table


def main() -> int:
    wish = arguments_of("peers", ALL, ALL, seconds=3, rounds=3)
    result = uvloop.run(run_rounds(wish))
    print(table(result.samples))
    print("\n" + ratio_table(result.samples))
    print("\n" + "\n".join(f"{name} {version}" for name, version in result.versions.items() if version))
    for name, why in result.unavailable.items():
        print(f"without {name}: {why}")
    chart = wish.out.with_suffix(".svg")
    chart.write_text(bars("The gateway with everything on, times each peer (requests/s; log scale)", ratios(result.samples)))
    print(f"\n{wish.out}\n{chart}")
    return 1 if any(sample.errors for sample in result.samples if sample.subject == "gateway") else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
