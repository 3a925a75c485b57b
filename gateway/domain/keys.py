"""API keys: their form, their digest, and what an edge must know of one."""

from __future__ import annotations

import hashlib
import secrets

import msgspec

from gateway.domain.errors import Unauthenticated
from gateway.domain.resources import LimitReset
from gateway.domain.rules import NO_RULES, AccountRules

PREFIX = "sk-or-v1-"
SECRET_BYTES_MAX = 512  # of what a caller presents


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What admission needs of a key. The secret itself is never stored anywhere."""

    digest: str  # lowercase hex SHA-256 of the whole plaintext; also the public id of the key (`hash`); "" for a session, which is no key
    account_id: str
    name: str
    label: str  # masked form for display and logs
    management: bool = False  # a management (provisioning) key: refused on inference
    disabled: bool = False
    expires_at_s: int | None = None  # unix seconds; None: never
    limit_nanos: int | None = None  # what may be spent per window; None: no limit of its own
    limit_reset: LimitReset | None = None  # None: the window is all time
    rules: AccountRules = NO_RULES  # the account's
    session: bool = False  # a signed-in browser, in place of a key


def new_secret() -> str:
    """A fresh plaintext key: prefix and 256 random bits as 64 hex digits."""
    return PREFIX + secrets.token_hex(32)


def digest(secret: str | bytes) -> str:
    """Lowercase hex SHA-256 of the full plaintext, as clients can compute it too."""
    return hashlib.sha256(secret if isinstance(secret, bytes) else secret.encode()).hexdigest()


def label(secret: str) -> str:
    """`sk-or-v1-abc...123`: safe to show and to log."""
    return f"{secret[: len(PREFIX) + 3]}...{secret[-3:]}"


def presented_secret(authorization: str | None, x_api_key: str | None) -> bytes:
    """What a caller presents, from the values of two headers: a bearer token, or else `x-api-key`. Raises Unauthenticated.

    The bytes are the caller's own: header texts that are not UTF-8 come surrogate-escaped.
    """
    if authorization is not None:
        scheme, _, secret = authorization.partition(" ")
    elif x_api_key is not None:
        scheme, secret = "bearer", x_api_key
    else:
        raise Unauthenticated("No auth credentials found")
    presented = secret.strip().encode("utf-8", "surrogateescape")
    if scheme.lower() != "bearer" or not 0 < len(presented) <= SECRET_BYTES_MAX:
        raise Unauthenticated("No auth credentials found")
    return presented
