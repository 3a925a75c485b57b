"""What a batch of finished exchanges comes to in the books. Pure: state in, sums out, for any store to write.

Of a record only what the books need is decoded, and records are summed by what they have in common: at thousands a second
this is most of control's work. What edges and providers say is checked for range, so that no sum can wrap. Exactly
once is decided by the store's unique ids; here a generation that is known with the same charge is passed over, one with
another charge is refused and the first stands. Of what ended before the horizon the ids may have been removed: that is refused.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterable, Sequence
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from gateway.control.store import REVENUE_BOOK, JournalSlice, RefusalReason, Refused
from gateway.domain import resources
from gateway.domain.generation import by_place
from gateway.domain.money import AMOUNT_NANOS_MAX

OWN_BOOK_NANOS_MAX = 2**63 - 1  # the gateway's own books face all accounts together
TOKENS_MAX = 2**40  # of one generation; eight million such days fit one sum
CREATED_AT_MS_MAX = 253_402_300_799_999  # the end of year 9999, beyond which there are no dates
SETTLES_MAX = 8  # resources of one generation
DAY_MS = 86_400_000

_Tokens = Annotated[int, Meta(ge=0, le=TOKENS_MAX)]


class _Usage(msgspec.Struct, array_like=True, gc=False):
    prompt_tokens: _Tokens
    completion_tokens: _Tokens
    cached_tokens: _Tokens = 0
    cache_write_tokens: _Tokens = 0
    reasoning_tokens: _Tokens = 0


class _Record(msgspec.Struct, array_like=True, gc=False):
    """What the books need of a Generation, its first members. The decoder checks the ranges; the rest of the bytes it skips."""

    id: str
    account_id: str
    key_digest: str
    created_at_ms: Annotated[int, Meta(ge=0, le=CREATED_AT_MS_MAX)]
    model: str
    endpoint_id: str = ""
    provider: str = ""
    error: str = ""
    usage: _Usage | None = None
    charged_nanos: Annotated[int, Meta(ge=0, le=AMOUNT_NANOS_MAX)] = 0
    settles: Annotated[tuple[str, ...], Meta(max_length=SETTLES_MAX)] = ()


class _AnyUsage(msgspec.Struct, array_like=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0


class _AnyRecord(msgspec.Struct, array_like=True):
    """The same without ranges: tells a record that says too much from one that says nothing."""

    id: str
    account_id: str
    key_digest: str
    created_at_ms: int
    model: str
    endpoint_id: str = ""
    provider: str = ""
    error: str = ""
    usage: _AnyUsage | None = None
    charged_nanos: int = 0
    settles: tuple[str, ...] = ()


_decoder = msgspec.msgpack.Decoder(_Record)
_any_decoder = msgspec.msgpack.Decoder(_AnyRecord)

# What names one row of the daily roll-up: (account, day, key, model, endpoint, provider).
Daily = tuple[str, str, str, str, str, str]
# The same over all keys: (account, day, model, endpoint, provider).
Activity = tuple[str, str, str, str, str]
# (requests, served, prompt, completion, reasoning, cached tokens, nanos)
Sums = tuple[int, int, int, int, int, int, int]
Name = TypeVar("Name", Daily, Activity)


class Group:
    """Records that count alike but for their numbers."""

    __slots__ = ("daily", "file", "incarnation", "payloads", "records", "settles")

    def __init__(self, record: _Record, piece: JournalSlice) -> None:
        day = _day(record.created_at_ms // DAY_MS)
        self.daily: Daily = (record.account_id, day, record.key_digest, record.model, record.endpoint_id, record.provider)
        self.settles = record.settles
        self.incarnation = piece.incarnation
        self.file = piece.file
        self.records: list[_Record] = []
        self.payloads: list[bytes] = []

    @property
    def account_id(self) -> str:
        return self.daily[0]

    @property
    def activity(self) -> Activity:
        account, day, _, model, endpoint, provider = self.daily
        return account, day, model, endpoint, provider

    def refused(self, reason: RefusalReason) -> list[Refused]:
        """All of them."""
        return [Refused(self.file, reason, record.id, payload) for record, payload in zip(self.records, self.payloads, strict=True)]

    def sums(self) -> Sums:
        used = [record.usage for record in self.records if record.usage is not None]
        unserved = [record for record in self.records if record.error and (record.usage is None or record.usage.completion_tokens == 0)]
        return (
            len(self.records),
            len(self.records) - len(unserved),
            sum([usage.prompt_tokens for usage in used]),
            sum([usage.completion_tokens for usage in used]),
            sum([usage.reasoning_tokens for usage in used]),
            sum([usage.cached_tokens for usage in used]),
            sum([record.charged_nanos for record in self.records]),
        )


@functools.lru_cache(64)
def _day(number: int) -> str:
    return datetime.datetime.fromtimestamp(number * DAY_MS // 1000, datetime.UTC).date().isoformat()


class Batch:
    """The records of some slices, grouped; and those that cannot be posted, whatever the store knows."""

    def __init__(self, slices: Iterable[JournalSlice], known: dict[str, tuple[str, int]] | None = None, horizon_ms: int = 0) -> None:
        """`known`: generations that exist, id -> (account, nanos), and added to. None: take all for new."""
        self.exists = 0
        self.refused: list[Refused] = []
        self._groups: dict[tuple[object, ...], Group] = {}
        for piece in slices:
            self.refused.extend(Refused(piece.file, "corrupt", "", record) for record in piece.corrupt)
            self._read(piece, known, horizon_ms)

    @property
    def groups(self) -> Iterable[Group]:
        return self._groups.values()

    def _read(self, piece: JournalSlice, known: dict[str, tuple[str, int]] | None, horizon_ms: int) -> None:
        groups, decode, incarnation = self._groups, _decoder.decode, piece.incarnation
        for payload in piece.records:
            try:
                record = decode(payload)
            except msgspec.DecodeError:
                try:
                    payload = by_place(payload)
                    record = decode(payload)
                except msgspec.DecodeError:
                    self.refused.append(_unfit(piece.file, payload))
                    continue
            if known is not None and self._is_known(record, piece.file, payload, known):
                continue
            if record.created_at_ms < horizon_ms:
                self.refused.append(Refused(piece.file, "too_old", record.id, payload))
                continue
            name = (
                record.account_id, record.key_digest, record.model, record.endpoint_id, record.provider,
                record.created_at_ms // DAY_MS, record.settles, incarnation,
            )  # fmt: skip
            group = groups.get(name)
            if group is None:
                group = groups[name] = Group(record, piece)
            group.records.append(record)
            group.payloads.append(payload)

    def _is_known(self, record: _Record, file: str, payload: bytes, known: dict[str, tuple[str, int]]) -> bool:
        charge = (record.account_id, record.charged_nanos)
        before = known.setdefault(record.id, charge)
        if before is charge:
            return False
        if before == charge:
            self.exists += 1
        else:
            self.refused.append(Refused(file, "conflict", record.id, payload))
        return True


def _unfit(file: str, payload: bytes) -> Refused:
    try:
        return Refused(file, "out_of_range", _any_decoder.decode(payload).id, payload)
    except msgspec.DecodeError:
        return Refused(file, "corrupt", "", payload)


def time_of(record: bytes) -> int | None:
    """When its exchange ended, in unix milliseconds; None: it does not say."""
    try:
        return _decoder.decode(by_place(record)).created_at_ms
    except msgspec.DecodeError:
        return None


def ids_of(slices: Iterable[JournalSlice]) -> list[str]:
    """Of all records that have one."""
    return [record.id for group in Batch(slices).groups for record in group.records]


class OutOfRange(ValueError):
    """A balance would leave its range by this batch, though each of its records is within."""


class Posting(msgspec.Struct):
    """What to write."""

    groups: dict[str, list[Group]] = {}  # by account
    exists: int = 0
    refused: Sequence[Refused] = ()
    balances: dict[str, int] = {}  # books that change -> their new balance
    used: dict[str, int] = {}  # account -> nanos more
    settled: dict[tuple[str, str], int] = {}  # (resource, incarnation) -> nanos more, or of a quota requests
    counted: dict[str, int] = {}  # quota -> requests more
    daily: dict[Daily, Sums] = {}  # more of each
    activity: dict[Activity, Sums] = {}  # more of each
    keys: dict[str, tuple[int, int]] = {}  # digest -> (requests, nanos) more

    @property
    def charged_nanos(self) -> int:
        return sum(self.used.values())


def posting(batch: Batch, *, accounts: set[str], balances: dict[str, int]) -> Posting:
    """`accounts`: of those named the ones that exist; `balances`: of them and the revenue book, absent means 0.

    Raises OutOfRange: then its records must be posted one by one to find which of them fit.
    """
    result = Posting(exists=batch.exists)
    refused = list(batch.refused)
    for group in batch.groups:
        if group.account_id in accounts:
            _add(result, group)
        else:
            refused += group.refused("unknown_account")
    result.refused = refused
    for account, nanos in result.used.items():
        result.balances[account] = balances.get(account, 0) - nanos
        if result.balances[account] < -AMOUNT_NANOS_MAX:
            raise OutOfRange(account)
    if charged := result.charged_nanos:
        result.balances[REVENUE_BOOK] = balances.get(REVENUE_BOOK, 0) + charged
        if result.balances[REVENUE_BOOK] > OWN_BOOK_NANOS_MAX:
            raise OutOfRange(REVENUE_BOOK)
    return result


def _add(result: Posting, group: Group) -> None:
    sums = group.sums()
    requests, nanos = sums[0], sums[-1]
    account, digest = group.account_id, group.daily[2]
    result.groups.setdefault(account, []).append(group)
    if nanos:
        result.used[account] = result.used.get(account, 0) + nanos
    for resource in group.settles:
        is_quota = resources.is_quota(resource)
        if amount := sums[1] if is_quota else nanos:
            row = (resource, group.incarnation)
            result.settled[row] = result.settled.get(row, 0) + amount
            if is_quota:
                result.counted[resource] = result.counted.get(resource, 0) + amount
    counted, spent = result.keys.get(digest, (0, 0))
    result.keys[digest] = (counted + requests, spent + nanos)
    _count(result.daily, group.daily, sums)
    _count(result.activity, group.activity, sums)


def _count(all_sums: dict[Name, Sums], name: Name, sums: Sums) -> None:
    before = all_sums.get(name)
    all_sums[name] = sums if before is None else tuple(map(sum, zip(before, sums, strict=True)))  # type: ignore[assignment]
