"""One caller request for inference, from its head to the last byte of its answer: a stage a method, read downwards.

The listener's connection tells what arrived; this object authenticates, reads the envelope, ranks endpoints, and then
lets attempts run until one has a first content byte. Before that byte everything may be tried elsewhere and the status
is still ours; after it the answer passes on, or ends with one error event. The end is told once, by `_finish`.
"""

from __future__ import annotations

import asyncio
import time

from gateway.domain.catalog import Endpoint, Model
from gateway.domain.errors import (
    CallerGone,
    DeadlineExceeded,
    Draining,
    Forbidden,
    GatewayError,
    NoEndpointAvailable,
    Overloaded,
    StoreUnavailable,
    Unauthenticated,
    UnknownModel,
)
from gateway.domain.generation import GenerationIds
from gateway.domain.keys import KeyRecord, digest
from gateway.edge.attempts import AnswerAttempt, Attempt, StreamAttempt
from gateway.edge.caller import CallerConnection, RequestHead
from gateway.edge.deadline import Deadline
from gateway.edge.providers import Providers
from gateway.edge.report import ExchangeReport
from gateway.edge.snapshots import Keys, Snapshots
from gateway.settings import Timeouts, Upstream
from gateway.wire.envelope import Envelope, Kind, parse
from gateway.wire.sse import DONE, error_event

KEEPALIVE = b": OPENROUTER PROCESSING\n\n"
ATTEMPTS_MAX = 8
SECRET_BYTES_MAX = 512


class Parts:
    """What every exchange of an edge uses."""

    __slots__ = ("ids", "keys", "loop", "providers", "report", "snapshots", "timeouts", "upstream")

    def __init__(
        self,
        *,
        keys: Keys,
        snapshots: Snapshots,
        providers: Providers,
        report: ExchangeReport,
        timeouts: Timeouts,
        upstream: Upstream,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.ids = GenerationIds()
        self.keys = keys
        self.snapshots = snapshots
        self.providers = providers
        self.report = report
        self.timeouts = timeouts
        self.upstream = upstream


class InferenceExchange:
    """A chat or completion request and all its attempts."""

    __slots__ = (
        "_attempt", "_body", "_caller", "_choices", "_deadline", "_asked", "_head", "_key", "_last_error", "_parts", "_streaming_begun",
        "attempts", "created_s", "envelope", "finished", "generation_id", "keepalive_at", "kind", "overhead_s", "started_at",
        "streaming", "total_at",
    )  # fmt: skip

    def __init__(self, parts: Parts, caller: CallerConnection, head: RequestHead, kind: Kind) -> None:
        self._parts = parts
        self._caller: CallerConnection | None = caller
        self._head = head
        self._asked = False  # for the key
        self._key: KeyRecord | None = None
        self._body: bytes | None = None
        self._choices: list[tuple[Model, Endpoint]] = []
        self._attempt: Attempt | None = None
        self._last_error: GatewayError | None = None
        self._streaming_begun = False
        self._deadline = Deadline(parts.loop, self._expired)
        self.kind: Kind = kind
        self.envelope: Envelope | None = None
        self.streaming = False
        self.finished = False
        self.generation_id = ""
        self.created_s = 0
        self.started_at = parts.loop.time()
        self.total_at = self.started_at + parts.timeouts.total_s
        self.keepalive_at = self.started_at + parts.timeouts.keepalive_s
        self.attempts: list[Attempt] = []
        self.overhead_s = 0.0

    def __repr__(self) -> str:
        return f"<InferenceExchange {self.generation_id or self._head.path} attempts {len(self.attempts)}>"

    @property
    def key(self) -> KeyRecord | None:
        return self._key

    @property
    def parts(self) -> Parts:
        return self._parts

    # 1. The head is here: who is it?

    def on_body_awaited(self) -> None:
        self._authenticate()

    def on_body(self, body: bytes) -> None:
        self._body = body
        if self._key is not None:
            self._begin(self._key, body)
        else:
            self._authenticate()

    def on_body_refused(self, error: GatewayError) -> None:
        self._refuse(error)

    def _authenticate(self) -> None:
        if self._asked:
            return
        self._asked = True
        try:
            secret = _secret(self._head)
        except Unauthenticated as error:
            self._refuse(error)
            return
        self._parts.keys.find(digest(secret), self._on_key)

    def _on_key(self, key: KeyRecord | None, unavailable: bool) -> None:
        if self.finished:
            return
        if unavailable:
            self._refuse(StoreUnavailable("keys cannot be checked now; try again", retry_after_s=1.0))
        elif key is None:
            self._refuse(Unauthenticated("User not found."))
        elif key.disabled or (key.expires_at_s is not None and key.expires_at_s <= time.time()):
            self._key = key
            self._refuse(Unauthenticated("This key is disabled or has expired"))
        elif key.management:
            self._key = key
            self._refuse(Forbidden("Management keys cannot be used for inference; create an API key"))
        else:
            self._key = key
            if self._body is not None:
                self._begin(key, self._body)

    # 2. The body is here: what is asked, and who could answer?

    def _begin(self, key: KeyRecord, body: bytes) -> None:
        clock = time.perf_counter()
        self._body = None
        try:
            envelope = self.envelope = parse(body, self.kind)
            self._choices = self._rank(envelope)
        except GatewayError as error:
            self._refuse(error)
            return
        self.streaming = envelope.stream
        self.created_s = int(time.time())
        self.generation_id = self._parts.ids.new(self.created_s)
        self._deadline.set(min(self.total_at, self.keepalive_at) if self.streaming else self.total_at)
        self._next_attempt()
        self.overhead_s += time.perf_counter() - clock

    def _rank(self, envelope: Envelope) -> list[tuple[Model, Endpoint]]:
        catalog = self._parts.snapshots.catalog
        choices: list[tuple[Model, Endpoint]] = []
        for name in (envelope.model, *envelope.models):
            model = catalog.find(name)
            if model is None:
                raise UnknownModel("the model is not a valid model ID; see /api/v1/models")
            choices.extend([(model, endpoint) for endpoint in self._parts.snapshots.in_order(model)])
        if not choices:
            raise NoEndpointAvailable("no provider of this model is in service", retry_after_s=30.0)
        return choices

    # 3. Attempts, one after the other, until a first content byte.

    def _next_attempt(self) -> None:
        assert self.envelope is not None
        while self._choices and len(self.attempts) < ATTEMPTS_MAX:
            model, endpoint = self._choices.pop(0)
            upstream = self._parts.providers.of(endpoint)
            if upstream is None:
                continue
            attempt = (StreamAttempt if self.envelope.stream else AnswerAttempt)(self, model, endpoint, upstream)
            self._attempt = attempt
            self.attempts.append(attempt)
            try:
                attempt.start(self.envelope.body_for(endpoint.upstream_model))
            except Overloaded as full:
                attempt.outcome = full.code
                self._last_error = full
                continue
            return
        self._attempt = None
        self._fail(self._last_error or NoEndpointAvailable("no provider of this model can be tried now", retry_after_s=1.0))

    def attempt_failed(self, error: GatewayError) -> None:
        """Told by the attempt, at most once, never after its first content byte."""
        self._last_error = error
        if self.finished:
            return
        if error.retryable:
            self._next_attempt()
        else:
            self._fail(error)

    # 4. The answer.

    def answer(self, body: bytes) -> None:
        """A whole answer, in our name."""
        if self.finished:
            return
        caller = self._caller
        self._finish(200, None)
        if caller is not None:
            caller.answer(200, body, (("X-Generation-Id", self.generation_id),))

    def stream(self, data: bytes) -> None:
        """Events for the caller; the first ones carry the first content."""
        caller = self._caller
        if caller is None:
            return
        if not self._streaming_begun:
            self._begin_stream(caller)
        self.keepalive_at = self._parts.loop.time() + self._parts.timeouts.keepalive_s
        caller.stream(data)

    def end_stream(self, data: bytes) -> None:
        """The last events; `[DONE]` and the end of the framing leave in the same write."""
        caller = self._caller
        if self.finished or caller is None:
            return
        if not self._streaming_begun:
            self._begin_stream(caller)
        self._finish(200, None)
        caller.end_stream(data + DONE)

    def break_stream(self, error: GatewayError) -> None:
        """After the first content byte: one error event, no success marker after it."""
        self._fail(error)

    def _begin_stream(self, caller: CallerConnection) -> None:
        self._streaming_begun = True
        caller.begin_stream(200, (("X-Generation-Id", self.generation_id),), "text/event-stream")

    # 5. Waiting.

    def rearm(self) -> None:
        """A phase began whose deadline may be sooner than the one set."""
        now_or = [self.total_at]
        if self.streaming:
            now_or.append(self.keepalive_at)
        if self._attempt is not None and self._attempt.phase_at:
            now_or.append(self._attempt.phase_at)
        self._deadline.set(min(now_or))

    def _expired(self) -> None:
        if self.finished:
            return
        now = self._parts.loop.time() + 0.001
        if now >= self.total_at:
            self._fail(DeadlineExceeded("The request took too long and was given up"))
            return
        attempt = self._attempt
        if attempt is not None and attempt.phase_at and now >= attempt.phase_at:
            attempt.phase_expired()
        elif self.streaming and now >= self.keepalive_at:
            self.stream(KEEPALIVE)
        if not self.finished:
            self.rearm()

    # 6. The caller's side.

    def on_caller_gone(self) -> None:
        """A stream's provider is cancelled at once; a whole answer is awaited, for it is paid for."""
        self._caller = None
        if self.finished or (not self.streaming and self._attempt is not None):
            return
        self._finish(499, CallerGone("the caller hung up"))

    def on_caller_slow(self) -> None:
        if self._attempt is not None:
            self._attempt.pause()

    def on_caller_ready(self) -> None:
        if self._attempt is not None:
            self._attempt.resume()

    def on_drain_end(self) -> None:
        self._fail(Draining("The gateway is shutting down", retry_after_s=1.0))

    # 7. The end, once.

    def _refuse(self, error: GatewayError) -> None:
        self._fail(error)

    def _fail(self, error: GatewayError) -> None:
        if self.finished:
            return
        caller, attempt = self._caller, self._attempt
        self._finish(error.http_status, error)
        if caller is None:
            return
        if not self._streaming_begun:
            headers = (("X-Generation-Id", self.generation_id),) if self.generation_id else ()
            caller.answer_error(error, headers)
            return
        assert self.envelope is not None
        model = attempt.model.id if attempt is not None else self.envelope.model
        provider = attempt.upstream.provider.name if attempt is not None else ""
        caller.end_stream(error_event(error.body(), self.generation_id, model, provider, self.created_s, self.kind))

    def _finish(self, status: int, error: GatewayError | None) -> None:
        self.finished = True
        self._caller = None
        self._deadline.close()
        if self._attempt is not None and (error is not None or not self._attempt.ended):
            self._attempt.leave(error)
        self._parts.report.finished(self, status, error)
        # Attempts know their exchange: without this cut every exchange would wait for the cycle collector.
        self._attempt = None
        self.attempts.clear()


def _secret(head: RequestHead) -> bytes:
    """The bearer token's bytes. Raises Unauthenticated."""
    value = head.headers.get("Authorization")
    if value is None:
        value = head.headers.get("x-api-key")
        if value is None:
            raise Unauthenticated("No auth credentials found")
        scheme, secret = "bearer", value
    else:
        scheme, _, secret = value.partition(" ")
    secret = secret.strip()
    if scheme.lower() != "bearer" or not secret or len(secret) > SECRET_BYTES_MAX:
        raise Unauthenticated("No auth credentials found")
    return secret.encode("utf-8", "surrogateescape")
