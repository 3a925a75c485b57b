"""A stream on its way from provider to caller: events as they come, cut at event borders, spliced, metered.

What precedes the first content waits for it, so that until then another endpoint may serve; after it events pass on, or
one error event ends them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
from multidict import CIMultiDictProxy

from gateway.domain.errors import GatewayError, StreamBroken, StreamStalled, UpstreamFault, UpstreamGarbage
from gateway.edge.attempts import ERROR_BODY_BYTES_MAX, Attempt
from gateway.edge.providers import Upstream
from gateway.edge.responses import EVENT_STREAM
from gateway.edge.snapshots import Choice
from gateway.wire.answer import NotAnAnswer, rewrite
from gateway.wire.completion import normal_finish
from gateway.wire.cutter import BYTE_ORDER_MARK, EventCutter, LineTooLong
from gateway.wire.sse import Splicer
from gateway.wire.unstreamed import as_events, kind_of
from gateway.wire.usage import BYTES_PER_TOKEN, completion_told

if TYPE_CHECKING:
    from gateway.edge.exchange import InferenceExchange

REASONING_S_MIN = 120.0  # a model that reasons is never cut under this


class StreamAttempt(Attempt):
    """Events as they come, cut at event borders. What precedes the first content waits for it."""

    __slots__ = (
        "_cutter", "_first_token_s", "_held", "_held_bytes", "_idle_s", "_is_whole", "_silence_s", "_splicer", "_undeclared", "reasons",
    )  # fmt: skip

    def __init__(self, exchange: InferenceExchange, choice: Choice, upstream: Upstream) -> None:
        super().__init__(exchange, choice, upstream)
        self._splicer = Splicer(exchange.generation_id, choice.model.id, upstream.provider.name, choice.shape)
        self._cutter: EventCutter | None = None  # of a stream that comes in pieces
        self._undeclared = False  # it does not say that it is a stream
        self._is_whole = False  # nor is it one: an answer in one piece
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._first_token_s = 0.0  # that the first content may take from the head on
        self._silence_s = float("inf")  # that all before it may take, where another endpoint could serve instead
        envelope = exchange.envelope
        self.reasons = choice.model.reasoning is not None or (envelope is not None and envelope.reasoning)
        self._idle_s = self._patience(choice.endpoint.timeouts.idle_s or exchange.parts.timeouts.idle_s)

    def made_tokens(self) -> int:
        return self._splicer.content_events

    def told_tokens(self) -> int:
        """What its provider says it has made so far, reasoning aside; 0: it does not say, or has ended its answer."""
        return completion_told(self._splicer.usage) if self._splicer.finish_reason is None else 0

    def has_made(self, tokens: int) -> None:
        """That many at least, though its events are fewer."""
        self._splicer.content_events = max(self._splicer.content_events, tokens)

    def start(self, body: bytes) -> None:
        self._limit_silence()
        self.phase_at = self.started_at + self._headers_s()
        super().start(body)

    def resume(self) -> None:
        if self.committed:  # what the caller's pause has left of the provider's time is no time to send in
            self.phase_at = self._exchange.parts.loop.time() + self._idle_s
        super().resume()

    def _limit_silence(self) -> None:
        exchange, setting = self._exchange, self._exchange.parts.timeouts.first_token_s
        if (own := self.endpoint.timeouts.first_token_s) is not None:
            self._first_token_s = self._patience(own)
        elif setting == "adaptive":
            limit_s = self.choice.live.first_token_limit_s(self.started_at, prompt_tokens=self._prompt_tokens(), reasoning=self.reasons)
            if exchange.has_alternatives:
                self._first_token_s = self._silence_s = limit_s
            else:  # nobody would be quicker
                self._first_token_s = max(limit_s, self.endpoint.timeouts.idle_s or exchange.parts.timeouts.idle_s)
        else:
            self._first_token_s = self._patience(float(setting))

    def phase_expired(self) -> None:
        if self._headers_late():
            return
        if not self.committed:
            super().phase_expired()
        elif self._call is not None and self._call.paused:
            self.phase_at = self._exchange.parts.loop.time() + self._idle_s  # the caller is slow, not the provider
        else:
            self._fail(StreamStalled("Provider stopped sending"))

    def _headers_late(self) -> bool:
        """The time to connect has a limit of its own: that of the headers runs from the request's leaving."""
        if self.provider_status is not None or self._call is None:
            return False
        now = self._exchange.parts.loop.time()
        due = (self._call.sent_at or now) + self._headers_s()
        if due <= now + 0.001:
            return False
        self.phase_at = due
        return True

    def _headers_s(self) -> float:
        return min(self._silence_s, self._patience(self.endpoint.timeouts.headers_s or self._exchange.parts.timeouts.headers_s))

    def _patience(self, seconds: float) -> float:
        return max(seconds, REASONING_S_MIN) if self.reasons else seconds

    def _on_ok_head(self, headers: CIMultiDictProxy[str]) -> None:
        if not self._error_status and not _is_stream(headers):
            self._undeclared = True
        exchange = self._exchange
        self.phase_at = exchange.parts.loop.time() + self._first_token_s
        exchange.rearm()

    def on_whole(self, headers: CIMultiDictProxy[str], pieces: list[bytes]) -> None:
        if "Content-Encoding" in headers or not _is_stream(headers) or pieces[0].startswith(BYTE_ORDER_MARK):
            super().on_whole(headers, pieces)
            return
        self.provider_status = 200
        self._call = None
        events, taken = self._splicer.splice_pieces(pieces)
        self._on_border(events)
        if not self.ended:
            if taken < len(pieces):
                self._on_ok_data(b"".join(pieces[taken:]))
            if not self.ended:
                self._on_ok_end()

    def _prompt_tokens(self) -> int:
        envelope = self._exchange.envelope
        return envelope.prompt_text_bytes // BYTES_PER_TOKEN if envelope is not None else 0

    def _on_ok_data(self, data: bytes) -> None:
        splicer, cutter = self._splicer, self._cutter
        if cutter is None:
            if self._undeclared:
                self._on_undeclared(data)
                return
            cutter = self._cutter = EventCutter(self._exchange.parts.upstream.sse_line_bytes_max)
        try:
            block = cutter.feed(data)
        except LineTooLong:
            self._fail(UpstreamGarbage("Provider sent an event that does not end", provider_status=200))
            return
        if not block:
            return
        events = splicer.splice(block)
        if self.first_content_at and not splicer.done and splicer.error is None:
            if events:
                self.phase_at = self._exchange.parts.loop.time() + self._idle_s
                self._exchange.stream(events)
            return
        self._on_border(events)

    def _on_undeclared(self, data: bytes) -> None:
        """Collects until the first bytes tell what it is; then it is read as that."""
        self._collect(data, self._exchange.parts.upstream.answer_bytes_max)
        if self.ended or self._is_whole:
            return
        begun = b"".join(self._collected)
        kind = kind_of(begun) or ("neither" if len(begun) > ERROR_BODY_BYTES_MAX else "")
        if kind == "stream":
            self._undeclared = False
            self._collected.clear()
            self._on_ok_data(begun)
        elif kind == "whole":
            self._is_whole = True
        elif kind:
            self._error_status = 200  # a page, or anything else

    def _on_whole_answer(self, body: bytes) -> None:
        """All at once, in the events that it would have come in; or an error object."""
        try:
            answer = rewrite(body, "", "", "")
            events = self._splicer.splice(as_events(body))
        except (NotAnAnswer, msgspec.DecodeError, KeyError):
            self._fail_with_answer(200, body)
            return
        self.has_made(-(-answer.content_bytes // BYTES_PER_TOKEN))
        self._on_border(events)

    def _on_border(self, events: bytes) -> None:
        """The first content, the end, or an error: what happens at most a few times per stream."""
        splicer = self._splicer
        exchange = self._exchange
        now = exchange.parts.loop.time()
        if not self.committed and splicer.content_events:
            self.first_content_at = now
            self.choice.live.first_content(self.number, now, self._prompt_tokens())
            events = b"".join((*self._held, events))
            self._held.clear()
            self.phase_at = now + self._idle_s
        if splicer.error is not None:
            if self.committed and events:
                exchange.stream(events)
            self._fail_with_event(splicer.error)
        elif splicer.done:
            self._on_done(events)
        elif self.committed:
            if events:
                exchange.stream(events)
                exchange.rearm()
        else:
            self._hold(events)

    def _hold(self, events: bytes) -> None:
        self._held.append(events)
        self._held_bytes += len(events)
        if self._held_bytes > self._exchange.parts.upstream.sse_line_bytes_max:
            self._fail(UpstreamGarbage("Provider sends events without content", provider_status=200))

    def _on_done(self, events: bytes) -> None:
        """`[DONE]`, or a clean end after a finish reason: the protocol says that the answer is complete."""
        splicer = self._splicer
        self._exchange.answered_at = time.perf_counter()
        if not self.committed:
            if splicer.finish_reason is None:
                self._fail(UpstreamGarbage("Provider's answer is empty", provider_status=200))
                return
            events = b"".join((*self._held, events))
            self._held.clear()
            self.first_content_at = self._exchange.parts.loop.time()
        self.note()
        call, self._call = self._call, None
        if call is not None:
            call.drain()
        self._end("ok")
        self._exchange.end_stream(events, splicer.final_event)

    def note(self) -> None:
        splicer = self._splicer
        if splicer.dropped:
            self.upstream.dropped_events.add(splicer.dropped)
            splicer.dropped = 0
        self.usage = splicer.usage
        self.upstream_id = splicer.upstream_id or ""
        self.native_finish_reason = splicer.finish_reason
        self.finish_reason = normal_finish(splicer.finish_reason)

    def leave(self, error: GatewayError | None) -> None:
        self.note()
        super().leave(error)

    def _on_ok_end(self) -> None:
        if self._undeclared or (not self.committed and self._cutter is not None and kind_of(self._cutter.rest) == "whole"):
            body = self._cutter.rest if self._cutter is not None else b"".join(self._collected)
            self._collected.clear()
            self._on_whole_answer(body)
            return
        if self._cutter is not None:
            self._on_ok_data(b"\n\n")  # of an event that the end has ended
            if self.ended:
                return
        if self._splicer.finish_reason is not None:
            self._on_done(b"")
        elif self.committed:
            self._fail(StreamBroken("Provider ended its answer without finishing it"))
        else:
            self._fail(UpstreamGarbage("Provider's answer is empty", provider_status=self.provider_status))

    def _fail(self, error: GatewayError) -> None:
        if self.ended:
            return
        self.note()
        if not self.committed:
            super()._fail(error)
            return
        if self._splicer.finish_reason is not None and self._splicer.error is None:
            self._on_done(b"")  # the caller has the whole answer and the word of its end: only what follows that was lost
            return
        if not isinstance(error, StreamBroken):
            cause = error
            error = StreamBroken(cause.message, metadata=cause.metadata)
            error.__cause__ = cause
            if isinstance(cause, UpstreamFault):
                error.provider_status = cause.provider_status
        error.metadata = {"provider_name": self.upstream.provider.name, **error.metadata}
        self._end(error.code)
        self._tell_failure(error)
        self._exchange.break_stream(error)


def _is_stream(headers: CIMultiDictProxy[str]) -> bool:
    return headers.get("Content-Type", "").lower().startswith(EVENT_STREAM)
