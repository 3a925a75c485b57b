"""The most that a request can cost, over all endpoints that may serve it: what admission holds."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from gateway.edge.snapshots import Choice
from gateway.wire.envelope import Envelope
from gateway.wire.media import UNKNOWN_TOKENS

MESSAGE_TOKENS = 16  # what a chat template may add around each message


class Quote(msgspec.Struct, frozen=True):
    """The most that a request can cost, whichever of its endpoints serves it. Amounts in nanos."""

    nanos: int
    completion_tokens: int
    prompt_tokens: int  # one a byte, which no tokenizer exceeds
    dearest: Choice
    images: int
    is_free: bool  # every endpoint that may serve asks for nothing, ever


def quote(envelope: Envelope, choices: Sequence[Choice]) -> Quote:
    """What to hold for these choices.

    The prompt is held at a token per byte however large the balance: at an estimate, as many callers at once as a
    balance has holds for could spend four times of it. Where nobody knows how long it is, as much is held as an endpoint may say to
    have read.
    """
    prompt_tokens = prompt_most(envelope)
    is_known = prompt_tokens < UNKNOWN_TOKENS
    most, dearest, completion = -1, choices[0], 0
    for choice in choices:
        tokens = completion_max(envelope, choice)
        nanos = choice.worst.nanos(prompt_tokens if is_known else choice.prompt_tokens_most, tokens, envelope.images)
        if nanos > most:
            most, dearest, completion = nanos, choice, tokens
    is_free = most == 0 and all(choice.endpoint.price.is_zero for choice in choices)
    return Quote(most, completion, prompt_tokens if is_known else dearest.prompt_tokens_most, dearest, envelope.images, is_free)


def worst_nanos(envelope: Envelope, choices: Sequence[Choice]) -> int:
    """The quote's amount alone."""
    prompt_tokens, images, most = prompt_most(envelope), envelope.images, 0
    if prompt_tokens >= UNKNOWN_TOKENS:
        return quote(envelope, choices).nanos
    rivals = choices[0].rivals
    if len(choices) == rivals.number and not envelope.models:  # all of one model, so only its dearest ones need be asked
        choices = rivals.dearest
    for choice in choices:
        nanos = choice.worst.nanos(prompt_tokens, completion_max(envelope, choice), images)
        if nanos > most:
            most = nanos
    return most


def prompt_most(envelope: Envelope) -> int:
    """The most tokens that the prompt may have, with what a template adds; UNKNOWN_TOKENS and more: nobody knows."""
    return envelope.prompt_bytes_max + MESSAGE_TOKENS * (envelope.messages or 1)


def completion_max(envelope: Envelope, choice: Choice) -> int:
    """The most completion tokens this endpoint may make for this request; where nobody knows, as many as are held for at first."""
    asked = envelope.max_tokens
    if asked is None:
        return choice.completion_tokens_max
    most = choice.completion_tokens_most
    return most if asked > most else asked


def completion_most(envelope: Envelope, choice: Choice) -> int:
    """The same, where nobody knows: more than any endpoint makes."""
    asked, most = envelope.max_tokens, choice.completion_tokens_most
    return most if asked is None or asked > most else asked
