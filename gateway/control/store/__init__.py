"""The store: what control remembers durably, as records and one protocol that every store keeps.

A store knows no plaintext key and no HTTP. Its failures are `StoreUnavailable`, whatever the database calls them;
refusals (an email that exists, an amount out of range) are caller faults of `gateway.domain.errors`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import msgspec

from gateway.domain.errors import StoreUnavailable
from gateway.domain.keys import KeyRecord

LimitReset = Literal["daily", "weekly", "monthly"]
TransactionKind = Literal["topup", "grant", "usage", "refund", "adjustment"]

OWN_BOOKS = "gateway:"  # prefix of the gateway's own books; account ids begin with "user_"
FUNDING_BOOK = OWN_BOOKS + "funding"  # where operators' top-ups come from
GRANTS_BOOK = OWN_BOOKS + "grants"  # where credit that nobody paid for comes from


class StoreLocked(StoreUnavailable):
    """Another process has this store open."""

    code = "store_locked"


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """Who owns credit."""

    id: str  # "user_..."
    email: str  # lower case, unique
    created_at_ms: int
    password_hash: str | None = None  # None: cannot sign in with a password


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """A key as stored: everything but the secret."""

    digest: str
    account_id: str
    name: str
    label: str
    created_at_ms: int
    management: bool = False
    disabled: bool = False
    limit_nanos: int | None = None  # None: no limit of its own
    limit_reset: LimitReset | None = None
    expires_at_s: int | None = None  # unix seconds
    updated_at_ms: int | None = None

    def record(self) -> KeyRecord:
        """What an edge must know of it."""
        return KeyRecord(
            digest=self.digest,
            account_id=self.account_id,
            name=self.name,
            label=self.label,
            management=self.management,
            disabled=self.disabled,
            expires_at_s=self.expires_at_s,
        )


class LedgerReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What rebuilding every balance from its entries found."""

    ok: bool | None  # None: finished exchanges wait in a journal, so nothing can be said yet
    accounts: int
    generations: int  # transactions of kind "usage"
    difference_nanos: int  # sum of all absolute differences; 0 when ok
    problems: tuple[str, ...] = ()  # which books and transactions, the first 100


class Store(Protocol):
    """The contract of every store. Each writing method is one durable transaction: all of it or none.

    All methods raise StoreUnavailable when the database does not answer.
    """

    async def create_account(self, account: Account, keys: Sequence[Key], *, topup_nanos: int) -> None:
        """Add an account with its first keys and its first credit (0: none).

        Raises Conflict: the email exists. BadRequest: the amount is out of range.
        """

    async def create_key(self, key: Key) -> None:
        """Raises NotFound: no such account. BadRequest: the limit is out of range."""

    async def find_keys(self, digests: Iterable[str]) -> dict[str, KeyRecord]:
        """The records of those digests that exist."""

    async def find_account(self, account_id: str) -> Account | None: ...

    async def list_accounts(self, *, offset: int = 0, limit: int = 100) -> list[Account]:
        """Oldest first."""

    async def list_keys(self, account_id: str, *, offset: int = 0, limit: int = 100) -> list[Key]:
        """Newest first."""

    async def add_credits(self, account_id: str, nanos: int, *, note: str) -> int:
        """Top up an account; its new balance in nanos. Raises NotFound, BadRequest (not positive, out of range)."""

    async def balance(self, account_id: str) -> int:
        """Nanos; 0 for an account without entries."""

    async def verify_ledger(self) -> LedgerReport:
        """Rebuild every balance from its entries, on one consistent snapshot."""

    async def close(self) -> None: ...
