"""Who calls a public route: the owner of a key, found in the store by the key's digest.

Answers are constant texts, whatever was sent: a probe learns only whether a whole secret is right.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from aiohttp import web

from gateway.control.store import Key, Store
from gateway.domain.errors import Forbidden, Unauthenticated
from gateway.domain.keys import digest, presented_secret


class Authentication:
    """Turns a request into the key that it came with. `now` is unix time."""

    def __init__(self, *, store: Store, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._now = now

    async def key(self, request: web.Request) -> Key:
        """The key of either class, in force now. Raises Unauthenticated, StoreUnavailable."""
        secret = presented_secret(request.headers.get("Authorization"), request.headers.get("x-api-key"))
        key = await self._store.find_key(digest(secret))
        if key is None:
            raise Unauthenticated("User not found.")
        if key.disabled or (key.expires_at_s is not None and key.expires_at_s <= self._now()):
            raise Unauthenticated("This key is disabled or has expired")
        return key

    async def management_key(self, request: web.Request) -> Key:
        """Also raises Forbidden: a key for inference."""
        key = await self.key(request)
        if not key.management:
            raise Forbidden("Only management keys can perform this operation")
        return key
