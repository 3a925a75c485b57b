"""OpenRouter's own Python client against a running gateway: its models are strict, so an answer that parses keeps the contract."""

from __future__ import annotations

import asyncio
import base64
import datetime
import hashlib
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from openrouter import OpenRouter, components, errors, operations
from openrouter.utils import BackoffStrategy, RetryConfig
from openrouter.utils.eventstreaming import EventStreamAsync

from bench.provider import Provider
from tests.conftest import MODEL, RunningGateway, render_catalog

pytestmark = pytest.mark.asyncio(loop_scope="module")
numbers = itertools.count(1)
QUESTION: list[components.ChatMessages] = [components.ChatUserMessage(role="user", content="Tell me about rivers.")]
# The client's own default goes on for an hour.
RETRIES = RetryConfig("backoff", BackoffStrategy(100, 500, 1.5, 3_000), retry_connection_errors=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningGateway]:
    """One for all tests here, with one model at one provider, and an account whose key is the gateway's."""
    async with Provider(name="North") as provider:
        running = RunningGateway(tmp_path_factory.mktemp("gateway"), render_catalog({"north": f"{provider.url}/v1"}))
        try:
            await asyncio.to_thread(running.start)
            await asyncio.to_thread(running.create_account)
            yield running
        finally:
            await asyncio.to_thread(running.close)


@pytest.fixture
def account(gateway: RunningGateway) -> dict[str, Any]:
    """Nobody else's, with 2.50 USD."""
    return gateway.create_account(f"eve{next(numbers)}@example.com", "2.50")


def client(gateway: RunningGateway, key: str | None = None) -> OpenRouter:
    return OpenRouter(api_key=key or gateway.key, server_url=f"{gateway.url}/api/v1", retry_config=RETRIES, timeout_ms=20_000)


async def test_a_whole_answer_parses(gateway: RunningGateway) -> None:
    async with client(gateway) as openrouter:
        answer = await openrouter.chat.send_async(model=MODEL, messages=QUESTION, max_tokens=32)
    assert isinstance(answer, components.ChatResult)
    assert answer.id.startswith("gen-") and answer.model == MODEL
    assert answer.choices[0].message.content and answer.choices[0].finish_reason
    assert answer.usage is not None and answer.usage.completion_tokens > 0


async def test_every_chunk_of_a_stream_parses(gateway: RunningGateway) -> None:
    async with client(gateway) as openrouter:
        stream = await openrouter.chat.send_async(model=MODEL, messages=QUESTION, max_tokens=32, stream=True)
        assert isinstance(stream, EventStreamAsync)
        async with stream:
            chunks = [chunk async for chunk in stream]
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].model == MODEL
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["stop"]
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens > 0


async def test_the_catalog_parses(gateway: RunningGateway) -> None:
    author, _, slug = MODEL.partition("/")
    async with client(gateway) as openrouter:
        listed = await openrouter.models.list_async(sort="pricing-low-to-high", max_price=5.0)
        assert listed is not None and [model.id for model in listed.result.data] == [MODEL]
        assert (await openrouter.models.count_async()).data.count == 1
        one = (await openrouter.models.get_async(author=author, slug=slug)).data
        assert (one.id, one.pricing.prompt, one.pricing.completion) == (MODEL, "0.000001", "0.000002")
        served = (await openrouter.endpoints.list_async(author=author, slug=slug)).data
        assert [(endpoint.provider_name, endpoint.tag, endpoint.max_completion_tokens) for endpoint in served.endpoints] == [
            ("North", "north", 8192)
        ]
        assert (await openrouter.endpoints.list_zdr_endpoints_async()).data == []
        assert [(provider.slug, provider.name) for provider in (await openrouter.providers.list_async()).data] == [("north", "North")]


async def test_refusals_become_the_errors_of_the_client(gateway: RunningGateway) -> None:
    async with client(gateway, "sk-or-v1-" + "0" * 64) as openrouter:
        with pytest.raises(errors.UnauthorizedResponseError):
            await openrouter.chat.send_async(model=MODEL, messages=QUESTION)
    async with client(gateway) as openrouter:
        with pytest.raises(errors.BadRequestResponseError):
            await openrouter.chat.send_async(model="acme/none", messages=QUESTION)
        with pytest.raises(errors.NotFoundResponseError):
            await openrouter.models.get_async(author="acme", slug="none")
        with pytest.raises(errors.BadRequestResponseError):
            await openrouter.models.list_async(limit=1001)


# The client warns of fields of the key that it itself still requires.
@pytest.mark.filterwarnings(r"ignore:warning. \*\* DEPRECATED \*\*:DeprecationWarning")
async def test_the_key_and_the_credits_parse_for_either_key_class(gateway: RunningGateway, account: dict[str, Any]) -> None:
    for secret, management in ((account["key"], False), (account["management_key"], True)):
        async with client(gateway, secret) as openrouter:
            credits = (await openrouter.credits.get_credits_async()).data
            assert (credits.total_credits, credits.total_usage) == (2.5, 0)
            key = (await openrouter.api_keys.get_current_key_metadata_async()).data
            assert (key.is_management_key, key.limit, key.usage, key.is_free_tier) == (management, None, 0, False)
            assert key.label.startswith("sk-or-v1-") and secret not in key.label
    async with client(gateway, account["key"] + "0") as openrouter:
        with pytest.raises(errors.UnauthorizedResponseError):
            await openrouter.credits.get_credits_async()


@pytest.mark.parametrize("streamed", [False, True])
async def test_what_an_answer_cost_is_in_its_generation_and_off_the_credits(
    gateway: RunningGateway, account: dict[str, Any], streamed: bool
) -> None:
    async with client(gateway, account["key"]) as openrouter:
        result = await openrouter.chat.send_async(model=MODEL, messages=QUESTION, max_tokens=32, stream=streamed)
        if isinstance(result, EventStreamAsync):
            async with result:
                *_, last = [chunk async for chunk in result]
            generation_id, usage = last.id, last.usage
        else:
            generation_id, usage = result.id, result.usage
        assert usage is not None
        generation = await recorded(openrouter, generation_id)
        assert (generation.model, generation.provider_name, generation.streamed) == (MODEL, "North", streamed)
        assert (generation.native_tokens_prompt, generation.native_tokens_completion) == (usage.prompt_tokens, usage.completion_tokens)
        cost = (usage.prompt_tokens + 2 * usage.completion_tokens) / 1_000_000
        assert generation.total_cost == generation.usage == usage.cost == pytest.approx(cost, abs=1e-9)
        assert (await openrouter.credits.get_credits_async()).data.total_usage == generation.total_cost
        assert [attempt.status for attempt in generation.provider_responses or ()] == [200]


async def test_a_generation_of_nobody_is_the_404_of_the_client(gateway: RunningGateway) -> None:
    async with client(gateway) as openrouter:
        with pytest.raises(errors.NotFoundResponseError):
            await openrouter.generations.get_generation_async(id="gen-1764031697-00000000000000000000")


async def test_keys_are_made_listed_read_changed_and_deleted(gateway: RunningGateway, account: dict[str, Any]) -> None:
    async with client(gateway, account["management_key"]) as openrouter:
        keys = openrouter.api_keys
        expires = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)
        made = await keys.create_async(name="ci", limit=0.75, limit_reset="weekly", include_byok_in_limit=True, expires_at=expires)
        assert (made.data.name, made.data.limit, made.data.limit_reset, made.data.expires_at) == ("ci", 0.75, "weekly", expires)
        assert made.data.creator_user_id == account["account_id"]
        listed = (await keys.list_async(include_disabled=True, offset=0)).data
        assert [key.name for key in listed] == ["ci", "default"] and listed[0].workspace_id == made.data.workspace_id
        changed = (await keys.update_async(hash=made.data.hash, name="cd", limit=1.5, disabled=True)).data
        assert (changed.name, changed.limit, changed.disabled, changed.limit_reset) == ("cd", 1.5, True, "weekly")
        assert (await keys.get_async(hash=made.data.hash)).data.updated_at is not None
        assert (await keys.delete_async(hash=made.data.hash)).DELETED
        with pytest.raises(errors.NotFoundResponseError):
            await keys.get_async(hash=made.data.hash)
        with pytest.raises(errors.BadRequestResponseError):
            await keys.create_async(name="")
    async with client(gateway, account["key"]) as openrouter:
        with pytest.raises(errors.ForbiddenResponseError):
            await openrouter.api_keys.create_async(name="x")


async def test_activity_the_models_of_an_account_and_stored_content_parse(gateway: RunningGateway, account: dict[str, Any]) -> None:
    async with client(gateway, account["management_key"]) as openrouter:
        yesterday = datetime.datetime.now(datetime.UTC).date() - datetime.timedelta(days=1)
        activity = await openrouter.analytics.get_user_activity_async(request={"date_": yesterday.isoformat()})
        assert activity.data == []
        with pytest.raises(errors.BadRequestResponseError):
            await openrouter.analytics.get_user_activity_async(request={"date_": "2020-01-01"})
    async with client(gateway, account["key"]) as openrouter:
        with pytest.raises(errors.ForbiddenResponseError):
            await openrouter.analytics.get_user_activity_async(request={})
        security = operations.ListModelsUserSecurity(bearer=account["key"])
        listed = await openrouter.models.list_for_user_async(security=security)
        assert listed is not None and [model.id for model in listed.result.data] == [MODEL]
        vectors = await openrouter.embeddings.list_models_async()
        assert vectors is not None and vectors.result.data == []
        with pytest.raises(errors.NotFoundResponseError):
            await openrouter.generations.list_generation_content_async(id="gen-1764031697-00000000000000000000")


async def test_a_code_is_made_and_taken_for_a_key_that_serves(gateway: RunningGateway, account: dict[str, Any]) -> None:
    verifier = "a-verifier-that-only-the-application-knows-43-or-more"
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    async with client(gateway, account["management_key"]) as openrouter:
        code = await openrouter.o_auth.create_auth_code_async(
            callback_url="https://app.example/", code_challenge=challenge, code_challenge_method="S256", limit=1.0, usage_limit_type="daily"
        )
        taken = await openrouter.o_auth.exchange_auth_code_for_api_key_async(
            code=code.data.id, code_verifier=verifier, code_challenge_method="S256"
        )
        assert taken.user_id == account["account_id"]
        with pytest.raises(errors.ForbiddenResponseError):
            await openrouter.o_auth.exchange_auth_code_for_api_key_async(code=code.data.id, code_verifier=verifier)
    async with client(gateway, taken.key) as openrouter:
        answer = await openrouter.chat.send_async(model=MODEL, messages=QUESTION, max_tokens=32)
        assert isinstance(answer, components.ChatResult) and answer.choices[0].message.content


async def recorded(openrouter: OpenRouter, generation_id: str) -> components.GenerationResponseData:
    """The record, asked for as clients do: again while it is a 404. Raises TimeoutError."""
    async with asyncio.timeout(5.0):
        while True:
            try:
                return (await openrouter.generations.get_generation_async(id=generation_id)).data
            except errors.NotFoundResponseError:
                await asyncio.sleep(0.05)
