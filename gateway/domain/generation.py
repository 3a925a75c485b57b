"""Generations: the durable record of an exchange, and the ids we give them."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from math import floor
from typing import Any, TypeVar

import msgspec

from gateway.domain.usage import Usage

Named = TypeVar("Named")

_NOISE_CHARS = 16  # of 5 bits
_CHARS = b"abcdefghijklmnopqrstuvwxyz234567" * 8  # for each value of a byte, all alike often
_REFILL_IDS = 256

HEDGE_LOST = "hedge_lost"  # the outcome of an attempt that was cancelled because another one had its first content sooner


class GenerationIds:
    """Gives `gen-<unix seconds>-<20 alphanumerics>`: opaque to callers, 80 bits that nobody can guess.

    The other bits tell the time within the second, so that ids sort as they were given, at 65,536ths of a second: a store's index of them
    grows at its end, where ids in no order would have each of them change a page of its own. Random bytes are fetched for many ids at once:
    one system call each cost 4 % of a request.
    """

    def __init__(self) -> None:
        self._noise: list[str] = []

    def new(self, now_s: float) -> str:
        """A fresh id; `now_s` is unix time."""
        if not self._noise:
            noise = secrets.token_bytes(_NOISE_CHARS * _REFILL_IDS).translate(_CHARS).decode()
            self._noise = [noise[at : at + _NOISE_CHARS] for at in range(0, len(noise), _NOISE_CHARS)]
        whole = floor(now_s)
        return f"gen-{whole}-{floor((now_s - whole) * 65536):04x}{self._noise.pop()}"


class AttemptRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One call to one endpoint, as the generation remembers it."""

    endpoint_id: str
    provider: str  # slug
    outcome: str  # "ok", an error's code, or HEDGE_LOST
    status: int | None = None  # the provider's own
    latency_ms: int | None = None  # to the first content, or until it was outrun
    usage: Usage | None = None  # these two where several attempts made parts of one answer: its own part
    charged_nanos: int = 0


class Generation(msgspec.Struct, array_like=True, gc=False):
    """The durable record of one exchange that reached a provider: what the journal carries and the store keeps.

    Money is in nanos. `settles` names the leased resources that `charged_nanos` was spent from, and the quota that it counts against.
    Records keep members by place, which takes half the room of names: new ones are only ever added, and at the end.
    """

    id: str
    account_id: str
    key_digest: str
    created_at_ms: int  # unix
    model: str  # the model that served, or was asked for
    endpoint_id: str = ""  # "" when no attempt served
    provider: str = ""  # slug
    error: str = ""  # an error's code
    usage: Usage | None = None
    charged_nanos: int = 0
    settles: tuple[str, ...] = ()
    # Up to here the books read it (`control.store.posting`).
    prompt_nanos: int = 0  # of what was charged
    unbilled_nanos: int = 0  # what it cost and is not charged: a broken stream, an empty answer, what is beyond all that an account may owe
    kind: str = "chat"
    streamed: bool = False
    cancelled: bool = False  # the caller left before the end
    status: int = 200
    upstream_id: str = ""
    finish_reason: str | None = None
    native_finish_reason: str | None = None
    latency_ms: int | None = None  # to the first content
    generation_ms: int | None = None  # of the attempt that served
    http_referer: str = ""
    title: str = ""
    user_agent: str = ""
    external_user: str = ""
    session_id: str = ""
    attempts: tuple[AttemptRecord, ...] = ()

    @property
    def was_served(self) -> bool:
        """Whether a provider made something, or said that there is nothing to make: only then it counts against a quota."""
        return not self.error or (self.usage is not None and self.usage.completion_tokens > 0)


encode = msgspec.msgpack.Encoder().encode  # a generation as it is kept
_decoder = msgspec.msgpack.Decoder(Generation)
_plain_decoder = msgspec.msgpack.Decoder()
_NAMED = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))  # how maps begin in MessagePack


def decode(record: bytes) -> Generation:
    """A record that is kept, by this version or an earlier one. Raises msgspec.DecodeError."""
    return _decoder.decode(by_place(record))


def by_place(record: bytes) -> bytes:
    """A record as this version writes it; earlier ones wrote members with their names. Raises msgspec.DecodeError."""
    if not record or record[0] not in _NAMED:
        return record
    try:
        named = _plain_decoder.decode(record)
        attempts = tuple([_with_usage(AttemptRecord, attempt) for attempt in named.pop("attempts", ())])
        return encode(_with_usage(Generation, {**named, "attempts": attempts}))
    except (AttributeError, OverflowError, TypeError) as error:  # other members than these
        raise msgspec.ValidationError(str(error)) from None


def _with_usage(kind: Callable[..., Named], named: dict[str, Any]) -> Named:
    usage = named.get("usage")
    return kind(**{**named, "usage": None if usage is None else Usage(**usage)})
