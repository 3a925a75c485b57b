"""The gateway in front of what a real llama.cpp sent, head and chunked coding included, as it was recorded from the socket."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.edge.stage import RAW, RawCall, Stage, staged
from tests.recordings import names, recording

pytestmark = pytest.mark.asyncio(loop_scope="module")

SERVER = "llama_cpp"
CHAT: dict[str, Any] = {}
TEXT: dict[str, Any] = {"path": "/api/v1/completions", "prompt": "Once"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with staged(tmp_path_factory.mktemp("recordings")) as running:
        yield running


def added(events: list[dict[str, Any]]) -> list[Any]:
    """What each event's choices add, in their order."""
    return [[(choice["index"], choice.get("delta"), choice.get("text")) for choice in event["choices"]] for event in events]


@pytest.mark.parametrize("name", names(SERVER, "stream"))
@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 20])
async def test_a_recorded_stream_arrives_whole(stage: Stage, name: str, piece_bytes: int) -> None:
    recorded = recording(SERVER, name)
    stage.raw.answers(*(recorded.raw[at : at + piece_bytes] for at in range(0, len(recorded.raw), piece_bytes)))
    answered = await stage.ask(RAW, stream=True, **TEXT if name == "stream-text" else CHAT)
    sent = [json.loads(line[6:]) for line in recorded.body.decode().split("\n") if line.startswith("data: {")]
    assert (answered.status, answered.events[-1]) == (200, "[DONE]")
    *events, last = answered.events[:-1]
    assert added(events) == added([event for event in sent if event["choices"]])
    assert {event["id"] for event in [*events, last]} == {answered.headers["X-Generation-Id"]}
    usage = [event["usage"] for event in sent if event.get("usage")]
    if usage:
        told = ("prompt_tokens", "completion_tokens", "total_tokens")
        assert [last["usage"][count] for count in told] == [usage[-1][count] for count in told]
    timings = [event["timings"] for event in sent if "timings" in event]
    assert timings == [event["timings"] for event in [*events, last] if "timings" in event] or name == "stream-two-choices"
    assert stage.exchange(last["id"])["status"] == 200


@pytest.mark.parametrize("name", names(SERVER, "whole"))
async def test_a_recorded_answer_arrives_whole_wherever_it_is_cut(stage: Stage, name: str) -> None:
    recorded = recording(SERVER, name)
    what = TEXT if name == "whole-text" else CHAT
    borders = [0, *range(1, len(recorded.raw), 97), len(recorded.raw)]

    async def script(call: RawCall) -> None:
        at = borders[1 + int(json.loads(call.body)["user"])]
        await call.write(recorded.raw[:at], recorded.raw[at:])

    stage.raw.script = script
    asked = [stage.ask(RAW, user=str(number), **what) for number, _ in enumerate(itertools.pairwise(borders))]
    before = json.loads(recorded.body)
    for answered in await asyncio.gather(*asked):
        assert answered.status == 200
        choices = [{name: value for name, value in choice.items() if name != "native_finish_reason"} for choice in answered.json["choices"]]
        assert choices == before["choices"]
        assert answered.json["timings"] == before["timings"]
        assert answered.json["usage"]["total_tokens"] == before["usage"]["total_tokens"]


@pytest.mark.parametrize(("name", "status"), [("error-context-exceeded", 400), ("error-loading", 502), ("error-no-image-support", 502)])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_recorded_error_is_quoted(stage: Stage, name: str, status: int, stream: bool) -> None:
    recorded = recording(SERVER, name)
    stage.raw.answers(recorded.raw)
    answered = await stage.ask(RAW, stream=stream)
    assert (answered.status, answered.error["metadata"]["raw"]) == (status, recorded.body.decode())
