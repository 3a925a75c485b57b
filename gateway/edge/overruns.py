"""Whether a stream's provider has gone past all that was paid for: asked once a second of streams that run, never of an event.

What a request may cost is held before anybody is asked, and nobody is charged more. But a provider that knows no end would be
listened to, and would have to be paid by us, until `total_s`. It must be certain: some honest ones write a token a letter at a
time, and some count what a model thinks beside the limit that its caller set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.domain.errors import Overrun
from gateway.edge.quotes import completion_max
from gateway.edge.relay import StreamAttempt

if TYPE_CHECKING:
    from gateway.edge.exchange import InferenceExchange

EVENTS_PER_TOKEN = 8  # letter by letter: English has 4 to 5 to a token, code up to 6
MORE_TOKENS = 256  # short answers may be of long tokens; an end mark, a stop sequence, the frame of a tool call may be counted or not


def overrun(exchange: InferenceExchange) -> Overrun | None:
    """What to end this stream with, its attempt being charged for the most from then on; None: its provider may still be honest."""
    attempt, envelope = exchange.attempt, exchange.envelope
    if not isinstance(attempt, StreamAttempt) or envelope is None:
        return None
    paid = completion_max(envelope, attempt.choice)
    # A limit of the caller's may be one of the answer alone: of what a model thinks beside it, only the endpoint knows the most.
    most = attempt.choice.completion_tokens_max if attempt.reasons else paid
    if attempt.made_tokens() <= EVENTS_PER_TOKEN * most + MORE_TOKENS and attempt.told_tokens() <= most + MORE_TOKENS:
        return None
    attempt.has_made(paid)
    return Overrun(
        f"All {paid} completion tokens that credit was held for are used up and the provider goes on; the stream was ended",
        metadata={"provider_name": attempt.upstream.provider.name},
    )
