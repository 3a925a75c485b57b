"""The official `openai` Python client, sync and async, against a running gateway: nothing but the base URL differs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import openai
import pytest
import pytest_asyncio

from bench.answers import text_of
from bench.behaviour import Behaviour
from tests.edge.stage import FIRST, GOOD, HELLO, Stage, behaving, staged

pytestmark = pytest.mark.asyncio(loop_scope="module")

THROTTLED = "acme/throttled"  # its provider says when to come back: it is nobody else's

MESSAGES: Any = HELLO
Kind = type[openai.OpenAI] | type[openai.AsyncOpenAI]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with staged(tmp_path_factory.mktemp("openai"), settings={"timeouts": {"idle_s": 1.0}}, models={THROTTLED: ("first",)}) as running:
        yield running


@pytest.fixture(scope="module", params=["/api/v1", "/v1"])
def base_url(request: pytest.FixtureRequest, stage: Stage) -> str:
    return stage.gateway.url + str(request.param)


class Client:
    """The sync client in a thread, or the async one; the same words for both."""

    def __init__(self, base_url: str, key: str, *, sync: bool) -> None:
        self.sync = sync
        self._sync = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=10.0)
        self._async = openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=10.0)

    async def call(self, ask: Callable[[Any], Any]) -> Any:
        """What `ask(client)` returns."""
        if self.sync:
            return await asyncio.to_thread(ask, self._sync)
        return await cast(Awaitable[Any], ask(self._async))

    async def stream(self, **body: Any) -> list[Any]:
        """The chunks of one chat."""
        if self.sync:
            return await asyncio.to_thread(lambda: list(self._sync.chat.completions.create(stream=True, **body)))
        return [part async for part in await self._async.chat.completions.create(stream=True, **body)]

    async def close(self) -> None:
        self._sync.close()
        await self._async.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["sync", "async"])
async def client(request: pytest.FixtureRequest, stage: Stage, base_url: str) -> AsyncIterator[Client]:
    made = Client(base_url, stage.gateway.key, sync=request.param == "sync")
    yield made
    await made.close()


async def test_a_whole_answer(client: Client) -> None:
    answer = await client.call(lambda api: api.chat.completions.create(model=GOOD, messages=MESSAGES))
    assert answer.choices[0].message.content == text_of(16)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id.startswith("gen-") and answer.model == GOOD and answer.provider == "Good"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 16


async def test_a_stream(client: Client) -> None:
    parts = await client.stream(model=GOOD, messages=MESSAGES)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == text_of(16)
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == "stop"
    assert parts[-1].usage.completion_tokens == 16 and parts[-1].choices == []
    assert len({part.id for part in parts}) == 1


async def test_a_stream_helper_reads_our_events_too(stage: Stage, base_url: str) -> None:
    async with openai.AsyncOpenAI(base_url=base_url, api_key=stage.gateway.key, max_retries=0) as api:
        async with api.chat.completions.stream(model=GOOD, messages=MESSAGES) as stream:
            final = await stream.get_final_completion()
    assert final.choices[0].message.content == text_of(16)


async def test_raw_responses_show_the_generation_id(client: Client) -> None:
    raw = await client.call(lambda api: api.chat.completions.with_raw_response.create(model=GOOD, messages=MESSAGES))
    assert raw.headers["X-Generation-Id"] == raw.parse().id
    assert raw.headers["Content-Type"] == "application/json"


async def test_legacy_completions(client: Client) -> None:
    answer = await client.call(lambda api: api.completions.create(model=GOOD, prompt="Once"))
    assert answer.choices[0].text == text_of(16) and answer.object == "text_completion"


@pytest.mark.parametrize("stream", [False, True])
async def test_tool_calls_pass_through(stage: Stage, client: Client, stream: bool) -> None:
    tools = [{"type": "function", "function": {"name": "take_note", "parameters": {"type": "object"}}}]
    with behaving(stage.first, Behaviour(tool_call=True)):
        if stream:
            parts = [part.choices[0] for part in await client.stream(model=FIRST, messages=MESSAGES, tools=tools) if part.choices]
            calls = [call for part in parts for call in part.delta.tool_calls or ()]
            name, arguments = calls[0].function.name, "".join(call.function.arguments or "" for call in calls)
            finish = parts[-1].finish_reason
        else:
            answer = await client.call(lambda api: api.chat.completions.create(model=FIRST, messages=MESSAGES, tools=tools))
            call = answer.choices[0].message.tool_calls[0]
            name, arguments, finish = call.function.name, call.function.arguments, answer.choices[0].finish_reason
    assert (name, finish) == ("take_note", "tool_calls")
    assert arguments.startswith('{"text":"') and arguments.endswith('"}')


@pytest.mark.parametrize("dialect", ["openai", "ollama", "groq", "llamacpp", "vllm", "changing_ids"])
async def test_reasoning_deltas_pass_through_in_every_dialect(stage: Stage, client: Client, dialect: Any) -> None:
    with behaving(stage.first, Behaviour(reasoning_deltas=3, dialect=dialect)):
        parts = await client.stream(model=FIRST, messages=MESSAGES)
    deltas = [part.choices[0].delta for part in parts if part.choices]
    thought = "".join(getattr(delta, "reasoning", None) or getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thought == text_of(3)
    assert "".join(delta.content or "" for delta in deltas) == text_of(16)
    assert len({part.id for part in parts}) == 1


# Failures, by the client's own classes.


async def test_a_wrong_key_is_an_authentication_error(base_url: str) -> None:
    for sync in (True, False):
        client = Client(base_url, "sk-or-v1-wrong", sync=sync)
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.call(lambda api: api.chat.completions.create(model=GOOD, messages=MESSAGES))
        await client.close()
        assert caught.value.status_code == 401
        body = cast(dict[str, Any], caught.value.body)
        assert (body["code"], body["message"]) == (401, "User not found.")


FAILURES: list[tuple[type[openai.APIStatusError], int, dict[str, Any], Behaviour]] = [
    (openai.BadRequestError, 400, {"model": "acme/nothing"}, Behaviour()),
    (openai.BadRequestError, 400, {"temperature": 9}, Behaviour()),
    (openai.BadRequestError, 400, {"messages": []}, Behaviour()),
    (openai.BadRequestError, 400, {}, Behaviour(status=400)),
    (openai.UnprocessableEntityError, 422, {}, Behaviour(status=422)),
    (openai.RateLimitError, 429, {"model": THROTTLED}, Behaviour(status=429, retry_after="3")),
    (openai.InternalServerError, 502, {}, Behaviour(status=500)),
    (openai.InternalServerError, 502, {}, Behaviour(status=401)),
    (openai.InternalServerError, 504, {}, Behaviour(status=504)),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("kind", "status", "body", "behaviour"), FAILURES)
async def test_failures_have_the_clients_classes(
    stage: Stage, client: Client, kind: type[openai.APIStatusError], status: int, body: dict[str, Any], behaviour: Behaviour, stream: bool
) -> None:
    asked = {"model": FIRST, "messages": MESSAGES, **body}
    with behaving(stage.first, behaviour), pytest.raises(kind) as caught:
        if stream:
            await client.stream(**asked)
        else:
            await client.call(lambda api: api.chat.completions.create(**asked))
    assert caught.value.status_code == status
    assert cast(dict[str, Any], caught.value.body)["code"] == status


async def test_an_unknown_model_is_not_found_in_the_list(client: Client) -> None:
    models = await client.call(lambda api: api.models.list())
    assert {model.id for model in models.data} >= {GOOD, FIRST}
    for missing in (lambda api: api.models.retrieve("acme/nothing"), lambda api: api.get("/no/such/route", cast_to=object)):
        with pytest.raises(openai.NotFoundError):
            await client.call(missing)


async def test_one_model_is_retrieved_by_its_name(client: Client) -> None:
    model = await client.call(lambda api: api.models.retrieve(GOOD))
    assert (model.id, model.object, model.owned_by) == (GOOD, "model", GOOD.partition("/")[0])
    assert model.created >= 0 and model.pricing["prompt"]


@pytest.mark.parametrize("how", [Behaviour(reset_after_events=4), Behaviour(error_event_after=4), Behaviour(stall_after_events=4)])
async def test_a_stream_that_breaks_raises_after_what_it_had_said(stage: Stage, client: Client, how: Behaviour) -> None:
    said: list[str] = []

    def read(api: openai.OpenAI) -> None:
        for part in api.chat.completions.create(model=FIRST, messages=MESSAGES, stream=True):
            said.append(part.choices[0].delta.content or "")

    async def read_async(api: openai.AsyncOpenAI) -> None:
        async for part in await api.chat.completions.create(model=FIRST, messages=MESSAGES, stream=True):
            said.append(part.choices[0].delta.content or "")

    with behaving(stage.first, how), pytest.raises(openai.APIError) as caught:
        await client.call(read if client.sync else read_async)
    assert "".join(said) == text_of(3)
    assert cast(dict[str, Any], caught.value.body)["code"] == 502
