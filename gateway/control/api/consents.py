"""OAuth with PKCE: a person consents on our page, an application takes a key for the code that it gets.

A code is taken once, within ten minutes, by whoever can prove that they asked for it; a wrong proof spends it.
Source: OAuth guide of the contract; RFC 7636.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import Callable
from typing import Annotated, Literal
from urllib.parse import SplitResult, urlsplit

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from gateway.control.administration import NAME_MAX, printable_text
from gateway.control.api.apps import LOCAL_HOSTS, app_id
from gateway.control.api.attempts import Attempts
from gateway.control.api.fields import Moment, Name, Usd, expiry_s, require_own_workspace, usd_nanos
from gateway.control.api.http import answer, iso_time
from gateway.control.api.keys import require_room_for_key
from gateway.control.api.route import Call, Nothing, Route
from gateway.control.store import Key, Store
from gateway.control.store.management import AuthCode, KeyWish
from gateway.domain.errors import BadRequest, Forbidden
from gateway.domain.keys import KeyRecord, digest, label, new_secret
from gateway.domain.resources import LimitReset

CODE_S = 600
CODES_PER_MINUTE = 120  # of one account: people consent one at a time
CALLBACK_MAX = 2048
S256_LENGTH = 43  # of a SHA-256 in base64url, without padding

Method = Literal["S256", "plain"]
Challenge = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._~-]+$")]


class NewCodeBody(msgspec.Struct, frozen=True, kw_only=True):
    callback_url: Annotated[str, Meta(min_length=1, max_length=CALLBACK_MAX)] | UnsetType = UNSET  # without it a challenge is a must
    code_challenge: Challenge | UnsetType = UNSET
    code_challenge_method: Method | UnsetType = UNSET
    key_label: Name | UnsetType = UNSET
    limit: Usd | UnsetType | None = UNSET
    usage_limit_type: LimitReset | UnsetType | None = UNSET
    expires_at: Moment | UnsetType | None = UNSET
    workspace_id: str | UnsetType = UNSET


class CodeRow(msgspec.Struct, frozen=True):
    id: str  # the code
    app_id: int
    created_at: str


class NewCodeAnswer(msgspec.Struct, frozen=True):
    data: CodeRow


class TakeKeyBody(msgspec.Struct, frozen=True):
    code: Annotated[str, Meta(min_length=1, max_length=256)]
    code_verifier: Annotated[str, Meta(max_length=256)] | UnsetType = UNSET
    code_challenge_method: Method | UnsetType | None = UNSET


class TakenKeyAnswer(msgspec.Struct, frozen=True):
    key: str  # the secret, never shown again
    user_id: str | None


class ConsentsApi:
    """Handlers of codes and of the keys taken for them. `on_key_changed` is called after each commit. `now` is unix time."""

    def __init__(
        self, *, store: Store, on_key_changed: Callable[[str, KeyRecord | None], None], now: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._on_key_changed = on_key_changed
        self._now = now
        self._codes = Attempts(most=CODES_PER_MINUTE, window_s=60.0, now=time.monotonic)

    def routes(self) -> list[Route]:
        return [
            Route(
                method="POST", path="/auth/keys/code", access="management", handler=self.create_auth_code, body=NewCodeBody,
                answer=NewCodeAnswer, summary="Consent: a code that an application takes a key for",
            ),
            Route(
                method="POST", path="/auth/keys", access="public", handler=self.take_key, body=TakeKeyBody, answer=TakenKeyAnswer,
                summary="A key for a code",
            ),
        ]  # fmt: skip

    async def create_auth_code(self, call: Call[Nothing, NewCodeBody]) -> web.Response:
        wish, account_id, now_s = call.body, call.caller.account_id, self._now()
        if wish.workspace_id is not UNSET:
            require_own_workspace(wish.workspace_id, account_id)
        callback = _callback(wish.callback_url) if wish.callback_url is not UNSET else None
        challenge, method = _challenge(wish, required=callback is None)
        self._codes.take(account_id)
        await require_room_for_key(self._store, account_id)
        site = callback.netloc if callback is not None else "headless"
        code = secrets.token_urlsafe(32)
        key = KeyWish(
            name=printable_text("key_label", wish.key_label, 1, NAME_MAX) if wish.key_label is not UNSET else site[:NAME_MAX],
            limit_nanos=usd_nanos("limit", wish.limit) if wish.limit not in (None, UNSET) else None,
            limit_reset=wish.usage_limit_type if wish.usage_limit_type is not UNSET else None,
            expires_at_s=expiry_s("expires_at", wish.expires_at, now_s) if wish.expires_at not in (None, UNSET) else None,
            challenge=challenge,
            challenge_method=method,
        )
        await self._store.add_code(
            AuthCode(digest=digest(code), account_id=account_id, expires_at_s=int(now_s) + CODE_S, wish=key), now_s=int(now_s)
        )
        return answer(NewCodeAnswer(CodeRow(code, app_id(site), iso_time(int(now_s * 1000)))))

    async def take_key(self, call: Call[Nothing, TakeKeyBody]) -> web.Response:
        asked = call.body
        code = await self._store.take_code(digest(asked.code.encode("utf-8", "surrogatepass")))
        if code is None:
            raise Forbidden("Invalid code or code_verifier")
        if code.expires_at_s <= self._now():
            raise Forbidden("The code has expired")
        wish = code.wish
        method = asked.code_challenge_method
        if method not in (None, UNSET) and method != (wish.challenge_method or method):
            raise BadRequest("code_challenge_method: is not the one that the code was asked for with")
        if not _proves(asked.code_verifier if asked.code_verifier is not UNSET else "", wish):
            raise Forbidden("Invalid code or code_verifier")
        secret = new_secret()
        key = Key(
            digest=digest(secret),
            account_id=code.account_id,
            name=wish.name,
            label=label(secret),
            created_at_ms=int(self._now() * 1000),
            limit_nanos=wish.limit_nanos,
            limit_reset=wish.limit_reset,
            expires_at_s=wish.expires_at_s,
        )
        await self._store.create_key(key)
        self._on_key_changed(key.digest, key.record())
        return answer(TakenKeyAnswer(secret, code.account_id))


def _callback(text: str) -> SplitResult:
    """https, or http to this very machine. Raises BadRequest."""
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname or "", parts.port
        fits = text.isascii() and text.isprintable() and " " not in text and "\\" not in text and not parts.username and bool(host)
        local = host in LOCAL_HOSTS or (":" in host and ipaddress.ip_address(host).is_loopback)
    except ValueError:
        fits = local = False
        parts = SplitResult("", "", "", "", "")
    if not fits or not (parts.scheme == "https" or (parts.scheme == "http" and local)):
        raise BadRequest("callback_url: must be an https URL, or http to localhost or 127.0.0.1")
    return parts


def _challenge(wish: NewCodeBody, *, required: bool) -> tuple[str, str]:
    """The challenge and its method; empty without one. Raises BadRequest."""
    if wish.code_challenge is UNSET:
        if required:
            raise BadRequest("code_challenge: is required without a callback_url")
        if wish.code_challenge_method is not UNSET:
            raise BadRequest("code_challenge: is required with a code_challenge_method")
        return "", ""
    method = wish.code_challenge_method if wish.code_challenge_method is not UNSET else "plain"  # RFC 7636 section 4.3
    if method == "S256" and len(wish.code_challenge) != S256_LENGTH:
        raise BadRequest("code_challenge: must be the SHA-256 of the verifier in base64url, without padding")
    return wish.code_challenge, method


def _proves(verifier: str, wish: KeyWish) -> bool:
    """Who has a verifier asked with a challenge: if none came along, somebody took it off on the way (RFC 9700 section 2.1.1)."""
    if not wish.challenge:
        return not verifier
    proof = verifier.encode("utf-8", "surrogatepass")
    if wish.challenge_method == "S256":
        proof = base64.urlsafe_b64encode(hashlib.sha256(proof).digest()).rstrip(b"=")
    return hmac.compare_digest(proof, wish.challenge.encode())
