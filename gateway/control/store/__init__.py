"""The store: what control remembers durably, as records and one protocol that every store keeps.

A store knows no plaintext key and no HTTP. Its failures are `StoreUnavailable`, whatever the database calls them;
refusals (an email that exists, an amount out of range) are caller faults of `gateway.domain.errors`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

import msgspec

from gateway.control.store.management import ManagementStore
from gateway.domain.errors import StoreUnavailable
from gateway.domain.generation import Generation
from gateway.domain.keys import KeyRecord
from gateway.domain.resources import LimitReset
from gateway.domain.rules import NO_RULES, AccountRules, RulesChange

RefusalReason = Literal["corrupt", "unreadable", "unknown_account", "out_of_range", "conflict", "invalid", "too_old"]
TransactionKind = Literal["topup", "grant", "usage", "refund", "adjustment", "expiry"]

CreditKind = Literal["topup", "grant", "refund", "adjustment"]

OWN_BOOKS = "gateway:"  # prefix of the gateway's own books; account ids begin with "user_"
FUNDING_BOOK = OWN_BOOKS + "funding"  # where money that was paid comes from, and refunds go
FEES_BOOK = OWN_BOOKS + "fees"  # what was paid on top of purchases
GRANTS_BOOK = OWN_BOOKS + "grants"  # where credit that nobody paid for comes from
ADJUSTMENTS_BOOK = OWN_BOOKS + "adjustments"  # what an operator put right
EXPIRED_BOOK = OWN_BOOKS + "expired"  # where credit goes that nobody used in time
REVENUE_BOOK = OWN_BOOKS + "revenue"  # where usage goes


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
    include_byok_in_limit: bool = False
    rules: AccountRules = NO_RULES  # the account's; not stored with the key

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
            limit_nanos=self.limit_nanos,
            limit_reset=self.limit_reset,
            rules=self.rules,
        )


class LedgerReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What rebuilding every balance from its entries found."""

    ok: bool | None  # None: finished exchanges wait in a journal, so nothing can be said yet
    accounts: int
    generations: int
    difference_nanos: int  # sum of all absolute differences; 0 when ok
    removed: int = 0  # generations that were kept for long enough and are not among the others
    problems: tuple[str, ...] = ()  # which books and transactions, the first 100


class KeyUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What a key has spent: ever, and since the UTC day, week (from Monday) and month began."""

    total_nanos: int = 0
    daily_nanos: int = 0
    weekly_nanos: int = 0
    monthly_nanos: int = 0


class Credits(msgspec.Struct, frozen=True, kw_only=True):
    """What an account ever got and used. The balance is `total_nanos - used_nanos`."""

    total_nanos: int = 0  # all credit
    purchased_nanos: int = 0  # the part that was paid for, less refunds
    used_nanos: int = 0


class CreditChange(msgspec.Struct, frozen=True, kw_only=True):
    """A change of an account's credit by anything but usage and time.

    `reference` says what it stands for ("stripe:pi_...", "refund:..."), for ever: told again, it changes nothing more.
    """

    account_id: str
    kind: CreditKind
    nanos: int  # what the account gets: less than 0 for a refund, more for a top-up and a grant, either for an adjustment
    reference: str
    fee_nanos: int = 0  # of a top-up: paid on top of `nanos`, and kept
    note: str = ""


class CreditChanged(msgspec.Struct, frozen=True, kw_only=True):
    balance_nanos: int
    exists: bool = False  # it had been made already


class Expired(msgspec.Struct, frozen=True, kw_only=True):
    """Credit that an account lost to time."""

    account_id: str
    nanos: int


class JournalSlice(msgspec.Struct, frozen=True):
    """Consecutive records of one journal file, from byte `start` to byte `end`."""

    file: str  # name within the journal's folder
    incarnation: str  # of the edge that wrote it
    start: int
    end: int
    records: Sequence[bytes] = ()  # each a Generation as MessagePack
    corrupt: Sequence[bytes] = ()  # whole damaged records


class Refused(msgspec.Struct, frozen=True):
    """A record that was set aside, with its bytes, instead of being charged."""

    file: str
    reason: RefusalReason
    generation_id: str  # "" where it cannot be read
    record: bytes


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What a batch of journal slices came to."""

    generations: int = 0  # new rows
    exists: int = 0  # the same generation with the same charge was there already
    charged_nanos: int = 0
    refused: Sequence[Refused] = ()


NOBODY = ""  # instead of an incarnation: what was used of a quota, by whichever edge


class LeaseRow(msgspec.Struct):
    """What one edge was granted of one resource and what of that is settled, since the edge started. In nanos, or in requests."""

    resource: str
    incarnation: str
    granted_nanos: int = 0
    settled_nanos: int = 0

    @property
    def open_nanos(self) -> int:
        """What the edge may still spend, or has spent without control having read of it. Negative: it overspent."""
        return self.granted_nanos - self.settled_nanos


class LeaseBook(Protocol):
    """All leases, within one transaction of a store."""

    async def totals(self, resources: Iterable[str]) -> dict[str, int]:
        """What there is of each resource before any lease: a balance, or a key's limit less its use in the window.

        Of a quota: the nanos that its account ever bought, which decide how large it is. A resource that cannot be leased
        (unknown, or a key without a limit) is left out.
        """

    async def rows(self, *, resources: Iterable[str], incarnations: Iterable[str]) -> list[LeaseRow]:
        """The rows of any of these resources, and all rows of these incarnations."""

    async def write(self, rows: Iterable[LeaseRow]) -> None:
        """Insert or replace `granted_nanos`; what is settled is the journal's to say and stays."""

    async def delete(self, incarnation: str) -> None: ...


class Store(ManagementStore, Protocol):
    """The contract of every store. Each writing method is one durable transaction: all of it or none.

    All methods raise StoreUnavailable when the database does not answer.
    """

    async def create_account(self, account: Account, keys: Sequence[Key], *, topup_nanos: int, grant_nanos: int = 0) -> None:
        """Add an account with its first keys and its first credit (0: none), paid for or granted.

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

    async def rules(self, account_id: str) -> AccountRules:
        """What the account allows; `NO_RULES` also where there is no such account."""

    async def change_rules(self, account_id: str, change: RulesChange) -> tuple[AccountRules, list[KeyRecord]]:
        """What the account allows from now on, and all its keys with that. Raises NotFound: no such account."""

    async def change_credit(self, change: CreditChange) -> CreditChanged:
        """The one door for credit that is not usage: each change once by its reference, with its counter-entry.

        Raises NotFound (no such account), BadRequest (the amount or a balance is out of range, or a refund is of more than was
        paid), Conflict (the reference stands for another change).
        """

    async def add_credits(self, account_id: str, nanos: int, *, note: str, fee_nanos: int = 0) -> int:
        """An operator's top-up, under a reference of its own; the new balance in nanos. Raises as `change_credit`."""

    async def expire_credits(self, *, before_ms: int, now_ms: int) -> list[Expired]:
        """Take away what is left of credit that came before `before_ms`, the oldest being used first.

        What edges may be spending now (their leases) stays until it has come back.
        """

    async def balance(self, account_id: str) -> int:
        """Nanos; 0 for an account without entries."""

    async def balances(self, account_ids: Iterable[str]) -> dict[str, int]:
        """Nanos of each; those without entries are left out."""

    async def find_key(self, digest: str) -> Key | None: ...

    async def generation(self, generation_id: str) -> Generation | None:
        """Of any account: whether the caller may see it is the caller's to check."""

    async def credits(self, account_id: str) -> Credits:
        """Zeros for an account that never had credit."""

    async def key_usage(self, digest: str, now_s: float) -> KeyUsage:
        """`now_s` is unix time. Zeros for a key that was never used."""

    async def free_requests(self, account_id: str, now_s: float) -> int:
        """How many requests of an account count against its quota for the UTC day of `now_s` (unix time)."""

    async def journal_offsets(self) -> dict[str, int]:
        """How many bytes of each journal file are in the store."""

    async def apply_journal(self, slices: Sequence[JournalSlice]) -> Applied:
        """Post these records and move the offsets of their files, each record once whatever is repeated.

        A record that cannot be posted is set aside and never keeps others from it. Raises StoreUnavailable also when a
        slice does not begin where its file was left: read the offsets again.
        """

    async def apply_running(self, incarnation: str, records: Sequence[bytes]) -> Applied:
        """Post what the streams of a dead edge had cost; generations that exist are passed over. Raises StoreUnavailable."""

    async def remove_generations(self, *, before_ms: int, limit: int) -> int:
        """Remove the oldest generations that were posted before `before_ms`, `limit` at most; how many. Their money and daily sums stay.

        From then on records of exchanges that ended before the last of them was posted are refused, unless their generations are
        there: whether they were posted once cannot be told any more. Raises StoreUnavailable also when a long read must end first.
        """

    async def forget_journals(self, files: Iterable[str]) -> None:
        """Drop the offsets of files that are no more."""

    async def revenue(self) -> int:
        """Nanos charged for usage, ever."""

    def leasing(self) -> AbstractAsyncContextManager[LeaseBook]:
        """A transaction on the leases: committed when the block ends, rolled back when it raises."""

    async def forget_windows(self, now_s: float) -> int:
        """Drop the lease rows of windows that are over and of which nothing is out; how many. `now_s` is unix time."""

    async def lease_holders(self) -> set[str]:
        """Incarnations of the edges that have lease rows."""

    async def verify_ledger(self) -> LedgerReport:
        """Rebuild every balance from its entries, on one consistent snapshot."""

    async def close(self) -> None: ...
