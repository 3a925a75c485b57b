"""Errors that streams tell in other words than an `error` member at the top were passed on as answers: followed by usage and [DONE],
charged, and never tried elsewhere.
"""

from __future__ import annotations

import pytest

from tests.edge.stage import RAW_THEN_GOOD, ROLE, SSE_HEAD, Stage, chunk, event, sse, stage_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

stage = stage_of()

USAGE = sse({"id": "up-1", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}})
DONE = b"data: [DONE]\n\n"
WORDS = "the GPU is on fire"
CHOICE = {"index": 0, "delta": {"content": ""}, "finish_reason": None, "error": {"code": 502, "message": WORDS}}
ERRORS = {  # what a provider says, and what the caller reads of it
    "finish reason error": (event({}, finish="error"), "error"),
    "finish reason of a provider that gave up": (event({}, finish="insufficient_system_resource"), "insufficient_system_resource"),
    "finish reason beside a text": (event({"content": "lost"}, finish="error"), "error"),
    "error of a choice": (sse({"id": "up-1", "choices": [CHOICE]}), WORDS),
    "error of a choice that ends": (sse({"id": "up-1", "choices": [{**CHOICE, "finish_reason": "error"}]}), WORDS),
    "event named error": (b"event: error\n" + sse({"message": WORDS, "type": "server_error"}), WORDS),
    "event named error, in the member": (b"event: error\n" + sse({"error": {"message": WORDS}}), WORDS),
    "event named error, plain text": (b"event: error\ndata: " + WORDS.encode() + b"\n\n", WORDS),
    "object error": (sse({"object": "error", "message": WORDS, "type": "InternalServerError", "code": 500}), WORDS),
}


@pytest.mark.parametrize("told", ERRORS)
async def test_str_05_an_error_after_content_ends_the_stream_whatever_its_form(stage: Stage, told: str) -> None:
    said, words = ERRORS[told]
    stage.raw.answers(SSE_HEAD + chunk(event(ROLE) + event({"content": "a"}) + said + USAGE + DONE) + b"0\r\n\r\n")
    answered = await stage.ask(RAW_THEN_GOOD, stream=True)
    assert (answered.status, answered.text) == (200, "a")
    assert "[DONE]" not in answered.events and [part for part in answered.events if "error" in part] == answered.events[-1:]
    last = answered.events[-1]
    assert last["choices"] == [{"index": 0, "delta": {"content": ""}, "finish_reason": "error", "native_finish_reason": "error"}]
    assert type(last["error"]["code"]) is int and words in last["error"]["metadata"]["raw"]
    assert stage.exchange(answered.headers["X-Generation-Id"])["error"] == "stream_broken"  # which is free


@pytest.mark.parametrize("told", [told for told in ERRORS if told != "finish reason beside a text"])
async def test_an_error_before_content_is_tried_elsewhere_whatever_its_form(stage: Stage, told: str) -> None:
    stage.raw.answers(SSE_HEAD + chunk(event(ROLE) + ERRORS[told][0] + USAGE + DONE) + b"0\r\n\r\n")
    answered = await stage.ask(RAW_THEN_GOOD, stream=True)
    assert (answered.status, answered.events[-1]) == (200, "[DONE]") and answered.text
    assert {part["provider"] for part in answered.events[:-1]} == {"Good"}
