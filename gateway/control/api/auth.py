"""Who calls a public route: the owner of a key, or of a session that a browser's cookie names.

Answers are constant texts, whatever was sent: a probe learns only whether a whole secret is right. A key that was
presented is the only one that counts: a wrong one does not fall through to a cookie.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from aiohttp import web

from gateway.control.api.route import NOBODY, Access, Caller
from gateway.control.store import Key, Store
from gateway.control.store.management import TOUCH_S, Session
from gateway.domain.errors import Forbidden, Unauthenticated
from gateway.domain.keys import digest, presented_secret
from gateway.domain.sessions import require_csrf_token, require_own_page, session_secret

SCHEME_HEADER = "X-Gateway-Scheme"  # set by edges, and by nobody else
SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))


class Authentication:
    """Turns a request into who made it. `now` is unix time; `origin` what browsers know our pages by, "" if any."""

    def __init__(self, *, store: Store, origin: str = "", now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._origin = origin
        self._now = now

    async def caller(self, request: web.Request, access: Access) -> Caller:
        """Whoever may use a route of this class. Raises Unauthenticated, Forbidden, StoreUnavailable."""
        if access == "public":
            return NOBODY
        if access == "visitor":
            self._require_own_page(request)
            return NOBODY
        if "Authorization" in request.headers or "x-api-key" in request.headers or access == "key":
            return _keyed(await self._key(request), access)
        session = await self._session(request)
        if request.method not in SAFE_METHODS:
            self._require_own_page(request)
            require_csrf_token(request.headers.get, session_secret(request.headers.get))
        return Caller(account_id=session.account_id, session=session)

    def secret(self, request: web.Request) -> bytes:
        """What an authenticated request proved itself with."""
        if "Authorization" in request.headers or "x-api-key" in request.headers:
            return presented_secret(request.headers.get("Authorization"), request.headers.get("x-api-key"))
        return session_secret(request.headers.get)

    async def _key(self, request: web.Request) -> Key:
        secret = presented_secret(request.headers.get("Authorization"), request.headers.get("x-api-key"))
        key = await self._store.find_key(digest(secret))
        if key is None:
            raise Unauthenticated("User not found.")
        if key.disabled or (key.expires_at_s is not None and key.expires_at_s <= self._now()):
            raise Unauthenticated("This key is disabled or has expired")
        return key

    async def _session(self, request: web.Request) -> Session:
        secret = session_secret(request.headers.get)
        session = await self._store.find_session(digest(secret)) if secret else None
        now_s = int(self._now())
        if session is None or session.ends_at_s <= now_s:
            raise Unauthenticated("No auth credentials found" if not secret else "This session is over; sign in again")
        if session.used_at_s + TOUCH_S <= now_s:
            await self._store.touch_session(session.digest, now_s)
        return session

    def _require_own_page(self, request: web.Request) -> None:
        scheme = request.headers.get(SCHEME_HEADER, "")
        require_own_page(request.headers.get, origin=self._origin, scheme=scheme, has_body=request.body_exists)


def _keyed(key: Key, access: Access) -> Caller:
    if access == "management" and not key.management:
        raise Forbidden("Only management keys can perform this operation")
    if access == "session":
        raise Forbidden("Only a signed-in session can perform this operation")
    return Caller(account_id=key.account_id, key=key)
