"""Signed-in browsers: what their cookie holds, the name they are looked up by, and whose pages may use it.

One rule for every path that a cookie opens, whichever process answers it.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable

from gateway.domain.errors import Forbidden
from gateway.domain.keys import SECRET_BYTES_MAX, digest

COOKIE = "__Host-session"
CSRF_HEADER = "X-CSRF-Token"
_NAME = "session:"  # what no key's digest begins with: a cookie's secret is no key, and a key in a cookie no session

Header = Callable[[str], str | None]  # a header's value by its name, None without it


def session_secret(header: Header) -> bytes:
    """What the session's cookie holds; empty without one. Header texts that are not UTF-8 come surrogate-escaped."""
    for cookie in (header("Cookie") or "").split(";"):
        name, _, value = cookie.strip().partition("=")
        if name == COOKIE:
            secret = value.strip('"').encode("utf-8", "surrogateescape")
            return secret if len(secret) <= SECRET_BYTES_MAX else b""
    return b""


def session_name(session_digest: str) -> str:
    """What edges look a session up by, as they look keys up by their digest."""
    return _NAME + session_digest


def session_digest(name: str) -> str | None:
    """The digest of the session that has this name; None: it is a key's."""
    return name.removeprefix(_NAME) if name.startswith(_NAME) else None


def csrf_token(secret: bytes) -> str:
    """What pages of ours send beside the cookie, and others cannot know."""
    return digest(b"csrf:" + secret)


def require_own_page(header: Header, *, origin: str, scheme: str, has_body: bool) -> None:
    """Browsers say whose page sends a request. JSON alone is taken: other pages cannot send it without being asked first.

    `origin` is ours, where it is configured; else it is the host that was asked, by `scheme` ("": either). Raises Forbidden.
    """
    told = header("Origin")
    own = (origin,) if origin else [f"{known}://{header('Host') or ''}" for known in ((scheme,) if scheme else ("http", "https"))]
    if (header("Sec-Fetch-Site") or "same-origin") != "same-origin" or (told is not None and told not in own):
        raise Forbidden("Requests with a session must come from a page of this site")
    if has_body and (header("Content-Type") or "").partition(";")[0].strip().lower() != "application/json":
        raise Forbidden("Requests with a session must be JSON, with Content-Type: application/json")


def require_csrf_token(header: Header, secret: bytes) -> None:
    """Raises Forbidden: who sends this cannot read what our pages read."""
    told = (header(CSRF_HEADER) or "").encode("utf-8", "surrogateescape")
    if not hmac.compare_digest(told, csrf_token(secret).encode()):
        raise Forbidden(f"{CSRF_HEADER} is missing or not the one of this session")
