"""`/privacy`: what an account allows to be done with its requests; the same rules as `gateway account set` changes.

The contract has these as settings of its site and as fields of guardrails, but no route of their own: the names are those of
guardrails. What changes holds for all keys of the account, at every edge, as soon as the edges are told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from gateway.control.account_rules import change_rules
from gateway.control.api.http import answer
from gateway.control.api.route import Call, Nothing, Route
from gateway.control.catalog_source import CatalogSource
from gateway.control.provider_slugs import SLUGS_MAX, provider_slugs
from gateway.control.store import Store
from gateway.domain.keys import KeyRecord
from gateway.domain.rules import AccountRules, RulesChange

Slugs = Annotated[list[Annotated[str, Meta(max_length=200)]], Meta(max_length=SLUGS_MAX)]


class PrivacyRules(msgspec.Struct, frozen=True, kw_only=True):
    """All rules of an account. A request can only tighten them."""

    enable_paid_model_training: bool  # paid endpoints that may train on prompts, or do not say
    enable_free_model_training: bool
    enable_free_model_publication: bool  # free endpoints that publish prompts
    enforce_zdr: bool  # only endpoints that retain nothing
    log_prompts: bool  # requests and answers are kept for the account's own review, which earns the discount
    allowed_providers: tuple[str, ...]  # none: all
    ignored_providers: tuple[str, ...]


class PrivacyAnswer(msgspec.Struct, frozen=True):
    data: PrivacyRules


class PrivacyPatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is left out stays. Lists are replaced whole; null is the same as none."""

    enable_paid_model_training: bool | UnsetType = UNSET
    enable_free_model_training: bool | UnsetType = UNSET
    enable_free_model_publication: bool | UnsetType = UNSET
    enforce_zdr: bool | UnsetType = UNSET
    log_prompts: bool | UnsetType = UNSET  # off: nothing more is kept; what is kept stays until it is deleted
    allowed_providers: Slugs | UnsetType | None = UNSET
    ignored_providers: Slugs | UnsetType | None = UNSET


NO_CONTENT_KEY = "prompts cannot be kept here: whoever runs this gateway has configured no key to encrypt them with"


class PrivacyApi:
    """Handlers over the rules of the calling account; `on_key_changed(digest, record)` is called for each of its keys and sessions.

    Without `keeps_content` no account can have its prompts kept.
    """

    def __init__(
        self, *, store: Store, catalogs: CatalogSource, keeps_content: bool, on_key_changed: Callable[[str, KeyRecord | None], None]
    ) -> None:
        self._store = store
        self._content_fault = "" if keeps_content else NO_CONTENT_KEY
        self._catalogs = catalogs
        self._on_key_changed = on_key_changed

    def routes(self) -> list[Route]:
        return [
            Route(
                method="GET", path="/privacy", access="management", handler=self.get_privacy, answer=PrivacyAnswer,
                summary="What the account allows to be done with its requests",
            ),
            Route(
                method="PATCH", path="/privacy", access="management", handler=self.change_privacy, body=PrivacyPatch, answer=PrivacyAnswer,
                summary="Change what the account allows, for all its keys at once",
            ),
        ]  # fmt: skip

    async def get_privacy(self, call: Call[Nothing, Nothing]) -> web.Response:
        return answer(_answer(await self._store.rules(call.caller.account_id)))

    async def change_privacy(self, call: Call[Nothing, PrivacyPatch]) -> web.Response:
        patch = call.body
        change = RulesChange(
            train_paid=patch.enable_paid_model_training,
            train_free=patch.enable_free_model_training,
            publish_free=patch.enable_free_model_publication,
            zdr=patch.enforce_zdr,
            log_prompts=patch.log_prompts,
            allowed=self._slugs("allowed_providers", patch.allowed_providers),
            ignored=self._slugs("ignored_providers", patch.ignored_providers),
        )
        rules = await change_rules(
            self._store, call.caller.account_id, change, self._on_key_changed, content_fault=self._content_fault
        )  # fmt: skip
        return answer(_answer(rules))

    def _slugs(self, field: str, slugs: list[str] | UnsetType | None) -> tuple[str, ...] | UnsetType:
        return provider_slugs(field, () if slugs is None else slugs, lambda: self._catalogs.catalog)


def _answer(rules: AccountRules) -> PrivacyAnswer:
    return PrivacyAnswer(
        PrivacyRules(
            enable_paid_model_training=rules.train_paid,
            enable_free_model_training=rules.train_free,
            enable_free_model_publication=rules.publish_free,
            enforce_zdr=rules.zdr,
            log_prompts=rules.log_prompts,
            allowed_providers=rules.allowed,
            ignored_providers=rules.ignored,
        )
    )
