"""Callers who ask for what is not to be had here learn it at once, by an error that their client does not retry; no provider is asked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openrouter import OpenRouter, components, errors

from tests.edge.stage import FIRST, FIRST_THEN_GOOD, GOOD, HELLO, Stage, staged

pytestmark = pytest.mark.asyncio(loop_scope="module")

MESSAGES: Any = HELLO
WISHES: list[tuple[dict[str, Any], str]] = [
    ({"model": f"{GOOD}:online"}, "model: :online "),
    ({"model": f"{GOOD}:nitro:online"}, "model: :online "),
    ({"extra_body": {"models": [FIRST, f"{GOOD}:online"]}}, "model: :online "),
    ({"extra_body": {"plugins": [{"id": "web"}]}}, "plugins[0].id: "),
    ({"extra_body": {"preset": "mine"}}, "preset: "),
    ({"model": "@preset/mine"}, "@preset/mine is not a valid model ID"),
    ({"tools": [{"type": "openrouter:web_search"}]}, "tools[0].type: "),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    """The provider `first` has no key."""

    def keyless(text: str) -> str:
        return text.replace('slug = "first"\n', 'slug = "first"\napi_key_env = "NOBODY_SET_THIS"\n')

    async with staged(tmp_path_factory.mktemp("unserved"), catalog=keyless) as running:
        yield running


class Client:
    """The official one as it comes, with its own retries; `requests` are all that it made."""

    def __init__(self, stage: Stage) -> None:
        self.requests = 0
        http = openai.DefaultAsyncHttpxClient(event_hooks={"request": [self._on_request]})
        self.openai = openai.AsyncOpenAI(base_url=f"{stage.gateway.url}/v1", api_key=stage.gateway.key, timeout=10.0, http_client=http)

    async def _on_request(self, request: object) -> None:
        self.requests += 1

    async def ask(self, **asked: Any) -> Any:
        return await self.openai.chat.completions.create(**{"model": GOOD, "messages": MESSAGES, **asked})


@pytest_asyncio.fixture(loop_scope="module")
async def client(stage: Stage) -> AsyncIterator[Client]:
    client = Client(stage)
    async with client.openai:
        yield client


async def refused(stage: Stage, client: Client, kind: type[openai.APIStatusError], **asked: Any) -> dict[str, Any]:
    """The error of a request that was made once, and never reached a provider."""
    before = client.requests, stage.good.books.requests, stage.first.books.requests
    with pytest.raises(kind) as caught:
        await client.ask(**asked)
    assert (client.requests, stage.good.books.requests, stage.first.books.requests) == (before[0] + 1, *before[1:])
    body: Any = caught.value.body
    assert isinstance(body, dict) and body["code"] == caught.value.status_code
    return body


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("wish", "told"), WISHES)
async def test_a_wish_that_nobody_serves_is_refused_and_named(
    stage: Stage, client: Client, wish: dict[str, Any], told: str, stream: bool
) -> None:
    error = await refused(stage, client, openai.BadRequestError, stream=stream, **wish)
    assert error["message"].startswith(told)
    assert error["metadata"]["error_type"] == "invalid_request"


async def test_a_model_whose_provider_has_no_key_is_not_found_and_says_who_can_help(stage: Stage, client: Client) -> None:
    for asked in ({}, {"extra_body": {"provider": {"sort": "price"}}}, {"model": f"{FIRST}:nitro"}):
        error = await refused(stage, client, openai.NotFoundError, **{"model": FIRST, **asked})
        assert error["message"].startswith(f"No endpoints found for {FIRST}: ") and "has to set its key" in error["message"]
        assert (error["availability"]["code"], error["availability"]["retryable"]) == ("no_endpoints", False)


async def test_another_provider_or_model_serves_in_its_place(client: Client) -> None:
    assert (await client.ask(model=FIRST_THEN_GOOD)).provider == "Good"
    answer = await client.ask(model=FIRST, extra_body={"models": [GOOD]})
    assert answer.model == GOOD


async def test_openrouters_client_is_told_the_same_at_once(stage: Stage) -> None:
    question: list[components.ChatMessages] = [components.ChatUserMessage(role="user", content="Hello")]
    async with OpenRouter(api_key=stage.gateway.key, server_url=f"{stage.gateway.url}/api/v1", timeout_ms=10_000) as openrouter:
        with pytest.raises(errors.NotFoundResponseError):
            await openrouter.chat.send_async(model=FIRST, messages=question)
        with pytest.raises(errors.BadRequestResponseError):
            await openrouter.chat.send_async(model=f"{GOOD}:online", messages=question)
