"""What hedges may cost, and that none is begun without a budget: of money, of attempts, of retries."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from bench.behaviour import Behaviour
from tests.edge.hedges import (
    FREE,
    RAW,
    SIM,
    WARM_UP,
    counted,
    healthy,
    hedged,
    opened,
    outcomes,
    settled,
    warm,
)
from tests.edge.stage import Answered, RawCall, Stage, behaving

pytestmark = pytest.mark.asyncio

LONG = [{"role": "user", "content": "word " * 800}]
SHARE = 0.05


async def one_in_five_is_slow(stage: Stage, model: str, requests: int) -> list[Answered]:
    number = 0

    async def script(call: RawCall) -> None:
        nonlocal number
        number += 1
        if number % 5 == 0:
            await asyncio.sleep(0.4)
        await healthy(call)

    stage.raw.script = script
    places = asyncio.Semaphore(10)

    async def one() -> Answered:
        async with places:
            return await stage.ask(model, stream=True, messages=LONG, max_tokens=200)

    return await asyncio.gather(*(one() for _ in range(requests)))


async def test_no_more_is_spent_than_the_budget_has(tmp_path: Path) -> None:
    """Of 200 requests one in five is slow; a twentieth of what all are charged pays for few of those. What is free counts by requests."""
    async with opened(tmp_path, hedge_percent="5") as stage:
        usd = 0.0
        for model in (RAW, FREE):
            before = hedged(stage.gateway)
            await warm(stage, model)
            stage.good.set_behaviour(Behaviour(tokens=2))
            answers = await one_in_five_is_slow(stage, model, 200)
            assert {answered.status for answered in answers} == {200}
            figures = await settled(stage)
            begun = hedged(stage.gateway) - before
            assert 0 < begun < 30
            if model == FREE:
                assert begun <= SHARE * (2 * WARM_UP + 200)
                assert figures["usd"] == usd
            else:
                usd = figures["usd"]
                await asyncio.to_thread(stage.gateway.admin, "ledger", "verify")  # waits until all of it is in the ledger
                charged = float(re.findall(r"^gateway_charged_usd_total (\S+)", stage.gateway.metrics(), re.MULTILINE)[0])
                assert 0 < usd <= SHARE * charged


NO_SECOND: dict[str, dict[str, Any]] = {
    "off": {},
    "attempts used up": {"hedge_percent": "100", "attempts_max": 1},
    "retries used up": {"hedge_percent": "100", "retry_budget_share": 0, "retry_budget_per_s": 0},
}


@pytest.mark.parametrize("why", NO_SECOND)
async def test_without_a_budget_nobody_is_asked_beside(tmp_path: Path, why: str) -> None:
    async with opened(tmp_path, **NO_SECOND[why]) as stage:
        await warm(stage, SIM)
        asked = len(stage.good.books.entries)
        with behaving(stage.first, Behaviour(ttft_ms=500, tokens=200)):
            for answered in await asyncio.gather(*(stage.ask(SIM, stream=stream, max_tokens=200) for stream in (False, True) * 3)):
                assert outcomes(stage, answered) == [("first", "ok")]
        assert len(stage.good.books.entries) == asked
        assert not counted(await settled(stage))
