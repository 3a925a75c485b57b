"""One caller request for inference, from its head to the last byte of its answer: a stage a method, read downwards.

The listener's connection tells what arrived; this object authenticates, reads the envelope, ranks endpoints, and then
lets attempts run until one has a first content byte. Before that byte everything may be tried elsewhere and the status
is still ours; after it the answer passes on, or ends with one error event. The end is told once, by `_finish`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import floor
from random import random
from typing import TYPE_CHECKING

from gateway.domain.errors import CallerFault, CallerGone, DeadlineExceeded, Draining, GatewayError, NoEndpointAvailable, Overloaded
from gateway.domain.keys import KeyRecord
from gateway.edge.attempts import AnswerAttempt, Attempt
from gateway.edge.caller import CallerConnection
from gateway.edge.continuation import ContinuableAttempt, Continuation, is_wished
from gateway.edge.deadline import Deadline
from gateway.edge.endings import error_answer, error_end, good_end
from gateway.edge.explanation import Explanation
from gateway.edge.heads import RequestHead
from gateway.edge.parts import Parts
from gateway.edge.presented import presented, refusal_of
from gateway.edge.quotes import quote, worst_nanos
from gateway.edge.relay import StreamAttempt
from gateway.edge.responses import EVENT_STREAM, error_headers
from gateway.edge.selection import next_of, remaining, select
from gateway.edge.settlement import Bill
from gateway.edge.snapshots import Choice
from gateway.ledger.book import Hold
from gateway.ledger.pricing import MILLION
from gateway.routing.budget import backoff_s
from gateway.wire.envelope import Envelope, Kind, parse

if TYPE_CHECKING:
    from gateway.edge.content import KeptCaller

KEEPALIVE = b": OPENROUTER PROCESSING\n\n"


class InferenceExchange:
    """A chat or completion request and all its attempts."""

    __slots__ = (
        "__weakref__", "_asked", "_body", "_caller", "_choices", "_deadline", "_last_error", "_streaming_begun", "_tried_again",
        "answered_at", "attempt", "attempts", "bill", "content", "continuation", "created_s", "envelope", "error", "explanation",
        "finished", "generation_id", "head", "hold", "keepalive_at", "key", "kind", "last_events", "overhead_s", "paid_millionths", "parts",
        "render", "started_at", "status", "streaming", "total_at",
    )  # fmt: skip

    def __init__(self, parts: Parts, caller: CallerConnection, head: RequestHead, kind: Kind) -> None:
        self.parts = parts
        self.head = head
        self.kind: Kind = kind
        self.started_at = now = parts.loop.time()
        self.total_at = now + parts.timeouts.total_s
        self.keepalive_at = now + parts.timeouts.keepalive_s
        self.key: KeyRecord | None = None
        self.envelope: Envelope | None = None
        self.streaming = False
        self.generation_id = ""
        self.created_s = 0
        self.hold: Hold | None = None
        self.paid_millionths = MILLION  # of what it costs; fixed when it begins
        self.attempt: Attempt | None = None  # under way, or the one that served
        self.attempts: list[Attempt] = []
        self.continuation: Continuation | None = None  # for callers who wish that a broken stream goes on elsewhere
        self.explanation: Explanation | None = None  # for callers who ask how their endpoint was chosen
        self.content: KeptCaller | None = None  # for accounts that let it be kept what was said
        self.last_events = b""
        self.render: Callable[[bytes], bytes] | None = None  # puts the `usage` object into what the answer ends with
        self.finished = False
        self.status = 200  # told to the caller, or 499
        self.error: GatewayError | None = None  # how it ended
        self.bill: Bill | None = None
        self.overhead_s = 0.0  # inside us, not waiting for anybody
        self.answered_at = 0.0  # by the clock of `overhead_s`: when the provider had said all
        self._caller: CallerConnection | KeptCaller | None = caller
        self._deadline = caller.deadline  # the connection's own, as long as it lasts
        self._asked = False  # for the key
        self._body: bytes | None = None
        self._choices: list[Choice] = []
        self._tried_again = False
        self._last_error: GatewayError | None = None
        self._streaming_begun = False

    def __repr__(self) -> str:
        return f"<InferenceExchange {self.generation_id or self.head.path} attempts {len(self.attempts)}>"

    @property
    def is_streaming(self) -> bool:
        """Whether the caller has content, and more is to come."""
        return self.streaming and not self.finished and self.attempt is not None and self.attempt.follows_content

    @property
    def has_alternatives(self) -> bool:
        """Whether another endpoint may be tried after the present one."""
        return bool(self._choices)

    # 1. The head is here: who is it?

    def on_body_awaited(self) -> None:
        self._authenticate()

    def on_body(self, body: bytes) -> None:
        self._body = body
        if self.key is not None:
            self._begin(self.key, body)
        else:
            self._authenticate()

    def on_body_refused(self, error: GatewayError) -> None:
        self._fail(error)

    def _authenticate(self) -> None:
        if self._asked:
            return
        self._asked = True
        head = self.head
        try:
            known = head.presented = head.presented or presented(head, self.parts.site, self._caller)
        except CallerFault as error:
            self._fail(error)
            return
        keys, key_digest = self.parts.keys, known.key_digest
        if (key := keys.known.get(key_digest)) is not None:
            self._on_key(key, False)
        else:
            keys.find(key_digest, self._on_key)

    def _on_key(self, key: KeyRecord | None, unavailable: bool) -> None:
        if self.finished:
            return
        self.key = key
        error = refusal_of(key, unavailable, self.head)
        if error is not None:
            self._fail(error)
        elif key is not None and self._body is not None:
            self._begin(key, self._body)

    # 2. The body is here: what is asked, and who could answer?

    def _begin(self, key: KeyRecord, body: bytes) -> None:
        now, intake = time.perf_counter(), self.parts.intake
        if intake.has_time(now):
            self._serve(key, body, now)
        elif not intake.wait(self, key.account_id, now):
            self.crowd_out()

    def crowd_out(self) -> None:
        """Told by the intake, instead of `begin_late`."""
        self._fail(Overloaded("too many requests of this account wait to be served; try again shortly", retry_after_s=1.0))

    def begin_late(self, waited_s: float) -> None:
        """Told by the intake, once."""
        if not self.finished:
            assert self.key is not None and self._body is not None
            self.overhead_s += waited_s
            self._serve(self.key, self._body, time.perf_counter())

    def _serve(self, key: KeyRecord, body: bytes, clock: float) -> None:
        self._body = None
        parts = self.parts
        now = parts.loop.time()
        if key.rules.log_prompts:
            self._keep_content(body)
        try:
            parts.settlement.require_room()
            envelope = self.envelope = parse(body, self.kind)
            known = self.head.presented
            assert known is not None
            if known.explains:
                self.explanation = Explanation(parts.router, envelope, now)
            self._choices = list(select(envelope, key, known.session_id, parts.router, now))
        except GatewayError as error:
            self._fail(error)
            return
        if self.explanation is not None:
            self.explanation.chosen(self._choices)
        self.streaming = envelope.stream
        if envelope.provider is not None and is_wished(envelope):
            self.continuation = Continuation(self, envelope)
        wall = time.time()
        self.created_s = floor(wall)
        self.generation_id = parts.ids.new(wall)
        parts.retries.request()
        admission = parts.admission
        hold = admission.hold_at_once(key, worst_nanos(envelope, self._choices), now)
        if hold is not None:
            self._on_reserved(hold, None)
        else:
            admission.reserve(key, quote(envelope, self._choices), self._on_reserved)
        self.overhead_s += time.perf_counter() - clock
        if not self.finished and self.attempt is None:  # a lease is awaited
            self.rearm()

    def _keep_content(self, body: bytes) -> None:
        caller, contents = self._caller, self.parts.contents
        assert caller is not None
        self._caller = self.content = contents.keep(self, caller, body)
        self.paid_millionths = contents.paid_millionths

    # 3. Credit is set aside: at once, unless a lease ran dry.

    def _on_reserved(self, hold: Hold | None, error: GatewayError | None) -> None:
        if self.finished:
            if hold is not None:
                hold.release()
        elif hold is None:
            assert error is not None
            self._fail(error)
        else:
            self.hold = hold
            if not self._next_attempt():
                self._give_up()

    # 4. Attempts, one after the other, until a first content byte.

    def _next_attempt(self) -> bool:
        """Whether one is under way now."""
        assert self.envelope is not None
        parts = self.parts
        while (choice := self._next_choice()) is not None:
            upstream = parts.providers.of(choice.endpoint)
            if upstream is None:
                continue
            kind = ContinuableAttempt if self.continuation is not None else StreamAttempt if self.streaming else AnswerAttempt
            attempt = kind(self, choice, upstream)
            self.attempt = attempt
            self.attempts.append(attempt)
            try:
                attempt.start(
                    self.envelope.body_for(choice.endpoint.upstream_model, choice.limit_name, stream_options=upstream.stream_options)
                )
            except Overloaded as full:
                attempt.not_sent(full)
                self._last_error = full
                continue
            return True
        return False

    def _next_choice(self) -> Choice | None:
        """The first time the best; then what may still be tried, within the request's and the node's budget of attempts."""
        choices, parts = self._choices, self.parts
        if not self.attempts:
            return choices.pop(0) if choices else None
        now = parts.loop.time()
        sent = sum([each.was_sent for each in self.attempts])
        found = next_of(choices, now) if sent < parts.attempts_max else None
        if found is None or (sent and not parts.retries.take(now)):
            return None
        choices.remove(found)
        return found

    def attempt_failed(self, error: GatewayError) -> None:
        """Told by the attempt, at most once, never after its first content byte."""
        self._last_error = error
        failed = self.attempt
        if self.finished or failed is None:
            return
        if self._caller is None:
            self._finish(499, CallerGone("the caller hung up"))  # nobody is left to read what another would answer
            return
        if self.continuation is not None and self.continuation.parts:
            self.continuation.attempt_failed(error, self._choices)
            return
        self._choices = remaining(self._choices, failed.choice, error)
        if self._choices and self._next_attempt():
            return
        if error.transient and not self._tried_again and not failed.choice.live.is_held(self.parts.loop.time()):
            # Nobody else can serve it: once more, where a moment may have mended it.
            self._tried_again = True
            self._choices = [failed.choice]
            self.parts.loop.call_later(backoff_s(0, random), self._try_again)
        else:
            self._give_up()

    def _try_again(self) -> None:
        if not self.finished and not self._next_attempt():
            self._give_up()

    def _give_up(self) -> None:
        self._fail(self._last_error or NoEndpointAvailable("no provider of this model can be tried now", retry_after_s=1.0))

    # 5. The answer.

    def answer(self, render: Callable[[bytes], bytes]) -> None:
        """A whole answer, in our name; `render` puts the `usage` object into it."""
        if not self.finished:
            self.render = render
            self._finish(200, None)

    def stream(self, data: bytes) -> None:
        """Events for the caller; the first ones carry the first content."""
        caller = self._caller
        if caller is None:
            return
        if not self._streaming_begun:
            self._streaming_begun = True
            caller.begin_stream(200, self._named(), EVENT_STREAM)
        self.keepalive_at = self.parts.loop.time() + self.parts.timeouts.keepalive_s
        caller.stream(data)

    def end_stream(self, data: bytes, render: Callable[[bytes], bytes]) -> None:
        """The last events; usage, `[DONE]` and the end of the framing leave in the same write."""
        if not self.finished and self._caller is not None:
            self.last_events, self.render = data, render
            self._finish(200, None)

    def break_stream(self, error: GatewayError) -> None:
        """After the first content byte: one error event, no success marker after it; unless another endpoint goes on."""
        if self.finished or self.continuation is None or not self.continuation.goes_on(error, self._choices):
            self._fail(error)

    def go_on(self, envelope: Envelope, choices: Sequence[Choice]) -> bool:
        """Whether one of these was found that is asked to go on with the stream."""
        self.envelope, self._choices = envelope, list(choices)
        return self._next_attempt()

    def _named(self) -> tuple[tuple[str, str], ...]:
        return (("X-Generation-Id", self.generation_id),) if self.generation_id else ()

    # 6. Waiting.

    def rearm(self) -> None:
        """A phase began whose deadline may be sooner than the one set."""
        at, attempt = self.total_at, self.attempt
        if self.streaming and self.keepalive_at < at:
            at = self.keepalive_at
        if attempt is not None and 0 < attempt.phase_at < at:
            at = attempt.phase_at
        self._deadline.set(at, self._expired)

    def _expired(self) -> None:
        if self.finished:
            return
        now = self.parts.loop.time() + 0.001
        if now >= self.total_at:
            self._fail(DeadlineExceeded("The request took too long and was given up"))
            return
        attempt = self.attempt
        if attempt is not None and attempt.phase_at and now >= attempt.phase_at:
            attempt.phase_expired()
        elif self.streaming and now >= self.keepalive_at:
            self.stream(KEEPALIVE)
        if not self.finished:
            self.rearm()

    # 7. The caller's side.

    @property
    def ends_with_eof(self) -> bool:
        """Whether nobody is served any more who stops talking: then nothing is made, or owed, that nobody may be there to read."""
        return self.streaming or (self.attempt is not None and self.attempt.endpoint.price.is_zero)

    def on_caller_gone(self) -> None:
        """A stream's provider is cancelled at once; a whole answer is awaited where it is paid for."""
        self._caller = None
        if self.finished:
            return
        if self.attempt is not None and not self.attempt.ended and not self.ends_with_eof:
            self._deadline = Deadline(self.parts.loop)
            self.rearm()
            return
        self._finish(499, CallerGone("the caller hung up"))

    def on_caller_slow(self) -> None:
        if self.attempt is not None:
            self.attempt.pause()

    def on_caller_ready(self) -> None:
        if self.attempt is not None:
            self.attempt.resume()

    def on_drain_end(self) -> None:
        self._fail(Draining("The gateway is shutting down", retry_after_s=1.0))

    # 8. The end, once.

    def _fail(self, error: GatewayError) -> None:
        if not self.finished:
            self._finish(error.http_status, error)

    def _finish(self, status: int, error: GatewayError | None) -> None:
        """Stop the provider where it still works, and settle; only then may the last byte go."""
        self.finished = True
        self.status, self.error = status, error
        if error is not None:
            # The frames it came through hold the body, and this exchange: 25 MiB for each refusal, until the collector comes.
            error.__traceback__ = error.__context__ = None
        if self._caller is not None:
            self._deadline.clear()
        else:
            self._deadline.close()
        attempt = self.attempt
        if attempt is not None and (error is not None or not attempt.ended):
            attempt.leave(error)
        if self.hold is not None and self.attempts:
            self.parts.settlement.end(self)
            return
        if self.hold is not None:
            self.hold.release()
        self.parts.report.finished((self,), self.parts.loop.time())
        self.send_last()

    def send_last(self) -> None:
        """What the caller still waits for; told once the end of the exchange is on record."""
        caller, error = self._caller, self.error
        if caller is None:
            if self.content is not None:
                self.content.end()
        elif error is None:
            data = good_end(self)
            if self._streaming_begun:
                caller.end_stream(data)
            elif self.streaming:
                caller.answer_stream(200, data, self._named(), EVENT_STREAM)
            else:
                caller.answer(200, data, self._named())
        elif self._streaming_begun:
            caller.end_stream(error_end(self, error))
        else:
            caller.answer(error.http_status, error_answer(self, error), (*self._named(), *error_headers(error)))
        self._let_go()

    def abandon(self) -> None:
        """Its end cannot be put on record, so no caller may take it for one."""
        if self._caller is not None:
            self._caller.abort()
        if self.content is not None:
            self.content.forget()
            self.content = None
        self._let_go()

    def _let_go(self) -> None:
        for attempt in self.attempts:
            if attempt.number:
                attempt.tell_nothing()  # its endpoint must not wait for a word
        # Attempts know their exchange: without this cut every exchange would wait for the cycle collector.
        self._caller = self.attempt = self.hold = self.continuation = None
        self.attempts.clear()
