"""More than can be done is offered: what can be is done, and the rest is refused readably (OVL-01)."""

from __future__ import annotations

import os

import pytest

from bench import overload

SECONDS = 6.0  # of each offer; OVL_01_SECONDS=20 is the whole length
TRIES = 3  # neighbours on a shared machine spoil one now and then, a gateway that breaks its promise all


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="gateway and load need a core each")
async def test_ovl_01_goodput_and_latency_hold_at_five_times_the_capacity() -> None:
    wish = overload.arguments(["--seconds", os.environ.get("OVL_01_SECONDS", str(SECONDS))])
    allowed = os.sched_getaffinity(0)
    try:
        for _ in range(TRIES):
            found = await overload.measure(wish)
            lacking = overload.lacking(found)
            print(overload.table(found), *lacking, sep="\n")
            for offer in found.offers:  # these have one chance
                assert (offer.bare, offer.broken) == (0, 0), offer
                assert set(offer.statuses) <= {"200", "429", "503"}
            assert found.offers[-1].refused_per_s > found.offers[-1].goodput_per_s  # it was offered far more than it can do
            if not lacking:
                break
    finally:
        os.sched_setaffinity(0, allowed)
    assert not lacking
    if late := overload.late(found):
        # A turn may begin thirty requests that take a second of the loop when they end, all in the same moment.
        pytest.xfail("; ".join(late))
