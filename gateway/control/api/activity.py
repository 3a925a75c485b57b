"""`GET /activity`: what each of the last 30 completed UTC days came to, by model and endpoint; as JSON or as CSV.

Sums are those of the ledger's own roll-up, to the nano; no generation is read for them.
"""

from __future__ import annotations

import csv
import datetime
import io
import time
from collections.abc import Callable, Iterable
from typing import Annotated, Literal

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from gateway.control.api.fields import require_own_workspace
from gateway.control.api.http import answer
from gateway.control.api.route import Call, Nothing, Route
from gateway.control.api.workspace import workspace_of
from gateway.control.catalog_source import CatalogSource
from gateway.control.store import Store
from gateway.control.store.management import DailyUsage
from gateway.domain.catalog import Catalog
from gateway.domain.errors import BadRequest
from gateway.domain.money import format_usd, usd_number

DAYS = 30
CSV_COLUMNS = (
    "date", "model", "model_permaslug", "endpoint_id", "provider_name", "usage", "requests", "prompt_tokens", "completion_tokens",
    "reasoning_tokens", "cached_tokens",
)  # fmt: skip
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # noqa: RUF001 - what spreadsheets take a cell for that begins so, full-width signs being signs to some


class ActivityQuery(msgspec.Struct, frozen=True, kw_only=True):
    date: Annotated[str, Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$", examples=["2026-11-24"])] | UnsetType = UNSET
    api_key_hash: Annotated[str, Meta(max_length=128)] | UnsetType = UNSET
    user_id: Annotated[str, Meta(max_length=128)] | UnsetType = UNSET
    group_by: Literal["workspace"] | UnsetType = UNSET
    workspace_id: Annotated[str, Meta(max_length=128)] | UnsetType = UNSET
    format: Literal["json", "csv"] = "json"


class ActivityRow(msgspec.Struct, frozen=True, kw_only=True):
    """`usage` in USD."""

    date: str
    model: str
    model_permaslug: str
    endpoint_id: str
    provider_name: str
    usage: float
    byok_usage_inference: float = 0
    requests: int
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int
    workspace_id: str | UnsetType = UNSET


class ActivityAnswer(msgspec.Struct, frozen=True):
    data: list[ActivityRow]


class ActivityApi:
    """Handler over the daily sums of the calling account. `now` is unix time."""

    def __init__(self, *, store: Store, catalogs: CatalogSource, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._catalogs = catalogs
        self._now = now

    def routes(self) -> list[Route]:
        return [
            Route(
                method="GET", path="/activity", access="management", handler=self.get_activity, query=ActivityQuery, answer=ActivityAnswer,
                also=("text/csv",),
                summary="Usage of the last 30 completed UTC days by model and endpoint; format=csv for a table",
            )
        ]  # fmt: skip

    async def get_activity(self, call: Call[ActivityQuery, Nothing]) -> web.Response:
        query, account_id = call.query, call.caller.account_id
        if query.workspace_id is not UNSET:
            require_own_workspace(query.workspace_id, account_id)
        first, last = self._days(query)
        keys: tuple[str, ...] | None = (query.api_key_hash,) if query.api_key_hash is not UNSET else None
        if query.user_id is not UNSET and query.user_id != account_id:
            keys = ()  # the only member of an account is its owner
        found = await self._store.daily_usage(account_id, first, last, keys)
        if query.format == "csv":
            name = {"Content-Disposition": f'attachment; filename="activity-{first}-{last}.csv"'}
            return web.Response(text=_csv(found, self._catalogs.catalog), content_type="text/csv", charset="utf-8", headers=name)
        workspace = workspace_of(account_id) if query.group_by is not UNSET else UNSET
        return answer(ActivityAnswer([_row(usage, self._catalogs.catalog, workspace) for usage in found]))

    def _days(self, query: ActivityQuery) -> tuple[str, str]:
        """The first and the last day asked for."""
        today = datetime.datetime.fromtimestamp(self._now(), datetime.UTC).date()
        first, last = today - datetime.timedelta(days=DAYS), today - datetime.timedelta(days=1)
        if query.date is not UNSET:
            try:
                day = datetime.date.fromisoformat(query.date)
            except ValueError:
                raise BadRequest("date: is no day; write YYYY-MM-DD") from None
            if not first <= day <= last:
                raise BadRequest(f"date: must be one of the last {DAYS} completed UTC days, {first} to {last}")
            first = last = day
        return first.isoformat(), last.isoformat()


def _row(usage: DailyUsage, catalog: Catalog, workspace: str | UnsetType = UNSET) -> ActivityRow:
    model, provider = catalog.find(usage.model), catalog.providers.get(usage.provider)
    return ActivityRow(
        date=usage.day,
        model=usage.model,
        model_permaslug=model.canonical_slug if model is not None else usage.model,
        endpoint_id=usage.endpoint_id,
        provider_name=provider.name if provider is not None else usage.provider,  # one that left the catalog keeps its slug
        usage=usd_number(usage.nanos),
        requests=usage.requests,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        cached_tokens=usage.cached_tokens,
        workspace_id=workspace,
    )


def _csv(found: Iterable[DailyUsage], catalog: Catalog) -> str:
    """RFC 4180, amounts with all their digits."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(CSV_COLUMNS)
    for usage in found:
        row = _row(usage, catalog)
        values = (format_usd(usage.nanos) if column == "usage" else getattr(row, column) for column in CSV_COLUMNS)
        writer.writerow(_cell(value) for value in values)
    return text.getvalue()


def _cell(value: str | int) -> str:
    text = str(value)
    return f"'{text}" if isinstance(value, str) and text.startswith(_FORMULA) else text
