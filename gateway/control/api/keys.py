"""`/keys`: a management key, or a signed-in person, makes keys, reads, changes and deletes them. Edges hear of it at once.

Keys of other accounts and keys that never were are one 404. A secret is in one answer only: that of its creation, or of
a repeat of that with the same `Idempotency-Key`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from gateway.control.administration import NAME_MAX, printable_text
from gateway.control.api.attempts import Attempts
from gateway.control.api.auth import Authentication
from gateway.control.api.fields import Moment, Name, Usd, expiry_s, require_own_workspace, usd_nanos
from gateway.control.api.http import answer
from gateway.control.api.key_rows import KeyRow, key_list_row
from gateway.control.api.route import Access, Call, Nothing, Route
from gateway.control.store import Key, KeyUsage, Store
from gateway.control.store.management import Creation, KeyChange
from gateway.domain import resources
from gateway.domain.errors import BadRequest, Conflict, Forbidden, NotFound
from gateway.domain.keys import PREFIX, KeyRecord, digest, label, new_secret
from gateway.domain.resources import LimitReset

PAGE = 100  # of the contract
KEYS_MAX = 10_000  # of one class in one account, which anybody may open
CREATIONS_PER_MINUTE = 600  # whoever makes and deletes them in turn leaves rows behind as well
_DIGEST = re.compile("[0-9a-f]{64}")  # what may be a key's hash at all; the rest need not trouble the store
_IDEMPOTENCY_KEY = re.compile("[!-~]{1,255}")


class KeysQuery(msgspec.Struct, frozen=True):
    offset: Annotated[int, Meta(ge=0, le=10**9)] = 0
    include_disabled: Literal["true", "false"] = "false"
    include_expired: Literal["true", "false"] = "false"
    workspace_id: str | UnsetType = UNSET


class NewKeyBody(msgspec.Struct, frozen=True, kw_only=True):
    name: Name
    limit: Usd | None = None  # None: all the account has
    limit_reset: LimitReset | None = None
    include_byok_in_limit: bool = False
    expires_at: Moment | None = None
    creator_user_id: str | None = None
    workspace_id: str | UnsetType = UNSET


class KeyPatchBody(msgspec.Struct, frozen=True, kw_only=True):
    name: Name | UnsetType = UNSET
    disabled: bool | UnsetType = UNSET
    limit: Usd | UnsetType | None = UNSET
    limit_reset: LimitReset | UnsetType | None = UNSET
    include_byok_in_limit: bool | UnsetType = UNSET
    workspace_id: str | UnsetType = UNSET


class KeyListAnswer(msgspec.Struct, frozen=True):
    data: list[KeyRow]


class KeyAnswer(msgspec.Struct, frozen=True):
    data: KeyRow


class NewKeyAnswer(msgspec.Struct, frozen=True):
    data: KeyRow
    key: str  # the secret, never shown again


class DeletedAnswer(msgspec.Struct, frozen=True):
    deleted: Literal[True] = True


class KeysApi:
    """Handlers over the keys of one class. `on_key_changed(digest, record)` is called after each commit (None: it is gone),
    `on_limit_changed(resource)` when there may be more or less of a key's limit than edges believe. `now` is unix time.
    """

    def __init__(
        self,
        *,
        path: str,
        access: Access,
        management: bool,
        authentication: Authentication,
        store: Store,
        on_key_changed: Callable[[str, KeyRecord | None], None],
        on_limit_changed: Callable[[str], None],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._access: Access = access
        self._management = management
        self._authentication = authentication
        self._store = store
        self._on_key_changed = on_key_changed
        self._on_limit_changed = on_limit_changed
        self._now = now
        self._creations = Attempts(most=CREATIONS_PER_MINUTE, window_s=60.0, now=time.monotonic)

    def routes(self) -> list[Route]:
        path, one, access = self._path, self._path + "/{hash}", self._access
        return [
            Route(
                method="GET", path=path, access=access, handler=self.list_keys, query=KeysQuery, answer=KeyListAnswer,
                summary="Keys, newest first, 100 a page",
            ),
            Route(
                method="POST", path=path, access=access, handler=self.create_key, body=NewKeyBody, answer=NewKeyAnswer, status=201,
                summary="Make a key; its secret is in this answer only",
            ),
            Route(method="GET", path=one, access=access, handler=self.get_key, answer=KeyAnswer, summary="One key"),
            Route(
                method="PATCH", path=one, access=access, handler=self.update_key, body=KeyPatchBody, answer=KeyAnswer, summary="Change it",
            ),
            Route(
                method="DELETE", path=one, access=access, handler=self.delete_key, answer=DeletedAnswer,
                summary="Revoke a key; what it spent stays on the account's books",
            ),
        ]  # fmt: skip

    async def list_keys(self, call: Call[KeysQuery, Nothing]) -> web.Response:
        query, account_id = call.query, call.caller.account_id
        if query.workspace_id is not UNSET:
            require_own_workspace(query.workspace_id, account_id)
        keys = await self._store.page_of_keys(
            account_id,
            management=self._management,
            include_disabled=query.include_disabled == "true",
            expired_by_s=-1 if query.include_expired == "true" else int(self._now()),
            offset=query.offset,
            limit=PAGE,
        )
        return answer(KeyListAnswer(await self._rows(keys)))

    async def get_key(self, call: Call[Nothing, Nothing]) -> web.Response:
        return answer(KeyAnswer(await self._row(await self._owned(call))))

    async def create_key(self, call: Call[Nothing, NewKeyBody]) -> web.Response:
        self._creations.take(call.caller.account_id)
        await require_room_for_key(self._store, call.caller.account_id, management=self._management)
        token = call.request.headers.get("Idempotency-Key")
        if token is None:
            secret = new_secret()
            key = self._new_key(call, secret)
            await self._store.create_key(key)
            self._changed(key, key.limit_nanos)
        else:
            key, secret = await self._create_once(call, token)
        return answer(NewKeyAnswer(await self._row(key), secret), 201)

    async def update_key(self, call: Call[Nothing, KeyPatchBody]) -> web.Response:
        before = await self._owned(call)
        patch = call.body
        if patch == KeyPatchBody():
            raise BadRequest("No update fields provided")
        if patch.workspace_id is not UNSET:
            require_own_workspace(patch.workspace_id, before.account_id)
        name = printable_text("name", patch.name, 1, NAME_MAX) if patch.name is not UNSET else UNSET
        limit_nanos: int | UnsetType | None = UNSET
        if patch.limit is not UNSET:
            limit_nanos = usd_nanos("limit", patch.limit) if patch.limit is not None else None
        change = KeyChange(
            name=name, disabled=patch.disabled, limit_nanos=limit_nanos, limit_reset=patch.limit_reset,
            include_byok_in_limit=patch.include_byok_in_limit,
        )  # fmt: skip
        key = await self._store.change_key(before, change, int(self._now() * 1000))
        if key is None:
            raise _not_found()
        self._changed(key, key.limit_nanos)
        if (before.limit_nanos, before.limit_reset) != (key.limit_nanos, key.limit_reset):
            self._on_limit_changed(resources.key_limit(key.digest, before.limit_reset, self._now()))
        return answer(KeyAnswer(await self._row(key)))

    async def delete_key(self, call: Call[Nothing, Nothing]) -> web.Response:
        key = await self._owned(call)
        if not await self._store.delete_key(key.digest):
            raise _not_found()
        self._on_key_changed(key.digest, None)
        return answer(DeletedAnswer())

    # Parts of creation.

    def _new_key(self, call: Call[Nothing, NewKeyBody], secret: str) -> Key:
        wish, account_id, now_s = call.body, call.caller.account_id, self._now()
        if wish.workspace_id is not UNSET:
            require_own_workspace(wish.workspace_id, account_id)
        if wish.creator_user_id is not None and wish.creator_user_id != account_id:
            raise BadRequest("creator_user_id: is not a member of this account")
        return Key(
            digest=digest(secret),
            account_id=account_id,
            name=printable_text("name", wish.name, 1, NAME_MAX),
            label=label(secret),
            created_at_ms=int(now_s * 1000),
            management=self._management,
            limit_nanos=usd_nanos("limit", wish.limit) if wish.limit is not None else None,
            limit_reset=wish.limit_reset,
            expires_at_s=expiry_s("expires_at", wish.expires_at, now_s) if wish.expires_at is not None else None,
            include_byok_in_limit=wish.include_byok_in_limit,
        )

    async def _create_once(self, call: Call[Nothing, NewKeyBody], token: str) -> tuple[Key, str]:
        """The key of this creation, made now or before. No secret is stored: whoever asked makes it again with their own."""
        if not _IDEMPOTENCY_KEY.fullmatch(token):
            raise BadRequest("Idempotency-Key: must be 1 to 255 printable ASCII characters")
        own_secret = self._authentication.secret(call.request)
        salt = secrets.token_bytes(32)
        secret = _derived(own_secret, salt)
        key = self._new_key(call, secret)
        creation = Creation(
            digest=digest(b"\0".join((own_secret, self._path.encode(), token.encode()))),
            account_id=key.account_id,
            body_digest=digest(await call.request.read()),
            key_digest=key.digest,
            salt=salt,
            created_at_s=int(self._now()),
        )
        earlier = await self._store.create_key_once(key, creation)
        if earlier is None:
            self._changed(key, key.limit_nanos)
            return key, secret
        if earlier.body_digest != creation.body_digest:
            raise Conflict("Idempotency-Key: was used for another request already")
        made = await self._store.find_key(earlier.key_digest)
        if made is None:
            raise Conflict("Idempotency-Key: the key that was made under it is deleted")
        # Edges are told nothing: they were when it was made, and what was read here may be older than a change since.
        return made, _derived(own_secret, earlier.salt)

    def _changed(self, key: Key, limit_nanos: int | None) -> None:
        self._on_key_changed(key.digest, key.record())
        if limit_nanos is not None:
            self._on_limit_changed(resources.key_limit(key.digest, key.limit_reset, self._now()))

    # Reading.

    async def _owned(self, call: Call[Nothing, Nothing] | Call[Nothing, KeyPatchBody]) -> Key:
        sought = call.request.match_info["hash"]
        key = await self._store.find_key(sought) if _DIGEST.fullmatch(sought) else None
        if key is None or key.account_id != call.caller.account_id or key.management != self._management:
            raise _not_found()
        return key

    async def _row(self, key: Key) -> KeyRow:
        return (await self._rows([key]))[0]

    async def _rows(self, keys: list[Key]) -> list[KeyRow]:
        usage = await self._store.usage_of_keys([key.digest for key in keys], self._now())
        return [key_list_row(key, *usage.get(key.digest, (KeyUsage(), None))) for key in keys]


async def require_room_for_key(store: Store, account_id: str, *, management: bool = False) -> None:
    """Raises Forbidden where the account has as many keys as one may have; a few more may be made at the same moment."""
    if await store.page_of_keys(
        account_id, management=management, include_disabled=True, expired_by_s=-1, offset=KEYS_MAX - 1, limit=1
    ):  # fmt: skip
        raise Forbidden(f"An account may have {KEYS_MAX:,} keys; delete some that are not needed any more")


def _derived(secret: bytes, salt: bytes) -> str:
    return PREFIX + hmac.new(secret, salt, hashlib.sha256).hexdigest()


def _not_found() -> NotFound:
    return NotFound("API key not found")
