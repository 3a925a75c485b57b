"""Endpoints that stay sick, and outages of all: who is still asked, how often, and who comes back (UPS-04, UPS-05).

The breakers and the retry budget are those of an ordinary gateway.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest

from bench.behaviour import Behaviour
from gateway.settings import Routing
from tests.edge.stage import Answered, RawCall, Stage, completion, plain, stage_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEFAULTS = Routing()
BUSY = plain(b"{}").replace(b"200 OK", b"503 Busy")
EXPLAIN = {"X-OpenRouter-Metadata": "enabled"}

ORDINARY = {
    "routing": {
        "breaker_failures": DEFAULTS.breaker_failures,
        "breaker_error_share": DEFAULTS.breaker_error_share,
        "breaker_attempts_min": DEFAULTS.breaker_attempts_min,
        "breaker_open_s": 1.0,
        "retry_budget_per_s": DEFAULTS.retry_budget_per_s,
        "ramp_s": 0.0,
    }
}
stage = stage_of(settings=ORDINARY, models={"acme/sick-then-good": ("first", "good"), "acme/flaps-then-good": ("raw", "good")})
two_edges = stage_of(settings=ORDINARY, models={"acme/all-sick": ("first", "raw")}, workers=2)


def asked(stage: Stage, name: str) -> int:
    """Requests that the simulated endpoint has had."""
    return sum(entry.model == name for entry in stage.first.books.entries)


def is_good(answered: Answered) -> bool:
    return answered.status == 200 and bool(answered.json["provider"] == "Good")


async def flood(stage: Stage, model: str, per_s: int, seconds: float, **more: Any) -> list[Answered]:
    """Requests at an even pace that waits for none of them."""
    loop, under_way = asyncio.get_running_loop(), []
    began = loop.time()
    for number in range(round(per_s * seconds)):
        await asyncio.sleep(max(0.0, began + number / per_s - loop.time()))
        under_way.append(asyncio.create_task(stage.ask(model, **more)))
    return await asyncio.gather(*under_way)


async def test_ups_05_a_sick_endpoint_is_left_alone_and_comes_back(stage: Stage) -> None:
    model = "sick-then-good"
    stage.first.set_behaviour(Behaviour(status=503), model)
    for _ in range(DEFAULTS.breaker_failures):
        assert is_good(await stage.ask(f"acme/{model}"))
    before = asked(stage, model)
    answers = [await stage.ask(f"acme/{model}") for _ in range(40)]
    assert all(is_good(answered) for answered in answers)
    assert asked(stage, model) - before <= 2  # 5 % of them
    stage.first.set_behaviour(Behaviour(), model)
    async with asyncio.timeout(20.0):
        while (await stage.ask(f"acme/{model}")).json["provider"] != "First":
            await asyncio.sleep(0.1)


async def test_an_endpoint_that_flaps_costs_no_answer(stage: Stage) -> None:
    turn = itertools.count()

    async def script(call: RawCall) -> None:
        await call.write(plain(completion()) if next(turn) % 2 else plain(b"{}").replace(b"200 OK", b"503 Busy"))

    stage.raw.script = script
    answers = [await stage.ask("acme/flaps-then-good", provider={}, headers=EXPLAIN) for _ in range(40)]
    assert {answered.status for answered in answers} == {200}
    assert max(len(answered.json["openrouter_metadata"]["attempts"]) for answered in answers) <= 2


@pytest.mark.parametrize("seconds", [2.0, pytest.param(20.0, marks=pytest.mark.soak)], ids=["short", "long"])
async def test_ups_04_an_outage_of_all_does_not_multiply_load(two_edges: Stage, seconds: float) -> None:
    calls, before = len(two_edges.raw.calls), asked(two_edges, "all-sick")
    two_edges.first.set_behaviour(Behaviour(status=503), "all-sick")
    two_edges.raw.answers(plain(b"{}").replace(b"200 OK", b"503 Busy"))
    began = time.monotonic()
    answers = await flood(two_edges, "acme/all-sick", 100, seconds, provider={})
    took_s = time.monotonic() - began
    assert {answered.status for answered in answers} <= {502, 503}
    attempts = len(two_edges.raw.calls) - calls + asked(two_edges, "all-sick") - before
    assert len(answers) <= attempts <= 1.2 * len(answers) + 10 * took_s + 10  # in a panic each is still tried once
