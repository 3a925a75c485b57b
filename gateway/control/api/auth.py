"""Who calls a public route: the owner of a key, or of a session that a browser's cookie names.

Answers are constant texts, whatever was sent: a probe learns only whether a whole secret is right. A key that was
presented is the only one that counts: a wrong one does not fall through to a cookie.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from aiohttp import web

from gateway.control.api.route import NOBODY, Access, Caller
from gateway.control.store import Key, Store
from gateway.control.store.management import Session
from gateway.domain.errors import Forbidden, Unauthenticated
from gateway.domain.keys import SECRET_BYTES_MAX, digest, presented_secret

COOKIE = "__Host-session"
CSRF_HEADER = "X-CSRF-Token"
SESSION_S = 30 * 86_400  # from signing in
IDLE_S = 7 * 86_400  # since it was used last
TOUCH_S = 300  # how exactly that is known
SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))


class Authentication:
    """Turns a request into who made it. `now` is unix time; `public_url` the address that browsers know us by, "" if any."""

    def __init__(self, *, store: Store, public_url: str = "", now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._origin = "{0.scheme}://{0.netloc}".format(urlsplit(public_url)) if public_url else ""
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
            presented = request.headers.get(CSRF_HEADER, "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(presented, csrf_token(session_secret(request)).encode()):
                raise Forbidden(f"{CSRF_HEADER} is missing or not the one of this session")
        return Caller(account_id=session.account_id, session=session)

    def secret(self, request: web.Request) -> bytes:
        """What an authenticated request proved itself with."""
        if "Authorization" in request.headers or "x-api-key" in request.headers:
            return presented_secret(request.headers.get("Authorization"), request.headers.get("x-api-key"))
        return session_secret(request)

    async def _key(self, request: web.Request) -> Key:
        secret = presented_secret(request.headers.get("Authorization"), request.headers.get("x-api-key"))
        key = await self._store.find_key(digest(secret))
        if key is None:
            raise Unauthenticated("User not found.")
        if key.disabled or (key.expires_at_s is not None and key.expires_at_s <= self._now()):
            raise Unauthenticated("This key is disabled or has expired")
        return key

    async def _session(self, request: web.Request) -> Session:
        secret = session_secret(request)
        session = await self._store.find_session(digest(secret)) if secret else None
        now_s = int(self._now())
        if session is None or session.created_at_s + SESSION_S <= now_s or session.used_at_s + IDLE_S <= now_s:
            raise Unauthenticated("No auth credentials found" if not secret else "This session is over; sign in again")
        if session.used_at_s + TOUCH_S <= now_s:
            await self._store.touch_session(session.digest, now_s)
        return session

    def _require_own_page(self, request: web.Request) -> None:
        """Browsers say whose page sends a request. JSON alone is taken: other pages cannot send it without being asked first."""
        origin = request.headers.get("Origin")
        own = (self._origin,) if self._origin else (f"http://{request.host}", f"https://{request.host}")
        if request.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin" or (origin is not None and origin not in own):
            raise Forbidden("Requests with a session must come from a page of this site")
        if request.body_exists and request.content_type != "application/json":
            raise Forbidden("Requests with a session must be JSON, with Content-Type: application/json")


def session_secret(request: web.Request) -> bytes:
    """What the cookie holds; empty without one."""
    secret = request.cookies.get(COOKIE, "").encode("utf-8", "surrogateescape")
    return secret if len(secret) <= SECRET_BYTES_MAX else b""


def csrf_token(secret: bytes) -> str:
    """What pages of ours send beside the cookie, and others cannot know."""
    return digest(b"csrf:" + secret)


def _keyed(key: Key, access: Access) -> Caller:
    if access == "management" and not key.management:
        raise Forbidden("Only management keys can perform this operation")
    if access == "session":
        raise Forbidden("Only a signed-in session can perform this operation")
    return Caller(account_id=key.account_id, key=key)
