"""`GET /generation?id=`: the durable record of one exchange, for every key of the account that made it.

A foreign generation and one that never was get the same answer, so ids cannot be probed for. A record is there once
control has read it from its edge's journal, a moment after the answer ended: until then it is a 404, and clients ask again.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta

from gateway.control.api.apps import app_of
from gateway.control.api.http import answer, iso_time
from gateway.control.api.route import Call, Nothing, Route
from gateway.control.api.workspace import workspace_of
from gateway.control.catalog_source import CatalogSource
from gateway.control.store import Store
from gateway.domain.catalog import Catalog
from gateway.domain.errors import NotFound
from gateway.domain.generation import AttemptRecord, Generation
from gateway.domain.money import usd_number

Row = dict[str, Any]

ID = re.compile(r"[A-Za-z0-9_-]{1,100}")  # what may be an id at all; the rest need not trouble the store
_API_TYPES = {"chat": "completions", "text": "completions"}  # others are called the same as our kinds


class GenerationQuery(msgspec.Struct, frozen=True):
    id: Annotated[str, Meta(min_length=1, examples=["gen-1764031697-aB3dE5fG7hJ9kL1mN2pQ"])]


class GenerationApi:
    """Handlers over stored generations; display names come from the catalog in force."""

    def __init__(self, *, store: Store, catalogs: CatalogSource) -> None:
        self._store = store
        self._catalogs = catalogs

    def routes(self) -> list[Route]:
        return [
            Route(
                method="GET", path="/generation", access="either", handler=self.get_generation, query=GenerationQuery,
                summary="The record of one exchange, a moment after it ended",
            ),
        ]  # fmt: skip

    async def get_generation(self, call: Call[GenerationQuery, Nothing]) -> web.Response:
        found = await self._store.generation(call.query.id) if ID.fullmatch(call.query.id) else None
        if found is None or found.account_id != call.caller.account_id:
            raise NotFound("Generation not found")
        return answer({"data": generation_row(found, self._catalogs.catalog)})


def generation_row(generation: Generation, catalog: Catalog) -> Row:
    """Every key of the contract. Null: not known, or not of this kind of request."""
    cost_usd = usd_number(generation.charged_nanos)
    return {
        "id": generation.id,
        "upstream_id": generation.upstream_id or None,
        "session_id": generation.session_id or None,
        "created_at": iso_time(generation.created_at_ms),
        "model": generation.model,
        "provider_name": provider_name(generation.provider, catalog) if generation.provider else None,
        "provider_responses": [_attempt_row(attempt, catalog) for attempt in generation.attempts],
        "api_type": _API_TYPES.get(generation.kind, generation.kind),
        "streamed": generation.streamed,
        "cancelled": generation.cancelled,
        "finish_reason": generation.finish_reason,
        "native_finish_reason": generation.native_finish_reason,
        "total_cost": cost_usd,
        "usage": cost_usd,
        "cache_discount": None,
        "is_byok": False,
        "upstream_inference_cost": None,  # of keys that callers bring along
        "latency": generation.latency_ms,
        "generation_time": generation.generation_ms,
        "moderation_latency": None,
        **_counts(generation),
        "origin": generation.http_referer,
        "http_referer": generation.http_referer or None,
        "user_agent": generation.user_agent or None,
        "app_id": app_of(generation.http_referer, generation.title),
        "external_user": generation.external_user or None,
        "router": None,
        "preset_id": None,
        "service_tier": None,
        "data_region": "global",
        "web_search_engine": None,
        "workspace_id": workspace_of(generation.account_id),
    }


def _counts(generation: Generation) -> Row:
    """Tokens as the provider counted them: we have no second tokenizer to normalise with."""
    usage = generation.usage
    return {
        "tokens_prompt": usage.prompt_tokens if usage else None,
        "tokens_completion": usage.completion_tokens if usage else None,
        "native_tokens_prompt": usage.prompt_tokens if usage else None,
        "native_tokens_completion": usage.completion_tokens if usage else None,
        "native_tokens_completion_images": None,
        "native_tokens_reasoning": usage.reasoning_tokens if usage else None,
        "native_tokens_cached": usage.cached_tokens if usage else None,
        "num_media_prompt": usage.images if usage else None,
        "num_media_completion": None,
        "num_input_audio_prompt": None,
        "num_search_results": None,
        "num_fetches": None,
    }


def _attempt_row(attempt: AttemptRecord, catalog: Catalog) -> Row:
    model_id = attempt.endpoint_id.rpartition("@")[0]
    model = catalog.find(model_id)
    row: Row = {
        "status": attempt.status,
        "provider_name": provider_name(attempt.provider, catalog),
        "endpoint_id": attempt.endpoint_id,
        "model_permaslug": model.canonical_slug if model is not None else model_id,
        "is_byok": False,
    }
    if attempt.latency_ms is not None:
        row["latency"] = attempt.latency_ms
    return row


def provider_name(slug: str, catalog: Catalog) -> str:
    """As callers know it; a provider that left the catalog keeps its slug."""
    provider = catalog.providers.get(slug)
    return provider.name if provider is not None else slug
