"""`X-OpenRouter-Metadata: enabled`: how an endpoint was chosen and what was tried, beside the answer or the error."""

from __future__ import annotations

from typing import Any

import pytest

from bench.behaviour import Behaviour
from tests.edge.stage import FIRST, FIRST_THEN_GOOD, GOOD, RAW, SSE_HEAD, Answered, Stage, behaving, chunk, event, plain, sse, stage_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEYS = {"requested", "strategy", "region", "summary", "attempt", "is_byok", "endpoints", "attempts"}
ENABLED = {"X-OpenRouter-Metadata": "enabled"}

stage = stage_of(models={"acme/throttled": ("first",)})


def told(answered: Answered, *, stream: bool = False) -> dict[str, Any]:
    """The metadata of a whole answer or of the last event before `[DONE]`; asserts its shape."""
    where = answered.events[-2] if stream else answered.json
    found: dict[str, Any] = where["openrouter_metadata"]
    assert set(found) == KEYS and found["is_byok"] is False and found["region"] is None
    endpoints = found["endpoints"]
    assert endpoints["total"] >= len(endpoints["available"])
    for each in endpoints["available"]:
        assert isinstance(each["provider"], str) and isinstance(each["model"], str) and isinstance(each["selected"], bool)
    for each in found["attempts"]:
        assert isinstance(each["provider"], str) and isinstance(each["model"], str) and type(each["status"]) is int
    return found


@pytest.mark.parametrize("header", ["X-OpenRouter-Metadata", "x-openrouter-experimental-metadata"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_is_explained_to_who_asks(stage: Stage, stream: bool, header: str) -> None:
    with behaving(stage.first, Behaviour(status=503)):
        answered = await stage.ask(FIRST_THEN_GOOD, stream=stream, headers={header: "Enabled"})
    found = told(answered, stream=stream)
    assert (found["requested"], found["strategy"], found["attempt"]) == (FIRST_THEN_GOOD, "direct", 2)
    assert [(each["provider"], each["status"]) for each in found["attempts"]] == [("First", 503), ("Good", 200)]
    assert [(each["provider"], each["selected"]) for each in found["endpoints"]["available"]] == [("First", False), ("Good", True)]
    assert all(each["reason"] and each["cost"] >= 1.0 and each["calls"] == 0 for each in found["endpoints"]["available"])
    assert (answered.events[-2] if stream else answered.json)["usage"]["cost"] > 0
    if stream:
        assert sum(b"openrouter_metadata" in line for line in answered.body.split(b"\n")) == 1


@pytest.mark.parametrize("headers", [{}, {"X-OpenRouter-Metadata": "disabled"}, {"X-OpenRouter-Metadata": ""}])
async def test_nobody_else_is_told(stage: Stage, headers: dict[str, str]) -> None:
    answers = [await stage.ask(GOOD, stream=stream, headers=headers) for stream in (False, True)]
    answers.append(await stage.ask(GOOD, provider={"only": ["nobody"]}, headers=headers))
    assert not [answered for answered in answers if b"openrouter_metadata" in answered.body]


async def test_an_answer_of_an_unusual_form_is_explained_as_well(stage: Stage) -> None:
    body = (
        b'{"choices": [{"message": {"content": "a", "role": "assistant"}, "finish_reason": "stop", "index": 0}], "usage": null, "x": [1]}'
    )
    stage.raw.answers(plain(body))
    answered = await stage.ask(RAW, headers=ENABLED)
    assert told(answered)["attempt"] == 1 and answered.json["x"] == [1] and answered.json["usage"]["completion_tokens"]
    stage.raw.answers(SSE_HEAD + chunk(event({"content": "a"}) + event({}, finish="stop") + sse("[DONE]")) + b"0\r\n\r\n")
    answered = await stage.ask(RAW, stream=True, headers=ENABLED)
    assert told(answered, stream=True)["attempt"] == 1


async def test_errors_are_explained_beside_the_error(stage: Stage) -> None:
    nobody = await stage.ask(GOOD, provider={"only": ["nobody"]}, headers=ENABLED)
    assert nobody.status == 404 and (found := told(nobody))["attempt"] == 0
    assert (found["endpoints"], found["attempts"]) == ({"total": 1, "available": []}, [])
    with behaving(stage.first, Behaviour(status=400, error_message="odd")):
        refused = await stage.ask(FIRST, headers=ENABLED)
    assert (refused.status, refused.error["message"]) == (400, "odd")
    assert [each["status"] for each in told(refused)["attempts"]] == [400]
    await stage.first.down()
    try:
        down = await stage.ask(FIRST, stream=True, headers=ENABLED)
    finally:
        await stage.first.up()
    assert down.status == 502
    assert [(each["status"], each["outcome"]) for each in told(down)["attempts"]] == [(502, "connect_failed")]
    unknown = await stage.ask("acme/nothing", headers=ENABLED)
    assert unknown.status == 400 and told(unknown)["endpoints"]["total"] == 0


async def test_rate_limits_and_keys_are_not_explained(stage: Stage) -> None:
    with behaving(stage.first, Behaviour(status=429, retry_after="5")):
        for _ in range(2):
            throttled = await stage.ask("acme/throttled", headers=ENABLED)
            assert throttled.status == 429 and set(throttled.json) == {"error"}
    unknown = await stage.ask(GOOD, headers={**ENABLED, "Authorization": "Bearer sk-or-v1-no"})
    assert unknown.status == 401 and set(unknown.json) == {"error"}


async def test_another_model_that_served_is_a_fallback(stage: Stage) -> None:
    with behaving(stage.first, Behaviour(status=500)):
        found = told(await stage.ask(FIRST, models=[GOOD], headers=ENABLED))
    assert (found["requested"], found["strategy"], found["endpoints"]["total"]) == (FIRST, "fallback", 2)
    assert [each["model"] for each in found["attempts"]] == [FIRST, GOOD]
