"""Generations: the durable record of an exchange, and the ids we give them."""

from __future__ import annotations

import secrets

import msgspec

from gateway.domain.usage import Usage

_ID_CHARS = 20
_REFILL_IDS = 256


class GenerationIds:
    """Gives `gen-<unix seconds>-<20 alphanumerics>`: opaque to callers, 80 bits that nobody can guess.

    Random bytes are fetched for many ids at once: one system call each cost 4 % of a request.
    """

    def __init__(self) -> None:
        self._noise: list[str] = []

    def new(self, now_s: int) -> str:
        """A fresh id; `now_s` is unix time."""
        if not self._noise:
            noise = secrets.token_hex(_ID_CHARS // 2 * _REFILL_IDS)
            self._noise = [noise[at : at + _ID_CHARS] for at in range(0, len(noise), _ID_CHARS)]
        return f"gen-{now_s}-{self._noise.pop()}"


class AttemptRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One call to one endpoint, as the generation remembers it."""

    endpoint_id: str
    provider: str  # slug
    outcome: str  # "ok" or an error's code
    status: int | None = None  # the provider's own
    latency_ms: int | None = None  # to the first content, or to the failure
    usage: Usage | None = None  # these two where several attempts made parts of one answer: its own part
    charged_nanos: int = 0


class Generation(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):
    """The durable record of one exchange that reached a provider: what the journal carries and the store keeps.

    Money is in nanos. `settles` names the leased resources that `charged_nanos` was spent from, and the quota that it counts against.
    """

    id: str
    account_id: str
    key_digest: str
    created_at_ms: int  # unix
    model: str  # the model that served, or was asked for
    endpoint_id: str = ""  # "" when no attempt served
    provider: str = ""  # slug
    upstream_id: str = ""
    kind: str = "chat"
    streamed: bool = False
    cancelled: bool = False  # the caller left before the end
    status: int = 200
    error: str = ""  # an error's code
    finish_reason: str | None = None
    native_finish_reason: str | None = None
    usage: Usage | None = None
    charged_nanos: int = 0
    prompt_nanos: int = 0  # of what was charged
    unbilled_nanos: int = 0  # what it cost and is not charged: a broken stream, an empty answer, what is beyond all that an account may owe
    settles: tuple[str, ...] = ()
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
