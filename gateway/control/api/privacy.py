"""`/privacy`: what an account allows to be done with its prompts, for all its keys. Also by `gateway account set`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from gateway.control.api.http import answer
from gateway.control.api.route import Call, Nothing, Route
from gateway.control.catalog_source import CatalogSource
from gateway.control.store import Store
from gateway.domain.catalog import Catalog
from gateway.domain.errors import BadRequest
from gateway.domain.keys import KeyRecord
from gateway.domain.rules import AccountRules, RulesChange
from gateway.routing.filters import traits_of

PROVIDERS_MAX = 200
Slugs = Annotated[list[Annotated[str, Meta(min_length=1, max_length=200)]], Meta(max_length=PROVIDERS_MAX)]


class PrivacyBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to change; what is left out stays."""

    train_paid: bool | UnsetType = UNSET
    train_free: bool | UnsetType = UNSET
    zdr: bool | UnsetType = UNSET
    allowed_providers: Slugs | UnsetType = UNSET
    ignored_providers: Slugs | UnsetType = UNSET


class Privacy(msgspec.Struct, frozen=True, kw_only=True):
    """`train_paid`, `train_free`: whether providers that train on prompts, or do not say, may be used for models that cost something,
    and for free ones. `zdr`: only providers that retain nothing. Providers are slugs or tags such as `north/fp8`; none allowed: all.
    """

    train_paid: bool
    train_free: bool
    zdr: bool
    allowed_providers: tuple[str, ...]
    ignored_providers: tuple[str, ...]


class PrivacyAnswer(msgspec.Struct, frozen=True):
    data: Privacy


class PrivacyApi:
    """Handlers over the account's rules. `on_key_changed(digest, record)` is called for each key that they apply to."""

    def __init__(self, *, store: Store, catalogs: CatalogSource, on_key_changed: Callable[[str, KeyRecord | None], None]) -> None:
        self._store = store
        self._catalogs = catalogs
        self._on_key_changed = on_key_changed

    def routes(self) -> list[Route]:
        return [
            Route(
                method="GET", path="/privacy", access="management", handler=self.get_privacy, answer=PrivacyAnswer,
                summary="What the account allows to be done with its prompts",
            ),
            Route(
                method="PATCH", path="/privacy", access="management", handler=self.update_privacy, body=PrivacyBody,
                answer=PrivacyAnswer, summary="Change what the account allows, for all its keys and within a second",
            ),
        ]  # fmt: skip

    async def get_privacy(self, call: Call[Nothing, Nothing]) -> web.Response:
        return _told(await self._store.rules(call.caller.account_id))

    async def update_privacy(self, call: Call[Nothing, PrivacyBody]) -> web.Response:
        body, catalog = call.body, self._catalogs.catalog
        change = RulesChange(
            train_paid=body.train_paid,
            train_free=body.train_free,
            zdr=body.zdr,
            allowed=_named("allowed_providers", body.allowed_providers, catalog),
            ignored=_named("ignored_providers", body.ignored_providers, catalog),
        )
        rules, keys = await self._store.change_rules(call.caller.account_id, change)
        for key in keys:
            self._on_key_changed(key.digest, key)
        return _told(rules)


def _told(rules: AccountRules) -> web.Response:
    return answer(
        PrivacyAnswer(
            Privacy(
                train_paid=rules.train_paid,
                train_free=rules.train_free,
                zdr=rules.zdr,
                allowed_providers=rules.allowed,
                ignored_providers=rules.ignored,
            )
        )
    )


def _named(field: str, slugs: list[str] | UnsetType, catalog: Catalog) -> tuple[str, ...] | UnsetType:
    """Raises BadRequest for what names no provider or endpoint: nobody should think a provider ignored whose name was misspelt."""
    if isinstance(slugs, UnsetType):
        return UNSET
    known = {
        name
        for model in catalog.models.values()
        for endpoint in model.endpoints
        for name in traits_of(model, endpoint, catalog.providers[endpoint.provider]).names
    } | {name.casefold() for provider in catalog.providers.values() for name in (provider.slug, provider.name)}
    found = tuple(dict.fromkeys(slug.strip().casefold() for slug in slugs))
    for at, slug in enumerate(found):
        if slug not in known:
            raise BadRequest(f"{field}[{at}]: no provider or endpoint has this name")
    return found
