"""Mixed load with hang-ups and failing providers, in short: nothing is left, nothing grows, and ledger and books agree (OPS-10)."""

from __future__ import annotations

import argparse

import pytest

from bench import soak

MINUTES = 0.5
CALLERS = 16


@pytest.mark.soak
@pytest.mark.timeout(300)
async def test_ops_10_mixed_load_leaves_nothing_and_its_money_is_that_of_the_books() -> None:
    found = await soak.run(argparse.Namespace(minutes=MINUTES, callers=CALLERS))
    print(soak.show(found))
    assert soak.broken_promises(found) == []
    assert found.answers["hung up"] > 0 and found.answers["502"] > 0
    assert found.booked >= found.answers["200"] > 0
    assert min(each.tasks for each in found.looks) > 0
