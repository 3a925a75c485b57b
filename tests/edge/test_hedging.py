"""A second call beside a slow one: the caller has the quicker answer, the slower call ends at once, and nobody hears of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from bench.answers import text_of
from bench.behaviour import Behaviour
from tests.edge.hedges import (
    GONE_S,
    HURRIED,
    MIXED,
    MODELS,
    RAW,
    SIM,
    SLOW,
    USUAL,
    asked_beside,
    grown,
    healthy,
    last,
    opened,
    outcomes,
    settled,
    usual_answer,
    warm,
)
from tests.edge.stage import HELLO, SSE_HEAD, RawCall, Stage, behaving, chunk, event
from tests.edge.test_hang_ups import leave
from tests.timing import again_if_untimely, in_time

pytestmark = pytest.mark.asyncio(loop_scope="module")


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
