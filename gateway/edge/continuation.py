"""A stream that broke goes on at another endpoint of its model, from the text that its caller has: where the caller wished it.

The caller sees one stream and one usage object; each endpoint is paid for its part, if the whole ends well. Only text can
be gone on with. Where nobody can, the error event that ends a broken stream stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from gateway.domain.errors import ContentRefused, ContextTooLong, GatewayError, StreamBroken
from gateway.domain.generation import Generation
from gateway.domain.usage import Usage
from gateway.edge.quotes import Quote, quote
from gateway.edge.relay import StreamAttempt
from gateway.edge.selection import remaining
from gateway.edge.settlement import Bill, usage_of
from gateway.edge.upstream import CallListener
from gateway.ledger.book import Hold
from gateway.ledger.pricing import Cost, cost
from gateway.routing.wishes import read_wishes
from gateway.wire.envelope import Envelope
from gateway.wire.prefill import REPEATS, continued, spelled
from gateway.wire.transcript import TranscribingSplicer, Transcript

if TYPE_CHECKING:
    from multidict import CIMultiDictProxy

    from gateway.edge.attempts import Attempt
    from gateway.edge.exchange import InferenceExchange
    from gateway.edge.providers import Upstream
    from gateway.edge.snapshots import Choice


def is_wished(envelope: Envelope) -> bool:
    """Whether the caller asked that a broken stream go on elsewhere. The wishes were read before, so that they can be."""
    wishes = envelope.provider
    return wishes is not None and envelope.stream and b'"continuation"' in bytes(wishes) and read_wishes(wishes).continuation is True


class Part(msgspec.Struct, frozen=True):
    """What an endpoint made before it broke off."""

    attempt: Attempt
    envelope: Envelope  # of its request
    usage: Usage
    cost: Cost
    error: StreamBroken


class Continuation:
    """The broken parts of one exchange's stream, and who is asked to go on. `parts` are those that another attempt follows."""

    def __init__(self, exchange: InferenceExchange, envelope: Envelope) -> None:
        self.transcript = Transcript()
        self.parts: list[Part] = []
        self._exchange = exchange
        self._envelope = envelope  # as the caller sent it
        self.is_paused = False  # the caller is slow
        self._is_over = False  # nobody goes on: the next error stands

    def goes_on(self, error: GatewayError, choices: Sequence[Choice]) -> bool:
        """Whether the stream that broke with `error` needs no end: another endpoint is asked, or credit for it, or nothing was missing."""
        exchange = self._exchange
        attempt, transcript = exchange.attempt, self.transcript
        assert attempt is not None and exchange.envelope is not None
        cause = error.__cause__
        is_final = isinstance(cause, GatewayError) and not isinstance(cause, StreamBroken) and not cause.retryable
        if self._is_over or not isinstance(error, StreamBroken) or is_final or not transcript.can_go_on:
            return False
        usage = usage_of(exchange.envelope, attempt, was_cut=True)
        made = cost(attempt.endpoint.price, usage, exchange.created_s, exchange.paid_millionths)
        part = Part(attempt, exchange.envelope, usage, made, error)
        made_tokens = sum([each.usage.completion_tokens for each in (*self.parts, part)])
        limit = self._envelope.max_tokens
        if limit is not None and made_tokens >= limit:
            self._end_at_limit(attempt)
            return True
        envelope = continued(self._envelope, bytes(transcript.text), made_tokens)
        if envelope is None:
            return False
        able = [each for each in choices if each.model is attempt.model and (each.endpoint.prefill or envelope.kind == "text")]
        return bool(able) and self._with_credit(quote(envelope, able), part, lambda: self._ask(part, envelope, able))

    def attempt_failed(self, error: GatewayError, choices: Sequence[Choice]) -> None:
        """Whoever was asked to go on did not: the next one, or the end."""
        exchange = self._exchange
        failed, envelope = exchange.attempt, exchange.envelope
        assert failed is not None and envelope is not None
        # That a prefill is refused says nothing of others. What is too long or filtered is so for all of a kind.
        is_final = isinstance(error, ContextTooLong | ContentRefused)
        if not exchange.go_on(envelope, remaining(choices, failed.choice, error) if is_final else choices):
            self._give_up()

    def body_for(self, attempt: Attempt, body: bytes) -> bytes:
        """The request of an attempt; `body` is its plainest spelling."""
        endpoint, envelope, choice = attempt.endpoint, self._exchange.envelope, attempt.choice
        assert envelope is not None
        if not (self.parts and self.transcript.text and endpoint.prefill and envelope.kind == "chat"):
            return body
        stream_options = attempt.upstream.stream_options
        return spelled(envelope, endpoint.prefill).body_for(endpoint.upstream_model, choice.limit_name, stream_options=stream_options)

    def billed(self, bill: Bill, *, is_free: bool) -> Bill:
        """The bill of the whole: `bill` is that of the last part. Its tokens are what the caller sent, once, and what all made."""
        usages = [each.usage for each in self.parts] + ([bill.usage] if bill.usage is not None else [])
        usage = msgspec.structs.replace(
            usages[0],
            completion_tokens=sum([each.completion_tokens for each in usages]),
            reasoning_tokens=sum([each.reasoning_tokens for each in usages]),
            estimated=any(each.estimated for each in usages),
        )
        total, prompt = sum([each.cost.total_nanos for each in self.parts]), sum([each.cost.prompt_nanos for each in self.parts])
        if is_free:
            return Bill(usage, unbilled_nanos=bill.unbilled_nanos + total, last=bill)
        return Bill(usage, bill.nanos + total, bill.prompt_nanos + prompt, bill.unbilled_nanos, last=bill)

    def tell(self, record: Generation, bill: Bill, now: float) -> None:
        """Puts into the record what each attempt made, and the times of the whole."""
        exchange, last = self._exchange, bill.last
        first = self.parts[0].attempt
        record.latency_ms = int((first.first_content_at - first.started_at) * 1000)
        record.generation_ms = int((now - first.started_at) * 1000)
        made = {id(each.attempt): (each.usage, each.cost.total_nanos if bill.nanos else 0) for each in self.parts}
        if last is not None and last.usage is not None:
            made[id(exchange.attempt)] = (last.usage, last.nanos)
        attempts = []
        for attempt in exchange.attempts:
            told = attempt.record()
            if (mine := made.get(id(attempt))) is not None:
                told = msgspec.structs.replace(told, usage=mine[0], charged_nanos=mine[1])
            attempts.append(told)
        record.attempts = tuple(attempts)

    def _with_credit(self, most: Quote, part: Part, go: Callable[[], bool]) -> bool:
        """Goes on once the hold covers what was made and the most that may follow."""
        exchange = self._exchange
        hold, key = exchange.hold, exchange.key
        assert hold is not None and key is not None
        spent = sum([each.cost.total_nanos for each in (*self.parts, part)])
        missing = spent + most.nanos - hold.nanos
        if missing <= 0:
            return go()

        def then(more: Hold | None, refused: GatewayError | None) -> None:
            if exchange.finished or hold.resolved:
                if more is not None:
                    more.release()
            elif more is None or not hold.add(more) or not go():
                self._is_over = True
                exchange.break_stream(part.error)

        exchange.parts.admission.reserve(key, msgspec.structs.replace(most, nanos=missing), then, grows=True)
        return True

    def _ask(self, part: Part, envelope: Envelope, able: list[Choice]) -> bool:
        self.parts.append(part)
        if self._exchange.go_on(envelope, able):
            return True
        self._take_back()
        return False

    def _take_back(self) -> StreamBroken:
        """The last part is the end: its endpoint is the one that broke the stream."""
        exchange, part = self._exchange, self.parts.pop()
        exchange.attempt, exchange.envelope = part.attempt, part.envelope
        return part.error

    def _give_up(self) -> None:
        self._is_over = True
        self._exchange.break_stream(self._take_back())

    def _end_at_limit(self, attempt: Attempt) -> None:
        """All tokens that were asked for are made; only the word of the end was lost."""
        exchange = self._exchange
        attempt.finish_reason = "length"
        assert isinstance(attempt, ContinuableAttempt)
        exchange.end_stream(attempt.limit_event(), attempt.final_event)


class ContinuableAttempt(StreamAttempt):
    """A stream that another can go on with, or one that goes on."""

    __slots__ = ("_continuation",)

    _splicer: TranscribingSplicer

    def __init__(self, exchange: InferenceExchange, choice: Choice, upstream: Upstream) -> None:
        super().__init__(exchange, choice, upstream)
        continuation = exchange.continuation
        assert continuation is not None
        self._continuation = continuation
        if not continuation.parts:  # what one has said that failed before its first content, nobody has read
            continuation.transcript = Transcript()
        self._splicer = TranscribingSplicer(
            exchange.generation_id,
            choice.model.id,
            upstream.provider.name,
            choice.shape,
            continuation.transcript,
            goes_on=bool(continuation.parts),
            repeats=bool(continuation.parts) and choice.endpoint.prefill in REPEATS and exchange.kind == "chat",
        )

    def on_whole(self, headers: CIMultiDictProxy[str], pieces: list[bytes]) -> None:
        CallListener.on_whole(self, headers, pieces)

    def start(self, body: bytes) -> None:
        super().start(self._continuation.body_for(self, body))
        if self._continuation.is_paused:
            self.pause()

    def pause(self) -> None:
        self._continuation.is_paused = True
        super().pause()

    def resume(self) -> None:
        self._continuation.is_paused = False
        if not self.committed:  # as below: the caller's pause is no time of the provider's
            self.phase_at = self._exchange.parts.loop.time() + self._idle_s
        super().resume()

    def phase_expired(self) -> None:
        if self._call is not None and self._call.paused:  # a caller that has a part already may be slow before the next one comes
            self.phase_at = self._exchange.parts.loop.time() + self._idle_s
        else:
            super().phase_expired()

    @property
    def follows_content(self) -> bool:
        return self.committed or bool(self._continuation.parts)

    def limit_event(self) -> bytes:
        exchange = self._exchange
        return self._splicer.limit_event(exchange.kind, exchange.created_s)

    def final_event(self, usage: bytes) -> bytes:
        return self._splicer.final_event(usage)
