"""Every wait for a provider has its end, and nothing it sends takes more than its share of memory (UPS-02, UPS-09, STR-07)."""

from __future__ import annotations

import asyncio
import itertools
import json
import time

import pytest

from bench.behaviour import Behaviour
from tests.conftest import eventually
from tests.edge.stage import (
    FIRST,
    FIRST_THEN_GOOD,
    GOOD,
    RAW,
    RAW_THEN_GOOD,
    ROLE,
    SSE_HEAD,
    Answered,
    RawCall,
    Stage,
    behaving,
    chunk,
    completion,
    event,
    plain,
    roomy,
    sse,
    stage_of,
)
from tests.timing import again_if_untimely, in_time

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONNECT_S, HEADERS_S, FIRST_TOKEN_S, IDLE_S, TOTAL_S = 0.5, 0.7, 0.9, 1.0, 2.0
OWN_TOTAL_S = 0.8
MIB = 1 << 20
ANSWER_BYTES_MAX = MIB
LINE_BYTES_MAX = MIB // 4


def own_timeouts(catalog: str) -> str:
    """The last endpoint of the catalog, `FIRST_THEN_GOOD`'s at good, has a total of its own; `FIRST` may take long."""
    before, _, _ = catalog.rpartition("max_completion_tokens = 8192\n")
    catalog = f"{before}max_completion_tokens = 8192\ntimeouts = {{ total_s = {OWN_TOTAL_S} }}\n{catalog[len(before) + 29 :]}"
    return catalog.replace('upstream_model = "first"\n', 'upstream_model = "first"\ntimeouts = { total_s = 60.0 }\n')


stage = stage_of(
    settings={
        "timeouts": {
            "connect_s": CONNECT_S,
            "headers_s": HEADERS_S,
            "first_token_s": FIRST_TOKEN_S,
            "idle_s": IDLE_S,
            "total_s": TOTAL_S,
        },
        "upstream": {"answer_bytes_max": ANSWER_BYTES_MAX, "sse_line_bytes_max": LINE_BYTES_MAX},
    },
    catalog=lambda text: roomy(own_timeouts(text)),
)


def cut_at(limit_s: float, answered: Answered) -> None:
    """Within a tenth of the limit, plus what two busy cores take."""
    in_time(answered.seconds, 1.1 * limit_s + 0.1, at_least=0.9 * limit_s)


# UPS-02


@again_if_untimely
async def test_ups_02_connect_s(stage: Stage) -> None:
    async with stage.raw.deaf():
        answers = await asyncio.gather(*(stage.ask(RAW, stream=stream) for stream in (False, True)))
    for answered in answers:
        assert answered.status == 502
        cut_at(CONNECT_S, answered)


@again_if_untimely
async def test_ups_02_headers_s_runs_from_the_requests_leaving_on_new_and_kept_connections(stage: Stage) -> None:
    async def script(call: RawCall) -> None:
        if call.body.find(b'"user":"prompt"') >= 0:
            call.keep = True
            await call.write(plain(completion()))
        else:
            await call.left()

    stage.raw.script = script
    fresh = await stage.ask(RAW, stream=True)
    connections = stage.raw.connections
    assert (await stage.ask(RAW, user="prompt")).status == 200
    kept = await stage.ask(RAW, stream=True)
    assert stage.raw.connections == connections + 1
    for answered in (fresh, kept):
        assert (answered.status, answered.error["metadata"]["error_type"]) == (504, "timeout")
        cut_at(HEADERS_S, answered)


@pytest.mark.parametrize(
    "opening", [SSE_HEAD, SSE_HEAD + chunk(event(ROLE)), SSE_HEAD + chunk(b": ping\n\n")], ids=["head", "role", "comment"]
)
@again_if_untimely
async def test_ups_02_first_token_s_is_not_met_by_anything_but_content(stage: Stage, opening: bytes) -> None:
    async def script(call: RawCall) -> None:
        await call.write(opening)
        while True:
            await call.write(chunk(b": still here\n\n"))
            await asyncio.sleep(0.05)

    stage.raw.script = script
    answered = await stage.ask(RAW, stream=True)
    assert (answered.status, answered.error["metadata"]["error_type"]) == (504, "timeout")
    cut_at(FIRST_TOKEN_S, answered)


@again_if_untimely
async def test_ups_02_idle_s_cuts_a_stream_that_stalls_and_is_moved_by_every_event(stage: Stage) -> None:
    gap_s = 0.0

    async def script(call: RawCall) -> None:
        nonlocal gap_s
        await call.write(SSE_HEAD, chunk(event({"content": "a"})))
        written = time.monotonic()
        await asyncio.sleep(0.5 * IDLE_S)
        await call.write(chunk(event({"content": "b"})))
        gap_s = time.monotonic() - written
        await call.left()

    stage.raw.script = script
    answered = await stage.ask(RAW, stream=True)
    in_time(gap_s, 0.8 * IDLE_S)  # the provider's own pace
    assert answered.text == "ab"
    assert answered.events[-1]["error"]["metadata"]["error_type"] == "timeout"
    cut_at(1.5 * IDLE_S, answered)


@again_if_untimely
async def test_ups_02_total_s_ends_a_stream_that_never_does(stage: Stage) -> None:
    async def script(call: RawCall) -> None:
        await call.write(SSE_HEAD)
        while True:
            await call.write(chunk(event({"content": "a"})))
            await asyncio.sleep(0.05)

    stage.raw.script = script
    answered = await stage.ask(RAW, stream=True)
    assert answered.status == 200
    assert answered.events[-1]["error"]["code"] == 504
    cut_at(TOTAL_S, answered)


@again_if_untimely
async def test_ups_02_only_total_s_ends_the_wait_for_a_whole_answer(stage: Stage) -> None:
    async def script(call: RawCall) -> None:
        if b"dripping" in call.body:
            await call.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while True:
                await call.write(b" ")
                await asyncio.sleep(0.05)
        await call.left()

    stage.raw.script = script
    for answered in await asyncio.gather(stage.ask(RAW), stage.ask(RAW_THEN_GOOD, user="dripping")):
        assert (answered.status, answered.error["code"]) == (504, 504)
        cut_at(TOTAL_S, answered)
    await eventually(lambda: stage.raw.open_connections == 0)


@pytest.mark.parametrize("stream", [False, True])
@again_if_untimely
async def test_ups_02_an_endpoint_may_have_limits_of_its_own(stage: Stage, stream: bool) -> None:
    with behaving(stage.good, Behaviour(tokens=1000, tokens_per_s=20)), behaving(stage.first, Behaviour(status=500)):
        answered = await stage.ask(FIRST_THEN_GOOD, stream=stream)
    assert (answered.events[-1] if stream else answered.json)["error"]["code"] == 504
    cut_at(OWN_TOTAL_S, answered)


@again_if_untimely
async def test_ups_02_a_chain_of_slow_attempts_ends_with_the_requests_deadline(stage: Stage) -> None:
    async def script(call: RawCall) -> None:
        await call.left()

    stage.raw.script = script
    with behaving(stage.good, Behaviour(silent_accept=True)), behaving(stage.first, Behaviour(silent_accept=True)):
        answered = await stage.ask(RAW, stream=True, models=[GOOD, RAW_THEN_GOOD, GOOD])
    assert answered.status == 504
    in_time(answered.seconds, TOTAL_S + 1.0)


# STR-07


async def _ticks(stage: Stage, until: asyncio.Event) -> list[float]:
    """Gaps between the events of a stream that has nothing to do with it."""
    arrivals: list[float] = []
    async with stage.streaming(GOOD, max_tokens=1000) as caller:
        await caller.head()
        while not until.is_set():
            await caller.chunk()
            arrivals.append(time.monotonic())
    return [b - a for a, b in itertools.pairwise(arrivals)]


@pytest.mark.parametrize("begun", [False, True])
@again_if_untimely
async def test_str_07_a_line_without_end_is_cut_and_disturbs_nobody(stage: Stage, begun: bool) -> None:
    sent = 0

    async def script(call: RawCall) -> None:
        nonlocal sent
        await call.write(SSE_HEAD + (chunk(event({"content": "A"})) if begun else b""), chunk(b'data: {"id":"'))
        piece = chunk(b"x" * 65536)
        for _ in range(1024):
            await call.write(piece)
            sent += 65536

    stage.raw.script = script
    tick_s = 0.02
    with behaving(stage.good, Behaviour(tokens=1000, tokens_per_s=1 / tick_s)):
        until = asyncio.Event()
        ticks = asyncio.create_task(_ticks(stage, until))
        before = stage.rss_bytes()
        stage.forget_peak()
        answers = await asyncio.gather(*(stage.ask(RAW, stream=True) for _ in range(4)))
        peak = stage.peak_bytes()
        await asyncio.sleep(0.2)  # some more of the quiet stream
        until.set()
        gaps = sorted(await ticks)
    for answered in answers:
        if begun:
            assert answered.text == "A" and answered.events[-1]["error"]["code"] == 502
        else:
            assert (answered.status, answered.error["code"]) == (502, 502)
    assert sent <= 4 * 16 * MIB  # what sockets hold, not the whole line
    assert peak - before <= 32 * MIB
    in_time(gaps[len(gaps) * 99 // 100], tick_s + 0.05)


# UPS-09 and other sizes


@pytest.mark.parametrize("stream", [False, True])
async def test_ups_09_an_answer_compressed_unasked_is_refused_uninflated(stage: Stage, stream: bool) -> None:
    with behaving(stage.first, Behaviour(gzip_bomb=200 * MIB)):
        before = stage.rss_bytes()
        stage.forget_peak()
        answered = await stage.ask(FIRST, stream=stream)
        assert (await stage.ask(FIRST_THEN_GOOD, stream=stream)).status == 200
        assert stage.peak_bytes() - before <= 64 * MIB
    assert (answered.status, answered.error["code"]) == (502, 502)
    entry = stage.first.books.entries[-1]
    assert dict(entry.headers)["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("framing", ["length", "close"])
async def test_a_whole_answer_ends_at_answer_bytes_max(stage: Stage, framing: str) -> None:
    def answer(size: int) -> bytes:
        body = completion("x" * size)
        return plain(body) if framing == "length" else b"HTTP/1.1 200 OK\r\n\r\n" + body

    stage.raw.answers(answer(ANSWER_BYTES_MAX - 1000))
    assert len((await stage.ask(RAW)).json["choices"][0]["message"]["content"]) == ANSWER_BYTES_MAX - 1000
    stage.raw.answers(answer(32 * MIB))
    before = stage.rss_bytes()
    stage.forget_peak()
    answered = await stage.ask(RAW)
    assert (answered.status, answered.error["code"]) == (502, 502)
    assert stage.peak_bytes() - before <= 16 * MIB


async def test_an_error_of_any_size_is_told_in_few_bytes(stage: Stage) -> None:
    stage.raw.answers(plain(b'{"error":{"message":"' + b"y" * 8 * MIB + b'"}}').replace(b"200 OK", b"400 Bad"))
    answered = await stage.ask(RAW)
    assert answered.status == 400
    assert len(answered.body) < 8192


async def test_events_without_content_do_not_pile_up(stage: Stage) -> None:
    filler = chunk(sse({"id": "up-1", "model": "raw", "choices": [], "padding": "z" * 60000}))
    stage.raw.answers(SSE_HEAD, *[filler] * 200)
    answered = await stage.ask(RAW, stream=True)
    assert (answered.status, answered.error["code"]) == (502, 502)


# Back-pressure


async def test_a_caller_who_does_not_read_pauses_the_provider_and_is_not_its_fault(stage: Stage) -> None:
    with behaving(stage.first, Behaviour(tokens=2_000_000)):
        async with stage.streaming(FIRST, max_tokens=2_000_000) as caller:
            assert (await caller.head())[0] == 200
            caller.writer.transport.pause_reading()  # type: ignore[attr-defined]  # asyncio's are for both directions
            entry = stage.first.books.entries[-1]
            made, before = -1, stage.rss_bytes()
            stage.forget_peak()
            began = time.monotonic()
            while entry.completion_tokens != made or time.monotonic() - began < 2 * IDLE_S:
                made = entry.completion_tokens
                await asyncio.sleep(0.3)
            assert entry.finished is None and entry.cancelled is None
            assert made * 200 <= 32 * MIB  # what the sockets hold
            assert stage.peak_bytes() - before <= 8 * MIB
            caller.writer.transport.resume_reading()  # type: ignore[attr-defined]
            read = 0
            while read < 4 * MIB:
                piece = await caller.chunk()
                assert b'"error"' not in piece
                read += len(piece)
            json.loads(piece.split(b"\n\n")[0][6:])
        await stage.first.wait_for(lambda _: entry.cancelled is not None)
