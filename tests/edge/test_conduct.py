"""Faults of providers as one caller sees them: what is answered, after how many attempts, in what time (UPS-02, UPS-03, STR-05).

Each fault has models of its own: `acme/<fault>` with the faulty endpoint alone, `acme/<fault>-then-good` with a healthy
one after it, so that what an endpoint's state learned from one fault does not meet the next.
"""

from __future__ import annotations

import asyncio
import re
from typing import NamedTuple

import pytest

from bench.answers import text_of
from bench.behaviour import Behaviour
from tests.edge.stage import GOOD, ROLE, SSE_HEAD, Answered, RawCall, Stage, chunk, completion, event, plain, stage_of
from tests.timing import again_if_untimely, in_time

pytestmark = pytest.mark.asyncio(loop_scope="module")

HEADERS_S, IDLE_S, FIRST_TOKEN_S_MIN, LATE_S = 1.0, 1.0, 3.0, 4.0
TEXT = text_of(16)
EXPLAIN = {"X-OpenRouter-Metadata": "enabled"}


class Fault(NamedTuple):
    """How an endpoint misbehaves, and what a caller gets where it is the only one."""

    behaviour: Behaviour
    status: int
    error_type: str
    attempts: int = 1  # where nobody else is there
    least_s: float = 0.0
    streams: tuple[bool, ...] = (False, True)


TOO_LONG = Behaviour(status=400, error_code="context_length_exceeded", error_message="maximum context length is 4096 tokens")
FILTERED = Behaviour(status=400, error_code="content_filter", error_message="the prompt was filtered")
BEFORE_CONTENT = {
    "throttled-for-7s": Fault(Behaviour(status=429, retry_after="7"), 429, "rate_limit_exceeded"),
    "throttled": Fault(Behaviour(status=429), 429, "rate_limit_exceeded"),
    "unavailable": Fault(Behaviour(status=503), 502, "provider_unavailable", attempts=2),
    "overloaded": Fault(Behaviour(status=529), 502, "provider_unavailable", attempts=2),
    "resets": Fault(Behaviour(reset_after_events=0), 502, "provider_unavailable"),
    "closes": Fault(Behaviour(refuse=True), 502, "provider_unavailable"),
    "silent": Fault(Behaviour(silent_accept=True), 504, "timeout", least_s=HEADERS_S, streams=(True,)),
    "empty": Fault(Behaviour(empty=True), 502, "provider_unavailable"),
    "error-in-200": Fault(Behaviour(error_body=True), 502, "provider_unavailable", attempts=2),
}
REFUSED = {
    "too-long": (TOO_LONG, "context_length_exceeded"),
    "filtered": (FILTERED, "content_policy_violation"),
    "rejected": (Behaviour(status=422, error_message="temperature must be even"), "invalid_request"),
}
AFTER_CONTENT = {
    "cut": Behaviour(close_after_events=4),
    "reset-midway": Behaviour(reset_after_events=4),
    "stalls": Behaviour(stall_after_events=4),
    "error-event": Behaviour(error_event_after=4),
}
SIMULATED: dict[str, Behaviour] = {
    **{f"{name}-{stream:d}": fault.behaviour for name, fault in BEFORE_CONTENT.items() for stream in fault.streams},
    **{name: behaviour for name, (behaviour, _) in REFUSED.items()},
    **AFTER_CONTENT,
    "late": Behaviour(),
    "small": TOO_LONG,
    "dear": Behaviour(status=500),
    "prefill-refused": AFTER_CONTENT["cut"],
}
SCRIPTED = ("once", "odd")
CATALOG = {
    **{f"acme/{name}": ("first",) for name in SIMULATED},
    **{f"acme/{name}-then-good": ("first", "good") for name in SIMULATED},
    **{f"acme/{name}": ("raw",) for name in SCRIPTED},
    **{f"acme/{name}-then-good": ("raw", "good") for name in SCRIPTED},
    "acme/prefill-refused-then-raw": ("first", "raw"),
    "acme/prefill-refused-then-good": ("first", "raw", "good"),
}


def priced(catalog: str) -> str:
    """The healthy endpoint of `dear-then-good` costs three times as much; that of `small-then-good` has room for longer prompts.
    Behind `prefill-refused` all can go on with an answer, or so it is said.
    """
    models = re.split(r"(?=^\[\[models\]\])", catalog, flags=re.MULTILINE)
    able = [each.replace("upstream_model", "prefill = true\nupstream_model") if "prefill-refused" in each else each for each in models]
    head, model, rest = "".join(able).partition('[[models]]\nid = "acme/dear-then-good"')
    first, good, other = rest.partition('provider = "good"')
    other = other.replace('prompt = "0.000001", completion = "0.000002"', 'prompt = "0.000003", completion = "0.000006"', 1)
    catalog = head + model + first + good + other
    head, model, rest = catalog.partition('[[models]]\nid = "acme/small-then-good"')
    return (
        head + model + rest.replace('provider = "first"\n', 'provider = "first"\ncontext_length = 4096\n', 1).replace("= 8192", "= 4096", 1)
    )


stage = stage_of(
    settings={
        "timeouts": {"connect_s": 1.0, "headers_s": HEADERS_S, "idle_s": IDLE_S, "keepalive_s": 60.0},
    },
    models=CATALOG,
    catalog=priced,
)


@pytest.fixture(autouse=True)
def _faulty(stage: Stage) -> None:
    for name, behaviour in SIMULATED.items():
        stage.first.set_behaviour(behaviour, name)
        stage.first.set_behaviour(behaviour, f"{name}-then-good")


def asked(stage: Stage, name: str) -> int:
    """Requests that a faulty endpoint has had."""
    return sum(entry.model == name for entry in stage.first.books.entries)


def by_good(answered: Answered) -> bool:
    """Whether the whole answer is the healthy endpoint's, and once."""
    if answered.headers["Content-Type"] == "text/event-stream":
        return answered.text == TEXT and answered.events[-1] == "[DONE]" and {each["provider"] for each in answered.events[:-1]} == {"Good"}
    return bool(answered.json["provider"] == "Good" and answered.json["choices"][0]["message"]["content"] == TEXT)


BEFORE = [(name, stream) for name, fault in BEFORE_CONTENT.items() for stream in fault.streams]


@pytest.mark.parametrize(("name", "stream"), BEFORE)
@again_if_untimely
async def test_ups_02_a_fault_before_content_is_answered_by_another(stage: Stage, name: str, stream: bool) -> None:
    fault, model = BEFORE_CONTENT[name], f"{name}-{stream:d}-then-good"
    before = asked(stage, model)
    answered = await stage.ask(f"acme/{model}", stream=stream, headers=EXPLAIN)
    assert answered.status == 200 and by_good(answered)
    assert asked(stage, model) - before <= 1
    told = (answered.events[-2] if stream else answered.json)["openrouter_metadata"]
    assert told["attempt"] == len(told["attempts"]) <= 2
    in_time(answered.seconds, fault.least_s + 0.2)


@pytest.mark.parametrize(("name", "stream"), BEFORE)
@again_if_untimely
async def test_ups_02_a_fault_without_alternative_is_told_within_its_time(stage: Stage, name: str, stream: bool) -> None:
    fault, model = BEFORE_CONTENT[name], f"{name}-{stream:d}"
    before = asked(stage, model)
    answered = await stage.ask(f"acme/{model}", stream=stream)
    assert answered.status == fault.status
    assert answered.error["metadata"]["error_type"] == fault.error_type
    assert asked(stage, model) - before <= fault.attempts
    in_time(answered.seconds, fault.least_s + 0.3, at_least=0.9 * fault.least_s)


async def test_ups_03_a_provider_that_said_when_is_not_asked_before(stage: Stage) -> None:
    answers = [await stage.ask(f"acme/throttled-for-7s-0{more}") for more in ("", "-then-good") for _ in range(10)]
    assert {answered.status for answered in answers[:10]} == {429} and {answered.status for answered in answers[10:]} == {200}
    assert all(1 <= int(answered.headers["Retry-After"]) <= 7 for answered in answers[:10])
    assert asked(stage, "throttled-for-7s-0") <= 1 and asked(stage, "throttled-for-7s-0-then-good") <= 1


async def test_ups_03_a_provider_that_did_not_say_when_rests_for_a_moment_where_another_serves(stage: Stage) -> None:
    answers = [await stage.ask("acme/throttled-0-then-good", provider={}) for _ in range(20)]
    assert all(by_good(answered) for answered in answers)
    assert asked(stage, "throttled-0-then-good") <= 3


async def test_a_500_once_is_mended_by_one_quick_repetition(stage: Stage) -> None:
    refusal = plain(b'{"error": {"message": "out of memory"}}').replace(b"200 OK", b"500 Oops")
    answers = iter([refusal, plain(completion("mended"))])

    async def script(call: RawCall) -> None:
        await call.write(next(answers))

    stage.raw.script = script
    answered = await stage.ask("acme/once", headers=EXPLAIN)
    assert (answered.status, answered.json["choices"][0]["message"]["content"]) == (200, "mended")
    told = answered.json["openrouter_metadata"]
    assert (told["attempt"], [each["status"] for each in told["attempts"]]) == (2, [500, 200])
    assert next(answers, None) is None


@again_if_untimely
async def test_a_late_first_token_moves_on_after_twice_the_endpoints_own_usual_and_waits_where_nobody_is_quicker(stage: Stage) -> None:
    for name in ("late", "late-then-good"):
        for _ in range(8):
            assert (await stage.ask(f"acme/{name}", stream=True)).status == 200
    await asyncio.sleep(5.0)  # the percentiles of an endpoint are worked out every five seconds
    assert (await stage.ask("acme/late-then-good", stream=True)).text == TEXT
    for name in ("late", "late-then-good"):
        stage.first.set_behaviour(Behaviour(headers_delay_ms=100, ttft_ms=LATE_S * 1000), name)
    moved = await stage.ask("acme/late-then-good", stream=True)
    assert by_good(moved)
    in_time(moved.seconds, LATE_S - 0.2, at_least=0.9 * FIRST_TOKEN_S_MIN)


@pytest.mark.parametrize("name", AFTER_CONTENT)
@again_if_untimely
async def test_str_05_a_fault_after_content_is_one_error_event_and_no_second_attempt(stage: Stage, name: str) -> None:
    good = stage.good.books.requests
    answered = await stage.ask(f"acme/{name}-then-good", stream=True, headers=EXPLAIN)
    assert (answered.status, answered.text) == (200, text_of(3))
    *content, last = answered.events
    assert last["choices"][0]["finish_reason"] == "error" and last["error"]["code"] == 502
    assert not [each for each in content if each == "[DONE]" or "error" in each]
    assert stage.good.books.requests == good
    assert last["openrouter_metadata"]["attempt"] == 0
    in_time(answered.seconds, 0.3 + (IDLE_S if name == "stalls" else 0.0))


@pytest.mark.parametrize(("name", "attempts"), [("prefill-refused-then-raw", 2), ("prefill-refused-then-good", 3)])
@again_if_untimely
async def test_str_06_a_prefill_refused_is_tried_at_the_next_who_can_and_the_error_stands_where_nobody_can(
    stage: Stage, name: str, attempts: int
) -> None:
    refusal = plain(b'{"error": {"message": "this model does not support assistant message prefill", "type": "invalid_request_error"}}')
    stage.raw.answers(refusal.replace(b"200 OK", b"400 Bad Request"))
    stage.first.set_behaviour(AFTER_CONTENT["cut"], name)
    order = {"order": ["first", "raw", "good"], "continuation": True}
    answered = await stage.ask(f"acme/{name}", stream=True, provider=order, headers=EXPLAIN)
    told = stage.exchange(answered.headers["X-Generation-Id"])["attempts"]
    assert [(outcome, status) for _, outcome, status in told] == [
        ("stream_broken", 200),
        ("upstream_rejected", 400),
        ("ok", 200),
    ][:attempts]
    if attempts == 3:
        assert answered.text == TEXT and answered.events[-1] == "[DONE]"
    else:
        assert answered.text == text_of(3)
        last = answered.events[-1]
        assert (last["error"]["code"], last["error"]["metadata"]["provider_name"]) == (502, "First")
        assert last["choices"][0]["finish_reason"] == "error" and "[DONE]" not in answered.events
    in_time(answered.seconds, 0.3)


ODD = {
    "malformed event": (
        event({"content": "a"}) + b"data: {broken\n\n" + event({"content": "b"}, finish="stop") + b"data: [DONE]\n\n",
        "ab",
        True,
    ),
    "no done": (event({"content": "a"}) + event({"content": "b"}, finish="stop"), "ab", True),
    "no done, no finish": (event({"content": "a"}) + event({"content": "b"}), "ab", False),
    "junk after done": (event({"content": "ab"}, finish="stop") + b"data: [DONE]\n\ndata: {}\n\n", "ab", True),
}


@pytest.mark.parametrize("name", ODD)
async def test_str_05_a_stream_is_whole_when_its_protocol_says_so_and_malformed_events_reach_nobody(stage: Stage, name: str) -> None:
    data, text, whole = ODD[name]
    stage.raw.answers(SSE_HEAD + chunk(event(ROLE) + data) + b"0\r\n\r\n")
    answered = await stage.ask("acme/odd", stream=True)
    assert (answered.status, answered.text) == (200, text)
    assert b"broken" not in answered.body
    if whole:
        assert answered.events[-1] == "[DONE]"
    else:
        assert answered.events[-1]["choices"][0]["finish_reason"] == "error" and "[DONE]" not in answered.events


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", REFUSED)
async def test_a_request_that_was_refused_for_what_it_is_goes_to_another_model_only(stage: Stage, name: str, stream: bool) -> None:
    behaviour, error_type = REFUSED[name]
    model, before, good = f"acme/{name}-then-good", asked(stage, f"{name}-then-good"), stage.good.books.requests
    refused = await stage.ask(model, stream=stream)
    assert (refused.status, refused.error["metadata"]["error_type"]) == (behaviour.status, error_type)
    assert refused.error["message"] == behaviour.error_message
    assert (asked(stage, f"{name}-then-good") - before, stage.good.books.requests - good) == (1, 0)
    served = await stage.ask(model, stream=stream, models=[GOOD], provider={"order": ["first"]})
    assert served.status == 200 and by_good(served)
    assert (served.events[0] if stream else served.json)["model"] == GOOD
    both = await stage.ask(model, models=["acme/too-long"], provider={"order": ["first"]})
    assert (both.status, both.error["message"]) == (400, TOO_LONG.error_message)  # the last one's reason
    assert (await stage.ask(model, models=[GOOD], headers=EXPLAIN)).json["openrouter_metadata"]["strategy"] in ("direct", "fallback")


async def test_a_prompt_too_long_for_one_endpoint_goes_to_another_with_more_room(stage: Stage) -> None:
    assert by_good(await stage.ask("acme/small-then-good"))


async def test_led_12_who_served_is_paid_and_who_failed_is_not(stage: Stage) -> None:
    answered = await stage.ask("acme/dear-then-good")
    usage = answered.json["usage"]
    assert by_good(answered)
    assert round(usage["cost"] * 1e9) == usage["prompt_tokens"] * 3000 + usage["completion_tokens"] * 6000
    alone = await stage.ask("acme/dear")
    assert alone.status == 502
    line = stage.exchange(answered.headers["X-Generation-Id"])
    assert [(name, outcome, status) for name, outcome, status in line["attempts"]] == [
        ("acme/dear-then-good@first", "upstream_refused", 500),
        ("acme/dear-then-good@good", "ok", 200),
    ]


async def test_no_call_counts_as_under_way_when_all_have_ended(stage: Stage) -> None:
    """After all that was done to them above; a held endpoint is not seen before it may be asked again."""
    for name in CATALOG:
        stage.first.set_behaviour(Behaviour(), name.removeprefix("acme/"))
    stage.raw.answers(plain(completion()))
    seen = set()
    for name in CATALOG:
        told = (await stage.ask(name, headers=EXPLAIN, models=[GOOD])).json["openrouter_metadata"]
        assert {each["calls"] for each in told["endpoints"]["available"]} == {0}
        seen |= {each["endpoint"] for each in told["endpoints"]["available"]}
    held = {f"{name}@first" for name in CATALOG if "7s" in name}
    assert seen >= {f"{name}@{slug}" for name, slugs in CATALOG.items() for slug in slugs} - held
