"""`/generation/content`: what was said in an exchange, where the account had it kept; and its deletion.

A foreign exchange, one of which nothing was kept and one that never was get the same answer, so ids cannot be probed for.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from gateway.control.api.generation import ID, GenerationQuery, provider_name
from gateway.control.api.http import answer
from gateway.control.api.route import Call, Nothing, Route
from gateway.control.catalog_source import CatalogSource
from gateway.control.content.said import Failure, read_exchange
from gateway.control.content.store import ContentStore
from gateway.control.store import Store
from gateway.domain.errors import BadRequest, NotFound
from gateway.domain.generation import AttemptRecord

# A list, byte for byte as the caller wrote it.
Messages = Annotated[msgspec.Raw, Meta(extra_json_schema={"type": "array", "items": {}})]
OK = "ok"  # an attempt's outcome that is none of errors


class ContentInput(msgspec.Struct, frozen=True):
    """One of the two."""

    prompt: str | UnsetType = UNSET
    messages: Messages | UnsetType = UNSET


class ContentOutput(msgspec.Struct, frozen=True):
    completion: str | None
    reasoning: str | None


class ContentAttempt(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt that failed before the error that the caller was told."""

    code: int
    message: str
    provider_name: str | None
    raw: str | None


class ContentError(msgspec.Struct, frozen=True, kw_only=True):
    message: str | None
    provider_name: str | None
    raw: str | None
    status: int | None
    previous_errors: list[ContentAttempt]


class ContentRow(msgspec.Struct, frozen=True, kw_only=True):
    input: ContentInput
    output: ContentOutput
    error: ContentError | None
    truncated: bool  # there was more; where a request or a plain answer was cut, what is left of it stands as text


class ContentAnswer(msgspec.Struct, frozen=True):
    data: ContentRow


class ContentDeletion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the two."""

    id: str | UnsetType = UNSET
    all: bool = False  # everything that the account had kept


class ContentDeleted(msgspec.Struct, frozen=True, kw_only=True):
    count: int
    deleted: Literal[True] = True


class ContentApi:
    """Handlers over what accounts have kept; `store` tells what became of the attempts before an error."""

    def __init__(self, *, content: ContentStore, store: Store, catalogs: CatalogSource) -> None:
        self._content = content
        self._store = store
        self._catalogs = catalogs

    def routes(self) -> list[Route]:
        return [
            Route(
                method="GET", path="/generation/content", access="either", handler=self.get_generation_content, query=GenerationQuery,
                answer=ContentAnswer, summary="What was said in one exchange, where the account had it kept",
            ),
            Route(
                method="DELETE", path="/generation/content", access="management", handler=self.delete_generation_content,
                query=ContentDeletion, answer=ContentDeleted, summary="Delete what was kept of one exchange, or of all of the account",
            ),
        ]  # fmt: skip

    async def get_generation_content(self, call: Call[GenerationQuery, Nothing]) -> web.Response:
        account_id, sought = call.caller.account_id, call.query.id
        exchange = await self._content.find(sought, account_id) if ID.fullmatch(sought) else None
        if exchange is None:
            raise NotFound("Generation content not found")
        said = await asyncio.to_thread(read_exchange, exchange)
        row = ContentRow(
            input=ContentInput(messages=said.messages) if said.messages is not None else ContentInput(prompt=said.prompt),
            output=ContentOutput(said.completion, said.reasoning),
            error=await self._error(sought, account_id, said.error) if said.error is not None else None,
            truncated=exchange.truncated,
        )
        return answer(ContentAnswer(row))

    async def delete_generation_content(self, call: Call[ContentDeletion, Nothing]) -> web.Response:
        account_id, sought = call.caller.account_id, call.query.id
        if isinstance(sought, str) == call.query.all:
            raise BadRequest("id or all=true: one of them says what is to be deleted")
        if not isinstance(sought, str):
            return answer(ContentDeleted(count=await self._content.delete_all(account_id)))
        if not ID.fullmatch(sought) or not await self._content.delete(sought, account_id):
            raise NotFound("Generation content not found")
        return answer(ContentDeleted(count=1))

    async def _error(self, generation_id: str, account_id: str, told: Failure) -> ContentError:
        generation = await self._store.generation(generation_id)
        failed: list[AttemptRecord] = []
        if generation is not None and generation.account_id == account_id:
            failed = [attempt for attempt in generation.attempts if attempt.outcome != OK]
        return ContentError(
            message=told.message,
            provider_name=told.provider_name or (self._name(failed[-1]) if failed else None),
            raw=told.raw,
            status=told.status,
            previous_errors=[
                ContentAttempt(code=attempt.status or 502, message=attempt.outcome, provider_name=self._name(attempt), raw=None)
                for attempt in failed[:-1]  # the last one is what the caller was told
            ],
        )

    def _name(self, attempt: AttemptRecord) -> str:
        return provider_name(attempt.provider, self._catalogs.catalog)
