"""What a batch of finished exchanges comes to in the books. Pure: state in, sums out, for any store to write.

Exactly once is decided here: a generation that is known with the same charge is passed over, one with another charge
is refused and the first stands. What edges and providers say is checked for range, so that no sum can wrap.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence

import msgspec

from gateway.control.store import REVENUE_BOOK, JournalSlice, RefusalReason, Refused
from gateway.domain.generation import Generation
from gateway.domain.money import AMOUNT_NANOS_MAX

OWN_BOOK_NANOS_MAX = 2**63 - 1  # the gateway's own books face all accounts together
TOKENS_MAX = 2**40  # of one generation; eight million such days fit one sum
CREATED_AT_MS_MAX = 253_402_300_799_999  # the end of year 9999, beyond which there are no dates
SETTLES_MAX = 8  # resources of one generation

_encoder = msgspec.msgpack.Encoder()


class State(msgspec.Struct):
    """What the store knows of a batch beforehand."""

    accounts: set[str]  # of those named, the ones that exist
    charged: dict[str, tuple[str, int]]  # generations that exist: id -> (account, nanos)
    balances: dict[str, int]  # of these accounts and the revenue book; absent: 0


class DailyKey(msgspec.Struct, frozen=True, array_like=True):
    """Names one row of the daily roll-up."""

    account_id: str
    day: str
    key_digest: str
    model: str
    endpoint_id: str
    provider: str


class DailySums(msgspec.Struct, array_like=True):
    requests: int = 0
    served: int = 0  # a provider made something
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    nanos: int = 0


class Posting(msgspec.Struct):
    """What to write."""

    generations: list[Generation] = []
    exists: int = 0
    refused: list[Refused] = []
    balances: dict[str, int] = {}  # books that change -> their new balance
    used: dict[str, int] = {}  # account -> nanos more
    settled: dict[tuple[str, str], int] = {}  # (resource, incarnation) -> nanos more
    daily: dict[DailyKey, DailySums] = {}
    keys: dict[str, tuple[int, int]] = {}  # digest -> (requests, nanos) more

    @property
    def charged_nanos(self) -> int:
        return sum(self.used.values())


def posting(slices: Iterable[JournalSlice], state: State) -> Posting:
    """The whole batch in its order. Repeats within the batch count once, too."""
    result = Posting()
    charged = dict(state.charged)
    balances = dict(state.balances)
    for piece in slices:
        result.refused.extend(Refused(piece.file, "corrupt", "", record) for record in piece.corrupt)
        for generation in piece.generations:
            known = charged.get(generation.id)
            if known == (generation.account_id, generation.charged_nanos):
                result.exists += 1
                continue
            reason = "conflict" if known is not None else _reason_to_refuse(generation, state.accounts, balances)
            if reason is not None:
                result.refused.append(refused(piece.file, reason, generation))
                continue
            charged[generation.id] = (generation.account_id, generation.charged_nanos)
            _post(result, piece.incarnation, generation, balances)
    return result


def refused(file: str, reason: RefusalReason, generation: Generation) -> Refused:
    return Refused(file, reason, generation.id, _encoder.encode(generation))


def _reason_to_refuse(generation: Generation, accounts: set[str], balances: dict[str, int]) -> RefusalReason | None:
    if generation.account_id not in accounts:
        return "unknown_account"
    nanos = generation.charged_nanos
    usage = generation.usage
    tokens: Sequence[int] = ()
    if usage is not None:
        tokens = (usage.prompt_tokens, usage.completion_tokens, usage.reasoning_tokens, usage.cached_tokens)
    fits = (
        0 <= nanos <= AMOUNT_NANOS_MAX
        and 0 <= generation.created_at_ms <= CREATED_AT_MS_MAX
        and all(0 <= count <= TOKENS_MAX for count in tokens)
        and len(generation.settles) <= SETTLES_MAX
        and balances.get(generation.account_id, 0) - nanos >= -AMOUNT_NANOS_MAX
        and balances.get(REVENUE_BOOK, 0) + nanos <= OWN_BOOK_NANOS_MAX
    )
    return None if fits else "out_of_range"


def _post(result: Posting, incarnation: str, generation: Generation, balances: dict[str, int]) -> None:
    result.generations.append(generation)
    nanos = generation.charged_nanos
    account = generation.account_id
    if nanos:
        for book, change in ((account, -nanos), (REVENUE_BOOK, nanos)):
            balances[book] = result.balances[book] = balances.get(book, 0) + change
        result.used[account] = result.used.get(account, 0) + nanos
        for resource in generation.settles:
            row = (resource, incarnation)
            result.settled[row] = result.settled.get(row, 0) + nanos
    requests, spent = result.keys.get(generation.key_digest, (0, 0))
    result.keys[generation.key_digest] = (requests + 1, spent + nanos)
    sums = result.daily.setdefault(_daily_key(generation), DailySums())
    sums.requests += 1
    sums.nanos += nanos
    usage = generation.usage
    sums.served += not generation.error or (usage is not None and usage.completion_tokens > 0)
    if usage is not None:
        sums.prompt_tokens += usage.prompt_tokens
        sums.completion_tokens += usage.completion_tokens
        sums.reasoning_tokens += usage.reasoning_tokens
        sums.cached_tokens += usage.cached_tokens


def _daily_key(generation: Generation) -> DailyKey:
    day = datetime.datetime.fromtimestamp(generation.created_at_ms // 1000, datetime.UTC).date().isoformat()
    return DailyKey(generation.account_id, day, generation.key_digest, generation.model, generation.endpoint_id, generation.provider)
