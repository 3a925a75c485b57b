"""People: signing up, in and out, the password, and deleting the account. For pages of ours alone, never with a key.

What is said of an address does not tell whether it has an account: signing up answers the same for a new and for a known
one, and a wrong password is told like an unknown address, in the same time.
"""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Annotated, Literal

import msgspec
from aiohttp import web
from msgspec import Meta

from gateway.control.administration import email_address
from gateway.control.api.attempts import Attempts
from gateway.control.api.hashing import Hashing
from gateway.control.api.http import answer, iso_time
from gateway.control.api.keys import DeletedAnswer
from gateway.control.api.route import Call, Nothing, Route
from gateway.control.store import Account, Store
from gateway.control.store.management import SESSION_S, Session
from gateway.domain.errors import Conflict, Forbidden, NotFound, Unauthenticated
from gateway.domain.keys import KeyRecord, digest
from gateway.domain.sessions import COOKIE, csrf_token, session_name, session_secret

CALLER_HEADER = "X-Gateway-Caller"  # set by edges, and by nobody else
ATTEMPTS_S = 900.0
ATTEMPTS_AT_ACCOUNT = 10
ATTEMPTS_FROM_ADDRESS = 100  # many people may share one: a company, or a proxy in front of us
SIGN_UPS_FROM_ADDRESS = 20
SIGN_INS_AT_ACCOUNT = 100  # that succeed: each leaves a session
ERASE_S = 3600  # how long after the end of an account its last exchanges may still come in from journals

Email = Annotated[str, Meta(min_length=3, max_length=254)]
Password = Annotated[str, Meta(min_length=1, max_length=1024)]


class CredentialsBody(msgspec.Struct, frozen=True):
    email: Email
    password: Password


class PasswordBody(msgspec.Struct, frozen=True):
    password: Password


class NewPasswordBody(msgspec.Struct, frozen=True):
    password: Password
    new_password: Password


class SignedUp(msgspec.Struct, frozen=True):
    email: str
    message: str


class SignedUpAnswer(msgspec.Struct, frozen=True):
    data: SignedUp


class SessionRow(msgspec.Struct, frozen=True):
    account_id: str
    email: str
    created_at: str
    csrf_token: str


class SessionAnswer(msgspec.Struct, frozen=True):
    data: SessionRow


class SignedOutAnswer(msgspec.Struct, frozen=True):
    signed_out: Literal[True] = True


class AccountsApi:
    """Handlers of accounts and sessions. `on_key_changed(name, None)` is called for each key that went with its account and
    each session that ended, `on_deleted()` once an account is gone. Without `signup` only the operator makes accounts. `now` is unix time.
    """

    def __init__(
        self,
        *,
        store: Store,
        signup: bool,
        signup_nanos: int,
        on_key_changed: Callable[[str, KeyRecord | None], None],
        on_deleted: Callable[[], None],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._signup = signup
        self._signup_nanos = signup_nanos
        self._on_key_changed = on_key_changed
        self._on_deleted = on_deleted
        self._now = now
        self._hashing = Hashing()
        self._at_account = Attempts(most=ATTEMPTS_AT_ACCOUNT, window_s=ATTEMPTS_S, now=time.monotonic)
        self._from_address = Attempts(most=ATTEMPTS_FROM_ADDRESS, window_s=ATTEMPTS_S, now=time.monotonic)
        self._sign_ins = Attempts(most=SIGN_INS_AT_ACCOUNT, window_s=ATTEMPTS_S, now=time.monotonic)
        self._sign_ups = Attempts(most=SIGN_UPS_FROM_ADDRESS, window_s=ATTEMPTS_S, now=time.monotonic)

    def routes(self) -> list[Route]:
        return [
            Route(
                method="POST", path="/account", access="visitor", handler=self.sign_up, body=CredentialsBody, answer=SignedUpAnswer,
                status=201, summary="Sign up",
            ),
            Route(
                method="PATCH", path="/account", access="session", handler=self.change_password, body=NewPasswordBody,
                answer=SessionAnswer, summary="Change the password; other sessions end",
            ),
            Route(
                method="DELETE", path="/account", access="session", handler=self.delete_account, body=PasswordBody, answer=DeletedAnswer,
                summary="Delete the account: keys and personal data go, and the rest of the credit is lost",
            ),
            Route(
                method="POST", path="/session", access="visitor", handler=self.sign_in, body=CredentialsBody, answer=SessionAnswer,
                summary="Sign in",
            ),
            Route(
                method="GET", path="/session", access="session", handler=self.get_session, answer=SessionAnswer,
                summary="Who is signed in, and the token that changes need",
            ),
            Route(
                method="DELETE", path="/session", access="session", handler=self.sign_out, answer=SignedOutAnswer, summary="Sign out",
            ),
        ]  # fmt: skip

    async def sign_up(self, call: Call[Nothing, CredentialsBody]) -> web.Response:
        if not self._signup:
            raise Forbidden("Sign-up is closed here; ask whoever runs this gateway for an account")
        email = email_address(call.body.email)
        self._sign_ups.take(_address(call.request))
        password_hash = await self._hashing.hash("password", call.body.password)
        account = Account(
            id=f"user_{secrets.token_hex(12)}", email=email, created_at_ms=int(self._now() * 1000), password_hash=password_hash
        )  # fmt: skip
        with contextlib.suppress(Conflict):  # told to nobody but its owner, who can sign in
            await self._store.sign_up(account, grant_nanos=self._signup_nanos)
        return answer(SignedUpAnswer(SignedUp(email, "If this address is new here, its account is ready: sign in.")), 201)

    async def sign_in(self, call: Call[Nothing, CredentialsBody]) -> web.Response:
        email = email_address(call.body.email)
        account = await self._proven(call.request, email, await self._store.account_by_email(email), call.body.password)
        if account is None:
            raise Unauthenticated("Wrong email or password")
        if secret := session_secret(call.request.headers.get):
            await self._close_session(digest(secret))  # who signs in anew leaves the old session
        return await self._signed_in(account)

    async def get_session(self, call: Call[Nothing, Nothing]) -> web.Response:
        account = await self._account(call.caller.account_id)
        return answer(self._session_answer(account, session_secret(call.request.headers.get)))

    async def sign_out(self, call: Call[Nothing, Nothing]) -> web.Response:
        session = call.caller.session
        assert session is not None
        await self._close_session(session.digest)
        return _with_cookie(answer(SignedOutAnswer()), "", 0)

    async def change_password(self, call: Call[Nothing, NewPasswordBody]) -> web.Response:
        account = await self._owner(call.request, call.caller.account_id, call.body.password)
        password_hash = await self._hashing.hash("new_password", call.body.new_password)
        self._sessions_ended(await self._store.set_password(account.id, password_hash))
        return await self._signed_in(msgspec.structs.replace(account, password_hash=password_hash))

    async def delete_account(self, call: Call[Nothing, PasswordBody]) -> web.Response:
        account = await self._owner(call.request, call.caller.account_id, call.body.password)
        now_s = int(self._now())
        keys, sessions = await self._store.delete_account(account.id, now_s=now_s, erase_until_s=now_s + ERASE_S)
        for key_digest in keys:
            self._on_key_changed(key_digest, None)
        self._sessions_ended(sessions)
        self._on_deleted()
        return _with_cookie(answer(DeletedAnswer()), "", 0)

    async def _owner(self, request: web.Request, account_id: str, password: str) -> Account:
        """The account, once its password was given again."""
        found = await self._account(account_id)
        account = await self._proven(request, found.email, found, password)
        if account is None:
            raise Forbidden("password: is wrong")
        return account

    async def _proven(self, request: web.Request, email: str, account: Account | None, password: str) -> Account | None:
        """The account, if this is its password. Raises RateLimited."""
        address = _address(request)
        self._from_address.take(address)
        self._at_account.take(email)
        if not await self._hashing.check(password, account.password_hash if account is not None else None):
            return None
        self._at_account.forget(email)
        self._from_address.give_back(address)
        return account

    async def _signed_in(self, account: Account) -> web.Response:
        """A new session, never one that a browser came with. Raises RateLimited."""
        self._sign_ins.take(account.id)
        secret = secrets.token_urlsafe(32)
        now_s = int(self._now())
        session = Session(digest=digest(secret), account_id=account.id, created_at_s=now_s, used_at_s=now_s)
        if not await self._store.open_session(session, proven=account.password_hash, ended_before_s=now_s - SESSION_S):
            raise Unauthenticated("Wrong email or password")  # by now
        return _with_cookie(answer(self._session_answer(account, secret.encode())), secret, SESSION_S)

    async def _close_session(self, session_digest: str) -> None:
        await self._store.close_session(session_digest)
        self._sessions_ended((session_digest,))

    def _sessions_ended(self, digests: Iterable[str]) -> None:
        for session_digest in digests:
            self._on_key_changed(session_name(session_digest), None)

    def _session_answer(self, account: Account, secret: bytes) -> SessionAnswer:
        return SessionAnswer(SessionRow(account.id, account.email, iso_time(account.created_at_ms), csrf_token(secret)))

    async def _account(self, account_id: str) -> Account:
        account = await self._store.find_account(account_id)
        if account is None:
            raise NotFound("Account not found")
        return account


def _address(request: web.Request) -> str:
    """Where attempts are counted: an IPv6 caller has all of a /64, so that is one address."""
    text = request.headers.get(CALLER_HEADER, "")
    if ":" not in text:
        return text
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return text
    return str(address.ipv4_mapped or ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))


def _with_cookie(response: web.Response, secret: str, max_age_s: int) -> web.Response:
    response.set_cookie(COOKIE, secret, max_age=max_age_s, path="/", secure=True, httponly=True, samesite="Lax")
    return response
