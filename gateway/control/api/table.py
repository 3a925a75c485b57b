"""The table of all public routes: every path that control answers for callers, and who may use it."""

from __future__ import annotations

import time
from collections.abc import Callable

from gateway.control.api.accounts import AccountsApi
from gateway.control.api.activity import ActivityApi
from gateway.control.api.auth import Authentication
from gateway.control.api.consents import ConsentsApi
from gateway.control.api.content import ContentApi
from gateway.control.api.credits import CreditsApi
from gateway.control.api.generation import GenerationApi
from gateway.control.api.key import KeyApi
from gateway.control.api.keys import KeysApi
from gateway.control.api.models import ModelsApi
from gateway.control.api.privacy import PrivacyApi
from gateway.control.api.route import Access, Route
from gateway.control.api.site import SiteApi
from gateway.control.catalog_source import CatalogSource
from gateway.control.content.store import ContentStore
from gateway.control.store import Store
from gateway.domain.keys import KeyRecord
from gateway.domain.money import parse_usd
from gateway.routing.fleet import Shown
from gateway.settings import Settings


def public_routes(
    *,
    authentication: Authentication,
    store: Store,
    content: ContentStore,
    catalogs: CatalogSource,
    settings: Settings,
    shown: Callable[[str], Shown],
    on_key_changed: Callable[[str, KeyRecord | None], None],
    on_limit_changed: Callable[[str], None],
    on_account_deleted: Callable[[], None],
    now: Callable[[], float] = time.time,
) -> list[Route]:
    """The first of two routes that match answers. `shown`: what is known of an endpoint, by its id; `now` is unix time."""

    def keys(path: str, access: Access, *, management: bool) -> KeysApi:
        return KeysApi(
            path=path,
            access=access,
            management=management,
            authentication=authentication,
            store=store,
            on_key_changed=on_key_changed,
            on_limit_changed=on_limit_changed,
            now=now,
        )

    accounts = AccountsApi(
        store=store,
        signup=settings.accounts.signup,
        signup_nanos=parse_usd(settings.billing.signup_usd),
        on_key_changed=on_key_changed,
        on_deleted=on_account_deleted,
        now=now,
    )
    routes = [
        *ModelsApi(
            catalogs=catalogs, rules=store.rules, public_url=settings.server.public_url, shown=shown, used=store.model_use, now=now
        ).routes(),
        *KeyApi(store=store, limits=settings.limits, now=now).routes(),
        *keys("/keys", "management", management=False).routes(),
        # With a management key one could make more of them, or take them from others: for people alone.
        *keys("/management-keys", "session", management=True).routes(),
        *CreditsApi(store=store).routes(),
        *ActivityApi(store=store, catalogs=catalogs, now=now).routes(),
        *GenerationApi(store=store, catalogs=catalogs).routes(),
        *ContentApi(content=content, store=store, catalogs=catalogs).routes(),
        *PrivacyApi(store=store, catalogs=catalogs, keeps_content=content.has_key, on_key_changed=on_key_changed).routes(),
        *ConsentsApi(store=store, on_key_changed=on_key_changed, now=now).routes(),
        *accounts.routes(),
    ]
    return [*routes, *SiteApi(routes, signup=settings.accounts.signup).routes()]
