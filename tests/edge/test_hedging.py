"""A second call beside a slow one: the caller has the quicker answer, the slower call ends at once, and an operator's budget holds."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from bench.answers import text_of
from bench.behaviour import Behaviour
from bench.books import Entry
from tests.conftest import RunningGateway
from tests.edge.stage import GOOD, HELLO, ROLE, SSE_HEAD, Answered, RawCall, Stage, behaving, chunk, completion, event, plain, staged
from tests.edge.test_hang_ups import leave
from tests.timing import again_if_untimely, in_time

pytestmark = pytest.mark.asyncio(loop_scope="module")

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
        if model == FREE:
            first, second = first.replace(PLAIN, NOTHING, 1), second.replace(PLAIN, NOTHING, 1)
        catalog = before + name + first + again + second.replace(PLAIN, DEAR, 1)
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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def warmed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with opened(tmp_path_factory.mktemp("stage"), hedge_percent="100") as running:
        await warm(running, *MODELS)
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def stage(warmed: Stage) -> AsyncIterator[Stage]:
    """Everybody is healthy before each test."""
    warmed.raw.script = healthy
    warmed.first.set_behaviour(USUAL)
    warmed.good.set_behaviour(USUAL)
    yield warmed


@pytest.mark.parametrize("stream", [False, True])
@again_if_untimely
async def test_a_slow_endpoint_is_outrun_and_its_call_ends_at_once(stage: Stage, stream: bool) -> None:
    before = await settled(stage)
    with behaving(stage.first, SLOW):
        answered = await stage.ask(SIM, stream=stream, max_tokens=200)
        lost, won = last(stage.first.books.entries), last(stage.good.books.entries)
        await stage.first.wait_for(lambda _: lost.cancelled is not None)
    assert answered.status == 200
    if stream:
        assert answered.text == text_of(200) and answered.events[-1] == "[DONE]"
        assert {part["provider"] for part in answered.events[:-1]} == {"Good"}
    else:
        assert answered.json["provider"] == "Good" and answered.json["choices"][0]["message"]["content"] == text_of(200)
    assert outcomes(stage, answered) == [("first", "hedge_lost"), ("good", "ok")]
    assert stage.exchange(answered.headers["X-Generation-Id"])["endpoint"] == f"{SIM}@good"
    assert lost.finished is None and lost.cancelled is not None and won.first is not None
    figures = await grown(stage, before, "won")
    assert (figures["won"], figures["lost"], figures["failed"]) == (1, 0, 0) and figures["usd"] > 0
    in_time(answered.seconds, HURRIED)
    in_time(lost.cancelled - won.first, GONE_S)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_first_endpoint_that_is_quicker_after_all_serves(stage: Stage, stream: bool) -> None:
    """And the log names it, though another one was asked after it."""
    before, asked_another = await settled(stage), asyncio.Event()

    async def late(call: RawCall) -> None:
        await asked_another.wait()
        await call.write(usual_answer(call))

    stage.raw.script = late
    with behaving(stage.good, SLOW):
        async with asked_beside(stage, RAW, stream=stream) as answer:
            asked_another.set()
        lost = last(stage.good.books.entries)
        await stage.good.wait_for(lambda _: lost.cancelled is not None)
    answered = answer.result()
    assert answered.status == 200 and lost.finished is None
    assert outcomes(stage, answered) == [("raw", "ok"), ("good", "hedge_lost")]
    assert stage.exchange(answered.headers["X-Generation-Id"])["endpoint"] == f"{RAW}@raw"
    assert (await grown(stage, before, "lost"))["lost"] == 1


async def test_who_has_its_usual_time_has_no_second_call_beside_it(stage: Stage) -> None:
    asked = len(stage.good.books.entries)
    with behaving(stage.first, Behaviour(tokens=200)):
        for stream in (False, True) * 10:
            assert (await stage.ask(SIM, stream=stream)).status == 200
    assert len(stage.good.books.entries) == asked


@pytest.mark.parametrize("stream", [False, True])
async def test_where_the_slow_one_fails_the_other_goes_on_and_nobody_hears_of_it(stage: Stage, stream: bool) -> None:
    before, both = await settled(stage), asyncio.Event()

    async def fails(call: RawCall) -> None:
        await both.wait()
        await call.write(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")

    stage.raw.script = fails
    with behaving(stage.good, Behaviour(ttft_ms=1000, tokens=5)):
        async with asked_beside(stage, RAW, stream=stream) as answer:
            both.set()
    answered = answer.result()
    assert answered.status == 200 and (not stream or answered.text == text_of(5))
    (raw, failure), good = outcomes(stage, answered)
    assert raw == "raw" and failure not in ("ok", "hedge_lost") and good == ("good", "ok")
    figures = await grown(stage, before, "won")
    assert (figures["won"], figures["usd"]) == (1, 0)  # of a failure nobody was outrun


@pytest.mark.parametrize("stream", [False, True])
async def test_where_the_second_one_fails_the_slow_one_goes_on_and_nobody_hears_of_it(stage: Stage, stream: bool) -> None:
    before, failed = await settled(stage), asyncio.Event()

    async def late(call: RawCall) -> None:
        await failed.wait()
        await call.write(usual_answer(call))

    stage.raw.script = late
    with behaving(stage.good, Behaviour(status=500)):
        async with asked_beside(stage, RAW, stream=stream) as answer:
            await asyncio.sleep(0.3)  # nothing tells when the gateway has read of the failure
            failed.set()
    answered = answer.result()
    assert answered.status == 200
    raw, (good, failure) = outcomes(stage, answered)
    assert raw == ("raw", "ok") and good == "good" and failure not in ("ok", "hedge_lost")
    figures = await grown(stage, before, "failed")
    assert (figures["failed"], figures["usd"]) == (1, 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_where_both_fail_what_follows_is_as_without_a_second_call(stage: Stage, stream: bool) -> None:
    """Nobody else being left, the one that failed last is asked once more; then its error is told."""
    both = asyncio.Event()

    async def fails(call: RawCall) -> None:
        await both.wait()
        await call.write(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")

    stage.raw.script = fails
    with behaving(stage.good, Behaviour(headers_delay_ms=300, status=503, error_message="both are down")):
        async with asked_beside(stage, RAW, stream=stream) as answer:
            both.set()
    answered = answer.result()
    assert answered.status == 502 and "both are down" in answered.error["metadata"]["raw"]
    made = outcomes(stage, answered)
    assert [provider for provider, _ in made] == ["raw", "good", "good"]
    assert {outcome for _, outcome in made}.isdisjoint({"ok", "hedge_lost"})


@again_if_untimely
async def test_str_04_both_calls_end_when_the_caller_leaves(stage: Stage) -> None:
    left_at: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def script(call: RawCall) -> None:
        left_at.set_result(await call.left())

    stage.raw.script = script
    with behaving(stage.good, SLOW):
        asked = len(stage.good.books.entries)
        async with stage.streaming(RAW) as caller:
            await stage.good.wait_for(lambda books: len(books.entries) == asked + 1)
            left = leave(caller, "close")
            entry = last(stage.good.books.entries)
            await stage.good.wait_for(lambda _: entry.cancelled is not None)
    assert entry.cancelled is not None
    in_time(entry.cancelled - left, GONE_S)
    in_time(await asyncio.wait_for(left_at, 10.0) - left, GONE_S)


async def test_a_whole_answer_is_made_once_also_when_its_caller_leaves(stage: Stage) -> None:
    with behaving(stage.first, SLOW), behaving(stage.good, Behaviour(ttft_ms=500, tokens=7)):
        asked = len(stage.good.books.entries)
        async with stage.connected() as caller:
            key = f"Authorization: Bearer {stage.gateway.key}\r\n"
            caller.send({"model": SIM, "messages": HELLO, "max_tokens": 200}, "/api/v1/chat/completions", key)
            await stage.good.wait_for(lambda books: len(books.entries) == asked + 1)
            leave(caller, "close")
        won, lost = last(stage.good.books.entries), last(stage.first.books.entries)
        await stage.good.wait_for(lambda _: won.finished is not None)
        await stage.first.wait_for(lambda _: lost.cancelled is not None)
    assert won.completion_tokens == 7


@pytest.mark.parametrize("stream", [False, True])
async def test_time_being_over_ends_both_calls(stage: Stage, stream: bool) -> None:
    with behaving(stage.first, SLOW), behaving(stage.good, SLOW):
        async with asked_beside(stage, SIM, stream=stream) as answer:
            entries = last(stage.first.books.entries), last(stage.good.books.entries)
    answered = answer.result()
    assert (answered.status, answered.error["metadata"]["error_type"]) == (504, "timeout")
    await stage.first.wait_for(lambda _: entries[0].cancelled is not None)
    await stage.good.wait_for(lambda _: entries[1].cancelled is not None)


WISHES: dict[str, dict[str, Any]] = {
    "order": {"provider": {"order": ["first", "good"]}},
    "no fallbacks": {"provider": {"allow_fallbacks": False}},
    "only": {"provider": {"only": ["first"]}},
    "sort": {"provider": {"sort": "price"}},
    "floor": {"model": f"{SIM}:floor"},
    "continuation": {"provider": {"continuation": True}, "stream": True},
    "reasoning": {"reasoning": {"effort": "high"}},
    "another model": {"provider": {"only": ["first"]}, "models": ["acme/good"]},
}


@pytest.mark.parametrize("wish", WISHES)
async def test_no_second_call_is_against_the_callers_wishes(stage: Stage, wish: str) -> None:
    asked = len(stage.good.books.entries)
    body = {"model": SIM, "messages": HELLO, "max_tokens": 200, **WISHES[wish]}
    with behaving(stage.first, Behaviour(ttft_ms=300, tokens=200)):
        async with stage.session.post(stage.url, json=body, headers=stage.authorization) as answer:
            assert answer.status == 200 and await answer.read()
    assert len(stage.good.books.entries) == asked


@pytest.mark.parametrize("stream", [False, True])
async def test_the_explanation_shows_both(stage: Stage, stream: bool) -> None:
    with behaving(stage.first, SLOW):
        answered = await stage.ask(SIM, stream=stream, max_tokens=200, headers={"X-OpenRouter-Metadata": "enabled"})
    found = (answered.events[-2] if stream else answered.json)["openrouter_metadata"]
    assert found["attempt"] == 2
    assert [(each["provider"], each["outcome"]) for each in found["attempts"]] == [("First", "hedge_lost"), ("Good", "ok")]
    assert [each["provider"] for each in found["endpoints"]["available"] if each["selected"]] == ["Good"]


async def test_a_caller_who_reads_slowly_holds_the_winner_back(stage: Stage) -> None:
    async def endless(call: RawCall) -> None:
        call.writer.write(SSE_HEAD)
        for _ in range(60_000):
            call.writer.write(chunk(event({"content": "x" * 400})))
            await call.writer.drain()

    stage.raw.script = endless
    calls, before = len(stage.raw.calls), stage.rss_bytes()
    with behaving(stage.first, SLOW):
        async with stage.streaming(MIXED, max_tokens=8192) as caller:
            await caller.head()
            await stage.raw.called(calls + 1)
            await asyncio.sleep(0.5)  # in which all of it would come, were it asked for: 30 MB
            assert stage.rss_bytes() - before < 12_000_000


# The budget


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


LONG = [{"role": "user", "content": "word " * 800}]
SHARE = 0.05


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
