"""What fails before a first content byte is tried elsewhere, and never twice in the caller's text (STR-06, UPS-01, UPS-13)."""

from __future__ import annotations

import asyncio
import email.utils
import statistics
import time

import pytest

from bench.answers import text_of
from bench.behaviour import Behaviour
from tests.edge.stage import (
    FIRST,
    FIRST_THEN_GOOD,
    GOOD,
    HELLO,
    RAW,
    RAW_THEN_GOOD,
    ROLE,
    SSE_HEAD,
    Answered,
    RawCall,
    RawProvider,
    Stage,
    behaving,
    chunk,
    event,
    plain,
    sse,
    stage_of,
)
from tests.timing import again_if_untimely, in_time

pytestmark = pytest.mark.asyncio(loop_scope="module")

INFLIGHT_MAX = 8
CONNECT_S, HEADERS_S = 0.8, 1.0
WHOLE_TEXT = text_of(16)

# Which refusals are tried elsewhere, and what the caller reads where nobody else is there.

ELSEWHERE = {401: 502, 402: 502, 403: 502, 404: 502, 408: 504, 409: 502, 429: 429, 500: 502, 502: 502, 503: 502, 504: 504, 529: 502}
CALLERS = (400, 413, 422)
TOLD = {
    "seconds": ("7", 7, 7),
    "date": (email.utils.formatdate(time.time() + 30, usegmt=True), 1, 31),
    "nonsense": ("soon", None, None),
    "absent": ("", None, None),
    "negative": ("-1", None, None),
}

# Endpoints that rest after what is done to them.
OWN = {
    **{f"acme/{status}-then-good-{stream:d}": ("first", "good") for status in ELSEWHERE for stream in (False, True)},
    **{f"acme/told-{told}": ("first",) for told in TOLD},
}


stage = stage_of(
    settings={
        "timeouts": {"connect_s": CONNECT_S, "headers_s": HEADERS_S, "first_token_s": 2.0, "idle_s": 5.0},
        "upstream": {"inflight_max": INFLIGHT_MAX},
    },
    models=OWN,
)


def served_by_good(answered: Answered, *, stream: bool) -> None:
    """Asserts a complete answer, from the healthy provider alone."""
    assert answered.status == 200, answered.body
    if stream:
        assert answered.text == WHOLE_TEXT
        assert answered.events[-1] == "[DONE]"
        assert {part["provider"] for part in answered.events[:-1]} == {"Good"}
    else:
        assert answered.json["provider"] == "Good"
        assert answered.json["choices"][0]["message"]["content"] == WHOLE_TEXT


@pytest.mark.parametrize("stream", [False, True])
async def test_the_providers_refusals_are_tried_elsewhere(stage: Stage, stream: bool) -> None:
    for status in ELSEWHERE:
        with behaving(stage.first, Behaviour(status=status)):
            answered = await stage.ask(f"acme/{status}-then-good-{stream:d}", stream=stream)
        served_by_good(answered, stream=stream)
        assert stage.first.books.entries[-1].status == status


@pytest.mark.parametrize("stream", [False, True])
async def test_the_callers_own_fault_is_not_tried_elsewhere(stage: Stage, stream: bool) -> None:
    for status in CALLERS:
        before = stage.good.books.requests
        with behaving(stage.first, Behaviour(status=status, error_message="max_tokens is too large", error_code="bad_limit")):
            answered = await stage.ask(FIRST_THEN_GOOD, stream=stream)
        assert (answered.status, answered.error["code"]) == (status, status)
        assert answered.error["message"] == "max_tokens is too large"
        assert answered.error["metadata"]["provider_code"] == "bad_limit"
        assert stage.good.books.requests == before


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_without_alternative_has_a_mapped_status_and_the_providers_words(stage: Stage, stream: bool) -> None:
    for status, ours in ELSEWHERE.items():
        with behaving(stage.first, Behaviour(status=status, error_message=f"no: {status}")):
            answered = await stage.ask(FIRST, stream=stream)
        assert (answered.status, answered.error["code"]) == (ours, ours), status
        metadata = answered.error["metadata"]
        assert (metadata["provider_name"], metadata["is_byok"]) == ("First", False)
        assert f"no: {status}" in metadata["raw"]
        assert answered.headers["Content-Type"] == "application/json"
        assert "X-RateLimit-Limit" not in answered.headers


@pytest.mark.parametrize("told", TOLD)
async def test_ups_03_throttling_without_alternative_tells_when_to_come_back(stage: Stage, told: str) -> None:
    retry_after, low, high = TOLD[told]
    with behaving(stage.first, Behaviour(status=429, retry_after=retry_after)):
        answered = await stage.ask(f"acme/told-{told}")
    assert answered.status == 429
    assert answered.error["metadata"]["error_type"] == "rate_limit_exceeded"
    if low is None or high is None:
        assert "Retry-After" not in answered.headers
    else:
        assert low <= int(answered.headers["Retry-After"]) <= high


NO_ANSWERS = {
    "error body": Behaviour(error_body=True),
    "empty": Behaviour(empty=True),
    "html": Behaviour(html=True),
    "refuse": Behaviour(refuse=True),
    "reset": Behaviour(reset_after_events=0),
    "close": Behaviour(close_after_events=0),
    "truncated": Behaviour(truncated_json=True),
    "truncated until close": Behaviour(truncated_json=True, framing="close"),
}


@pytest.mark.parametrize(
    ("sick", "stream"), [(sick, stream) for sick, behaviour in NO_ANSWERS.items() for stream in {False, not behaviour.truncated_json}]
)
async def test_an_answer_that_is_none_is_tried_elsewhere(stage: Stage, sick: str, stream: bool) -> None:
    with behaving(stage.first, NO_ANSWERS[sick]):
        served_by_good(await stage.ask(FIRST_THEN_GOOD, stream=stream), stream=stream)
        alone = await stage.ask(FIRST, stream=stream)
    assert (alone.status, alone.error["code"]) == (502, 502)
    assert alone.error["metadata"]["provider_name"] == "First"


async def test_the_error_code_inside_a_200_counts_as_if_it_were_the_status(stage: Stage) -> None:
    error = sse({"error": {"code": 400, "message": "prompt too odd"}})
    for stream, answer in (
        (False, plain(error[6:].strip())),
        (True, SSE_HEAD + chunk(error) + b"0\r\n\r\n"),
        (True, plain(error[6:].strip())),
    ):
        stage.raw.answers(answer)
        answered = await stage.ask(RAW_THEN_GOOD, stream=stream)
        assert (answered.status, answered.error["message"]) == (400, "prompt too odd")


# STR-06


async def _dying(call: RawCall) -> None:
    """Dies where the caller's `user` says: after that many of head, role and content."""
    steps = [SSE_HEAD, chunk(event(ROLE)), chunk(event({"content": "A"}))]
    await call.write(*steps[: {b"head": 1, b"role": 2, b"text": 3}[call.body.split(b'"user":"')[1][:4]]])
    await asyncio.sleep(0.01)
    if call.body.endswith(b'"reset"}'):
        call.reset()


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_str_06_a_provider_that_dies_before_content_is_replaced_whole(stage: Stage, how: str) -> None:
    stage.raw.script = _dying
    for place in ("head", "role"):
        for answered in await asyncio.gather(*(stage.ask(RAW_THEN_GOOD, stream=True, user=place, stop=how) for _ in range(5))):
            served_by_good(answered, stream=True)


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_str_06_a_provider_that_dies_after_content_is_not_replaced(stage: Stage, how: str) -> None:
    stage.raw.script = _dying
    before = stage.good.books.requests
    for answered in await asyncio.gather(*(stage.ask(RAW_THEN_GOOD, stream=True, user="text", stop=how) for _ in range(5))):
        assert answered.text == "A"
        assert [part for part in answered.events if part == "[DONE]"] == []
        assert answered.events[-1]["choices"][0]["finish_reason"] == "error"
    assert stage.good.books.requests == before


async def test_str_06_a_whole_answer_that_breaks_off_is_made_elsewhere(stage: Stage) -> None:
    whole = plain(b'{"id":"up-1","choices":[{"index":0,"message":{"content":"half')[:-20]
    stage.raw.answers(whole.replace(b"Content-Length: 6", b"Content-Length: 66"))
    served_by_good(await stage.ask(RAW_THEN_GOOD), stream=False)


# UPS-01


@pytest.mark.parametrize("stream", [False, True])
@again_if_untimely
async def test_ups_01_a_provider_that_is_not_there_is_routed_around(stage: Stage, stream: bool) -> None:
    await stage.first.down()
    try:
        answers = [await stage.ask(FIRST_THEN_GOOD, stream=stream) for _ in range(20)]
        alone = await stage.ask(FIRST, stream=stream)
    finally:
        await stage.first.up()
    for answered in answers:
        served_by_good(answered, stream=stream)
    in_time(statistics.median(answered.seconds for answered in answers), 0.1)
    assert (alone.status, alone.error["metadata"]["error_type"]) == (502, "provider_unavailable")
    assert stage.exchange(alone.headers["X-Generation-Id"])["error"] == "connect_failed"


@again_if_untimely
async def test_ups_01_a_provider_that_accepts_and_is_silent_is_left_after_headers_s(stage: Stage) -> None:
    with behaving(stage.first, Behaviour(silent_accept=True)):
        answered = await stage.ask(FIRST_THEN_GOOD, stream=True)
    served_by_good(answered, stream=True)
    in_time(answered.seconds, HEADERS_S * 1.1 + 0.2, at_least=HEADERS_S * 0.9)


@again_if_untimely
async def test_ups_01_a_listener_that_accepts_nothing_is_left_after_connect_s(stage: Stage) -> None:
    async with stage.raw.deaf():
        answers = await asyncio.gather(*(stage.ask(RAW_THEN_GOOD, stream=stream) for stream in (False, True)))
    for answered, stream in zip(answers, (False, True), strict=True):
        served_by_good(answered, stream=stream)
        in_time(answered.seconds, CONNECT_S * 1.1 + 0.2, at_least=CONNECT_S * 0.9)


async def paced(stage: Stage, model: str, seconds: float) -> list[Answered]:
    """The answers to 50 requests a second, whose pace waits for none of them."""
    loop, asked = asyncio.get_running_loop(), []
    began = loop.time()
    for number in range(round(50 * seconds)):
        await asyncio.sleep(max(0.0, began + number / 50 - loop.time()))
        asked.append(asyncio.create_task(stage.ask(model, stream=bool(number % 2))))
    return await asyncio.gather(*asked)


AT_ONCE = (Behaviour(refuse=True), Behaviour(reset_after_events=0), Behaviour(status=503))


@pytest.mark.parametrize(("seconds", "rank"), [(0.6, 0.5), pytest.param(30.0, 0.99, marks=pytest.mark.soak)], ids=["short", "long"])
@again_if_untimely
async def test_ups_01_a_provider_that_fails_at_once_costs_neither_answers_nor_time(stage: Stage, seconds: float, rank: float) -> None:
    """The long form judges the slowest hundredth, which a short one has too few answers for."""
    healthy = await paced(stage, GOOD, seconds)
    for sick in AT_ONCE:
        with behaving(stage.first, sick):
            answers = await paced(stage, FIRST_THEN_GOOD, seconds)
        assert sum(answered.status == 200 for answered in answers) >= 0.999 * len(answers)
        usual_s, took_s = (sorted(each.seconds for each in some)[int(len(some) * rank)] for some in (healthy, answers))
        in_time(took_s, usual_s + 0.010)


# UPS-13


@again_if_untimely
async def test_ups_13_a_hanging_provider_takes_its_own_places_only(stage: Stage) -> None:
    hanging = Behaviour(silent_accept=True)
    quick = [(await stage.ask(GOOD)).seconds for _ in range(20)]
    await stage.first.down()  # so that no connection is used again: what it was sent would be sent anew when it ends
    await stage.first.up()
    with behaving(stage.first, hanging):
        held = [asyncio.create_task(stage.ask(FIRST)) for _ in range(INFLIGHT_MAX)]
        await stage.first.wait_for(
            lambda books: sum(entry.finished is None and entry.cancelled is None for entry in books.entries) == INFLIGHT_MAX
        )
        rerouted = [await stage.ask(FIRST_THEN_GOOD) for _ in range(20)]
        refused = [await stage.ask(FIRST, stream=stream) for stream in (False, True) * 5]
        beside = [(await stage.ask(GOOD)).seconds for _ in range(20)]
        await stage.first.down()  # ends the calls that hang
        try:
            # Before it is back: what it closed without a byte is sent once more, on a fresh connection.
            assert [answered.status for answered in await asyncio.gather(*held)] == [502] * INFLIGHT_MAX
        finally:
            await stage.first.up()
    for answered in rerouted:
        served_by_good(answered, stream=False)
    assert {answered.status for answered in refused} == {503}
    assert {answered.headers["Retry-After"] for answered in refused} == {"1"}
    assert (await stage.ask(FIRST)).status == 200  # the places are free again
    in_time(statistics.median(answered.seconds for answered in (*rerouted, *refused)), 0.05)
    in_time(statistics.median(beside), 1.1 * statistics.median(quick) + 0.005)


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(stage: Stage, status: int) -> None:
    async with RawProvider() as elsewhere:
        location = f"Location: {elsewhere.url}/chat/completions\r\n".encode()
        stage.raw.answers(b"HTTP/1.1 %d Found\r\n%bContent-Length: 0\r\n\r\n" % (status, location))
        alone = await stage.ask(RAW)
        served_by_good(await stage.ask(RAW_THEN_GOOD, stream=True), stream=True)
        assert elsewhere.connections == 0
    assert (alone.status, alone.error["code"]) == (502, 502)
    assert "Location" not in alone.headers and str(elsewhere) not in alone.body.decode()


async def test_nobody_of_the_fallback_list_is_asked_after_a_success(stage: Stage) -> None:
    before = stage.good.books.requests
    answered = await stage.ask(FIRST, models=[GOOD], messages=HELLO)
    assert answered.json["model"] == FIRST
    with behaving(stage.first, Behaviour(status=500)):
        answered = await stage.ask(FIRST, models=[GOOD])
    assert (answered.json["model"], answered.json["provider"]) == (GOOD, "Good")
    assert stage.good.books.requests == before + 1
