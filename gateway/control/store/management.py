"""What the store keeps of people beside their money: sessions, consents, their keys' pages, and what each day came to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from gateway.domain.resources import LimitReset
from gateway.domain.rules import AccountRules

if TYPE_CHECKING:
    from gateway.control.store import Account, Key, KeyUsage

GRANTED_NOTE = "first credit"
SESSION_S = 30 * 86_400  # from signing in
IDLE_S = 7 * 86_400  # since a session was used last
TOUCH_S = 300  # how exactly that is known
FORFEIT_BOOK = "gateway:forfeited"  # where the credit of deleted accounts goes


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """A signed-in browser. Times are unix seconds."""

    digest: str  # of what its cookie holds
    account_id: str
    created_at_s: int
    used_at_s: int

    @property
    def ends_at_s(self) -> int:
        """Unless it is used before."""
        return min(self.created_at_s + SESSION_S, self.used_at_s + IDLE_S)


class KeyChange(msgspec.Struct, frozen=True, kw_only=True):
    """What is to become of a key; UNSET fields stay as they are."""

    name: str | msgspec.UnsetType = msgspec.UNSET
    disabled: bool | msgspec.UnsetType = msgspec.UNSET
    limit_nanos: int | msgspec.UnsetType | None = msgspec.UNSET
    limit_reset: LimitReset | msgspec.UnsetType | None = msgspec.UNSET
    include_byok_in_limit: bool | msgspec.UnsetType = msgspec.UNSET


class KeyWish(msgspec.Struct, frozen=True, kw_only=True):
    """The key that a consent is about, and how whoever asked for it will prove that it was them."""

    name: str
    limit_nanos: int | None = None
    limit_reset: LimitReset | None = None
    expires_at_s: int | None = None
    challenge: str = ""  # "": none
    challenge_method: str = ""


class AuthCode(msgspec.Struct, frozen=True, kw_only=True):
    """A consent that waits to be taken."""

    digest: str
    account_id: str
    expires_at_s: int
    wish: KeyWish


class Creation(msgspec.Struct, frozen=True, kw_only=True):
    """A key's creation that may be asked for again."""

    digest: str  # of who asked and of the Idempotency-Key
    account_id: str
    body_digest: str
    key_digest: str
    salt: bytes
    created_at_s: int


class DailyUsage(msgspec.Struct, frozen=True):
    """One day of one model at one endpoint, over the account's keys."""

    day: str  # UTC, YYYY-MM-DD
    model: str
    endpoint_id: str  # "" when no attempt served
    provider: str  # slug
    requests: int
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int
    nanos: int


class ModelUse(msgspec.Struct, frozen=True):
    """What was asked of one model."""

    requests: int
    tokens: int  # prompt and completion


class ManagementStore(Protocol):
    """The part of a store's contract that the management API stands on. All methods raise StoreUnavailable."""

    async def page_of_keys(
        self, account_id: str, *, management: bool, include_disabled: bool, expired_by_s: int, offset: int, limit: int
    ) -> list[Key]:
        """Keys of one class, newest first, without those that expired by `expired_by_s` (unix seconds; -1: with them)."""

    async def usage_of_keys(self, digests: Sequence[str], now_s: float) -> dict[str, tuple[KeyUsage, str | None]]:
        """What each spent, and the last UTC day on which it was used; None: never."""

    async def change_key(self, before: Key, change: KeyChange, now_ms: int) -> Key | None:
        """The key afterwards; None: it is gone. Raises BadRequest: the limit is out of range."""

    async def delete_key(self, digest: str) -> bool:
        """Whether it was there. What it spent stays on the account's books."""

    async def create_key_once(self, key: Key, creation: Creation) -> Creation | None:
        """Add a key, unless this creation was already carried out: then what that was, and nothing is added. Raises as `create_key`."""

    async def account_by_email(self, email: str) -> Account | None: ...

    async def sign_up(self, account: Account, *, grant_nanos: int) -> None:
        """Add an account without keys and with credit that nobody paid for. Raises Conflict: the email exists."""

    async def set_password(self, account_id: str, password_hash: str) -> list[str]:
        """And end all sessions of the account; their digests."""

    async def open_session(self, session: Session, *, proven: str | None, ended_before_s: int) -> bool:
        """Add a session, and forget those that began before this time. False, and no session, where `proven` is not the
        account's password hash any more: the password was changed, or the account deleted, while the old one was checked.
        """

    async def find_session(self, digest: str) -> Session | None: ...

    async def find_sessions(self, digests: Iterable[str]) -> dict[str, tuple[Session, AccountRules]]:
        """Those of these digests that exist, with what their accounts allow."""

    async def sessions_of(self, account_id: str) -> list[str]:
        """The digests of an account's sessions."""

    async def touch_session(self, digest: str, used_at_s: int) -> None: ...

    async def close_session(self, digest: str) -> None: ...

    async def add_code(self, code: AuthCode, *, now_s: int) -> None:
        """Add a consent, and forget those that expired long ago."""

    async def take_code(self, digest: str) -> AuthCode | None:
        """The consent, which nobody can take again; also one that has expired."""

    async def daily_usage(self, account_id: str, first_day: str, last_day: str, key_digests: Iterable[str] | None) -> list[DailyUsage]:
        """By day, model and endpoint, newest day first; days are included. None: of all keys, also those that are gone."""

    async def model_use(self, first_day: str) -> dict[str, ModelUse]:
        """Of all accounts by model, from this UTC day on; in steps, between which others read. Takes longer the more accounts there are."""

    async def delete_account(self, account_id: str, *, now_s: int, erase_until_s: int) -> tuple[list[str], list[str]]:
        """Forfeit the credit, remove keys, sessions and the address; the digests of its keys and of its sessions.

        The account stays in the ledger under its id. Its generations are to be erased until `erase_until_s`.
        """

    async def erasures(self) -> dict[str, int]:
        """Deleted accounts whose generations are to be erased -> until when (unix seconds)."""

    async def erase_generations(self, account_id: str, after_id: str, limit: int) -> str | None:
        """Remove what is personal from the account's next `limit` generations after this one ("": from the first).

        The id of the last of them, or None when there are no more. What it costs does not grow with other accounts' generations.
        """

    async def finish_erasure(self, account_id: str) -> None: ...
