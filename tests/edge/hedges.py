"""A stage on which endpoints are known for their usual speed, so that a slow one is noticed; and the figures of hedging."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from bench.behaviour import Behaviour
from bench.books import Entry
from tests.conftest import RunningGateway
from tests.edge.stage import GOOD, ROLE, SSE_HEAD, Answered, RawCall, Stage, chunk, completion, event, plain, staged

USUAL_S, SLOW_S, TOTAL_S = 0.03, 8.0, 3.0
USUAL = Behaviour(ttft_ms=USUAL_S * 1000, tokens=200)
SLOW = Behaviour(ttft_ms=SLOW_S * 1000, tokens=200)
HURRIED = 0.3 * SLOW_S  # nobody who waits for the slow one is there so soon
GONE_S = 0.5
WARM_UP = 60  # requests: of 20 the slowest twentieth is somebody

SIM, RAW, MIXED, FREE = "acme/sim", "acme/raw-first", "acme/mixed", "acme/free-two"
MODELS = {SIM: ("first", "good"), RAW: ("raw", "good"), MIXED: ("first", "raw"), FREE: ("raw", "good")}
PLAIN, DEAR, NOTHING = (
    f'{{ prompt = "{prompt}", completion = "{made}" }}' for prompt, made in (("0.000001", "0.000002"), ("0.000001", "0.0001"), ("0", "0"))
)
CHEAPEST_FIRST = {"price_weight": 1000, "latency_weight": 0, "throughput_weight": 0, "exploration_share": 0}


def repriced(catalog: str) -> str:
    """The second endpoint of each model is twenty times as dear, so that it comes second; those of `FREE` cost nothing."""
    for model in MODELS:
        before, name, after = catalog.partition(f'upstream_model = "{model.partition("/")[2]}"')
        first, again, second = after.partition(name)
        prices = (NOTHING, NOTHING) if model == FREE else (PLAIN, DEAR)
        catalog = before + name + first.replace(PLAIN, prices[0], 1) + again + second.replace(PLAIN, prices[1], 1)
    return catalog


def usual_answer(call: RawCall) -> bytes:
    """What a healthy provider would say."""
    if b'"stream":true' not in call.body.replace(b" ", b""):
        return plain(completion("word " * 160))
    said = event(ROLE) + event({"content": "fine"}) + event({}, finish="stop")
    return SSE_HEAD + chunk(said + b"data: [DONE]\n\n") + b"0\r\n\r\n"


@contextlib.asynccontextmanager
async def opened(folder: Path, **routing: object) -> AsyncIterator[Stage]:
    """A stage whose callers wish for no order."""
    settings = {
        "routing": {**CHEAPEST_FIRST, **routing},
        "timeouts": {"total_s": TOTAL_S},
        "limits": {"free_requests_per_minute": 0, "free_requests_per_day": 0, "free_requests_per_day_credited": 0},
    }
    async with staged(folder, settings=settings, catalog=repriced, models=MODELS) as running:
        running.models = {}
        yield running


async def healthy(call: RawCall) -> None:
    call.keep = True
    await asyncio.sleep(USUAL_S)
    await call.write(usual_answer(call))


async def warm(stage: Stage, *models: str, requests: int = WARM_UP) -> None:
    """Lets the first endpoints of these models be known for their usual speed."""
    stage.raw.script = healthy
    for provider in (stage.first, stage.good):
        provider.set_behaviour(USUAL)

    async def one_by_one(model: str, stream: bool) -> None:
        for _ in range(requests):
            assert (await stage.ask(model, stream=stream, max_tokens=200)).status == 200

    await asyncio.gather(*(one_by_one(model, stream) for model in models for stream in (False, True)))


def hedges(gateway: RunningGateway) -> dict[str, float]:
    """The figures of now: begun second calls by outcome, and `usd`."""
    text = gateway.metrics()
    found = dict.fromkeys(("won", "lost", "failed"), 0.0)
    found |= {name: float(value) for name, value in re.findall(r'gateway_hedges_total\{outcome="(\w+)"\} (\S+)', text)}
    return found | {"usd": sum(map(float, re.findall(r"^gateway_hedge_spend_usd_total (\S+)", text, re.MULTILINE)))}


def counted(figures: Mapping[str, float]) -> float:
    """All second calls that have ended."""
    return sum(value for name, value in figures.items() if name != "usd")


def hedged(gateway: RunningGateway) -> int:
    """Requests with a second call, by the log: here nobody else has two."""
    return sum(line.get("event") == "exchange" and len(line["attempts"]) > 1 for line in gateway.log)


async def settled(stage: Stage) -> dict[str, float]:
    """The figures once everything so far is in them: edges tell control each second."""
    answered = await stage.ask(GOOD)
    await asyncio.to_thread(stage.exchange, answered.headers["X-Generation-Id"])  # log lines are in order
    async with asyncio.timeout(10.0):
        while counted(figures := await asyncio.to_thread(hedges, stage.gateway)) != hedged(stage.gateway):
            await asyncio.sleep(0.05)
    return figures


async def grown(stage: Stage, before: Mapping[str, float], outcome: str) -> dict[str, float]:
    """By how much each figure has grown, once this outcome was counted: edges tell control each second."""
    async with asyncio.timeout(10.0):
        while (now := await asyncio.to_thread(hedges, stage.gateway))[outcome] == before[outcome]:
            await asyncio.sleep(0.05)
    return {name: value - before[name] for name, value in now.items()}


def outcomes(stage: Stage, answered: Answered) -> list[tuple[str, str]]:
    """Provider and outcome of each attempt, in order, by the log."""
    line = stage.exchange(answered.headers["X-Generation-Id"])
    return [(endpoint.partition("@")[2], outcome) for endpoint, outcome, _ in line["attempts"]]


def last(entries: Any) -> Entry:
    entry: Entry = entries[-1]
    return entry


@contextlib.asynccontextmanager
async def asked_beside(stage: Stage, model: str, **more: Any) -> AsyncIterator[asyncio.Task[Answered]]:
    """A request for which `good` has been asked as well, and which is answered when the block has done its part."""
    asked = len(stage.good.books.entries)
    answer = asyncio.create_task(stage.ask(model, max_tokens=200, **more))
    await stage.good.wait_for(lambda books: len(books.entries) == asked + 1)
    yield answer
    await answer
