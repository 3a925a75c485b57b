"""What the head of an inference request presents: a key, and what callers say about themselves."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from gateway.domain.errors import Forbidden, GatewayError, StoreUnavailable, Unauthenticated
from gateway.domain.keys import PREFIX, KeyRecord, digest, presented_secret
from gateway.domain.sessions import session_digest
from gateway.edge.heads import RequestHead
from gateway.edge.site import Site

if TYPE_CHECKING:
    from gateway.edge.caller import CallerConnection
    from gateway.edge.content import KeptCaller

TEXT_CHARS_MAX = 256  # of what callers say about themselves
_CONTROLS = dict.fromkeys(
    (*range(0x80, 0xA0), 0x2028, 0x2029), "\N{REPLACEMENT CHARACTER}"
)  # would end lines, or more, where they are shown


class Presented(msgspec.Struct, frozen=True):
    """Read of a head once, and kept with it: callers on a kept connection send the same head again and again."""

    key_digest: str  # or the name of a session
    http_referer: str
    title: str
    user_agent: str
    session_id: str
    explains: bool  # it asks how its endpoint was chosen


def presented(head: RequestHead, site: Site, caller: CallerConnection | KeptCaller | None) -> Presented:
    """Raises Unauthenticated when the head presents neither a key nor a session, Forbidden when no page of ours presents the session.

    A key that was presented is the only thing that counts: a wrong one does not fall through to a cookie.
    """
    header = head.headers.get
    authorization, x_api_key = header("Authorization"), header("x-api-key")
    by_key = authorization is not None or x_api_key is not None
    return Presented(
        key_digest=digest(presented_secret(authorization, x_api_key))
        if by_key
        else site.session(head.headers, caller.peer if caller is not None else ""),
        http_referer=said(header("HTTP-Referer") or header("Referer")),
        title=said(header("X-OpenRouter-Title") or header("X-Title")),
        user_agent=said(header("User-Agent")),
        session_id=said(header("x-session-id")),
        explains=(header("X-OpenRouter-Metadata") or header("X-OpenRouter-Experimental-Metadata") or "").lower() == "enabled",
    )


def said(text: str | None) -> str:
    """Of what callers say about themselves, what may be kept: bounded, Unicode, and never a key."""
    if not text or PREFIX in text:
        return ""
    return text[:TEXT_CHARS_MAX] if text.isascii() else _letters(text)[:TEXT_CHARS_MAX]


def _letters(text: str) -> str:
    """A header's bytes as UTF-8, or as latin-1 where they are none: what is not UTF-8 comes surrogate-escaped, which no record can hold."""
    sent = text.encode("utf-8", "surrogateescape")
    try:
        text = sent.decode()
    except UnicodeDecodeError:
        text = sent.decode("latin-1")
    return text.translate(_CONTROLS)


def refusal_of(key: KeyRecord | None, unavailable: bool, head: RequestHead) -> GatewayError | None:
    """Why inference is not for the one who presents this key; None: it is. `unavailable`: nobody could say whose it is."""
    if unavailable:
        return StoreUnavailable("keys cannot be checked now; try again", retry_after_s=1.0)
    if key is None:
        by_session = head.presented is not None and session_digest(head.presented.key_digest) is not None
        return Unauthenticated("This session is over; sign in again" if by_session else "User not found.")
    if key.disabled or (key.expires_at_s is not None and key.expires_at_s <= time.time()):
        if key.session:
            return Unauthenticated("This session is over; sign in again")
        return Unauthenticated("This key is disabled or has expired")
    if key.management:
        return Forbidden("Management keys cannot be used for inference; create an API key")
    return None
