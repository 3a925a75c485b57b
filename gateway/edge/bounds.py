"""How far a stream may go: asked once a second of streams that run, never of an event.

What a request may cost is held before anybody is asked, and nobody is charged more. But a provider that knows no end would be
listened to, and would have to be paid by us, until `total_s`: it is cut once it has certainly made more than was paid for.
A model without a ceiling and without a context length may answer on and on, and nobody knows its most: what is held when it
begins pays for `FIRST_TOKENS`, here more is held before that is used up, and where there is no more the stream ends with its hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from gateway.domain.errors import CallerFault, GatewayError, InsufficientCredit, Overrun
from gateway.edge.admission import Admission
from gateway.edge.quotes import Quote, completion_most
from gateway.edge.relay import StreamAttempt
from gateway.edge.settlement import usage_of
from gateway.edge.snapshots import FIRST_TOKENS
from gateway.ledger.book import Hold
from gateway.ledger.pricing import cost

if TYPE_CHECKING:
    from gateway.edge.exchange import InferenceExchange
    from gateway.wire.envelope import Envelope

# It must be certain that a provider overruns: some honest ones write a token a letter at a time (English has 4 to 5 to a token,
# code up to 6), and short answers may be of long tokens; an end mark, a stop sequence, the frame of a tool call may be counted or not.
EVENTS_PER_TOKEN = 8
MORE_TOKENS = 256
SECONDS_LEFT = 3  # that a hold should last for at the pace of the last second, when more is asked for


class _Growth:
    """What a stream of unknown length has cost at the last look, in nanos, and what became of asking for more."""

    __slots__ = ("is_short", "refused", "spent", "waits")

    def __init__(self) -> None:
        self.spent = 0
        self.is_short = False  # what is held does not pay for another second
        self.waits = False  # for more
        self.refused: GatewayError | None = None


class Bounds:
    """`look_after` each running stream once a second."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._growing: WeakKeyDictionary[InferenceExchange, _Growth] = WeakKeyDictionary()

    def look_after(self, exchange: InferenceExchange) -> None:
        """End a stream that went past its bounds; hold more for one that will soon need it."""
        attempt, envelope = exchange.attempt, exchange.envelope
        if not isinstance(attempt, StreamAttempt) or envelope is None:
            return
        if (error := overrun(attempt, envelope)) is not None:
            exchange.break_stream(error)
        elif attempt.choice.is_open and envelope.max_tokens is None:
            self._fund(exchange, attempt, envelope)

    def _fund(self, exchange: InferenceExchange, attempt: StreamAttempt, envelope: Envelope) -> None:
        growth, hold = self._growing.setdefault(exchange, _Growth()), exchange.hold
        assert hold is not None
        spent = _spent(exchange, attempt, envelope)
        grown, growth.spent = spent - growth.spent, spent
        left, step = hold.nanos - spent, attempt.choice.worst.nanos(0, FIRST_TOKENS, 0)
        growth.is_short = left <= grown
        if left >= max(step // 2, SECONDS_LEFT * grown):
            growth.refused = None
        elif growth.refused is not None and growth.is_short:
            exchange.break_stream(growth.refused)
        elif not growth.waits:
            self._ask(exchange, attempt, growth, max(step, 2 * SECONDS_LEFT * grown), max(1, step // 8, grown))

    def _ask(self, exchange: InferenceExchange, attempt: StreamAttempt, growth: _Growth, nanos: int, least: int) -> None:
        """For so much, or else for half of it, down to what is worth the asking."""
        hold, key = exchange.hold, exchange.key
        assert hold is not None and key is not None

        def then(more: Hold | None, error: GatewayError | None) -> None:
            growth.waits = False
            if exchange.finished or hold.resolved:
                if more is not None:
                    more.release()
            elif more is None and nanos > least and isinstance(error, CallerFault):
                self._ask(exchange, attempt, growth, max(least, nanos // 2), least)
            elif more is not None and hold.add(more):
                growth.refused = None
            else:  # refused, or the window of the key's limit is another one by now
                growth.refused = _worded(error)
                if growth.is_short:
                    exchange.break_stream(growth.refused)

        growth.waits = True
        most = Quote(nanos, FIRST_TOKENS, 0, attempt.choice, images=0, is_free=False)
        self._admission.reserve(key, most, then, grows=True)


def overrun(attempt: StreamAttempt, envelope: Envelope) -> Overrun | None:
    """What to end this stream with, its attempt being charged for the most from then on; None: its provider may still be honest."""
    choice, paid = attempt.choice, completion_most(envelope, attempt.choice)
    # A limit of the caller's may be one of the answer alone: of what a model thinks beside it, only the endpoint knows the most.
    most = choice.completion_tokens_most if attempt.reasons else paid
    if attempt.made_tokens() <= EVENTS_PER_TOKEN * most + MORE_TOKENS and attempt.told_tokens() <= most + MORE_TOKENS:
        return None
    attempt.has_made(paid)
    return Overrun(
        f"All {paid} completion tokens that credit was held for are used up and the provider goes on; the stream was ended",
        metadata={"provider_name": attempt.upstream.provider.name},
    )


def _spent(exchange: InferenceExchange, attempt: StreamAttempt, envelope: Envelope) -> int:
    """What the stream would be charged for now, with the parts that others made before."""
    attempt.note()
    parts = exchange.continuation.parts if exchange.continuation is not None else ()
    own = cost(attempt.endpoint.price, usage_of(envelope, attempt, was_cut=True), exchange.created_s).total_nanos
    return own + sum([each.cost.total_nanos for each in parts])


def _worded(error: GatewayError | None) -> GatewayError:
    """A refusal as a stream that has begun is told it: it asked for no number of tokens."""
    if error is not None and not isinstance(error, InsufficientCredit):
        return error
    return InsufficientCredit("Insufficient credits: what is left does not pay for more of this answer. Add more using /credits")
