"""One call to one endpoint, watched through its phases: connect, headers, first content, the rest.

Before the first content byte an attempt only collects; its failure is told to the exchange, which may try elsewhere.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from multidict import CIMultiDictProxy

from gateway.domain.catalog import Endpoint, Model
from gateway.domain.errors import CallerFault, FirstByteTimeout, GatewayError, StreamBroken, StreamStalled, UpstreamFault, UpstreamGarbage
from gateway.edge.providers import Upstream
from gateway.edge.upstream import Call
from gateway.wire import refusal
from gateway.wire.answer import NotAnAnswer, rewrite
from gateway.wire.sse import EventCutter, LineTooLong, Splicer

if TYPE_CHECKING:
    from gateway.edge.exchange import InferenceExchange

ERROR_BODY_BYTES_MAX = 65536
FIRST_TOKEN_COLD_S = 15.0  # "adaptive" while nothing is known of the endpoint
REASONING_S_MIN = 120.0  # a model that reasons is never cut under this


class Attempt:
    """What streams and whole answers have in common. `phase_at` is the time at which the current phase is cut; 0: never."""

    __slots__ = (
        "_call", "_collected", "_collected_bytes", "_error_status", "_exchange", "_retry_after", "endpoint", "ended", "first_content_at",
        "model", "outcome", "phase_at", "provider_status", "started_at", "upstream", "usage",
    )  # fmt: skip

    def __init__(self, exchange: InferenceExchange, model: Model, endpoint: Endpoint, upstream: Upstream) -> None:
        self._exchange = exchange
        self._call: Call | None = None
        self._collected: list[bytes] = []
        self._collected_bytes = 0
        self._error_status = 0  # not 0: the body is an error's
        self._retry_after: str | None = None
        self.model = model
        self.endpoint = endpoint
        self.upstream = upstream
        self.outcome = ""  # the metric label: "ok" or an error's code
        self.provider_status: int | None = None
        self.phase_at = 0.0
        self.started_at = exchange.parts.loop.time()
        self.first_content_at = 0.0
        self.ended = False
        self.usage: bytes | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.endpoint.id} {self.outcome or 'running'}>"

    streams = False

    def start(self, body: bytes) -> None:
        """Raises Overloaded when the provider has its fill of calls."""
        timeouts = self._exchange.parts.timeouts
        own = self.endpoint.timeouts
        request = self.upstream.request(self._exchange.kind, body, stream=self.streams)
        self._call = self.upstream.pool.call(request, self, connect_s=own.connect_s or timeouts.connect_s)
        if own.total_s is not None:
            self._exchange.total_at = min(self._exchange.total_at, self._exchange.started_at + own.total_s)

    def pause(self) -> None:
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        if self._call is not None:
            self._call.resume()

    def leave(self, error: GatewayError | None) -> None:
        """The exchange is over before the call is: stop the provider."""
        if not self.ended:
            self.ended = True
            self.outcome = self.outcome or (error.code if error is not None else "ok")
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def phase_expired(self) -> None:
        self._fail(FirstByteTimeout("Provider did not answer in time"))

    # CallListener

    def on_head(self, status: int, headers: CIMultiDictProxy[str]) -> None:
        self.provider_status = status
        self._retry_after = headers.get("Retry-After")
        if headers.get("Content-Encoding", "identity").lower() != "identity":
            # Asked for identity: inflating what was not asked for is how 200 KB become 200 MB.
            self._fail(UpstreamGarbage("Provider compressed its answer unasked", provider_status=status))
            return
        if status != 200:
            self._error_status = status
        self._on_ok_head(headers)

    def on_data(self, data: bytes) -> None:
        if self.ended:
            return
        if self._error_status:
            self._collect(data, ERROR_BODY_BYTES_MAX)
        else:
            self._on_ok_data(data)

    def on_end(self) -> None:
        self._call = None
        if self.ended:
            return
        if self._error_status:
            self._fail_with_answer(self._error_status, b"".join(self._collected))
        else:
            self._on_ok_end()

    def on_failed(self, error: GatewayError) -> None:
        self._call = None
        self._fail(error)

    # For the two kinds.

    def _on_ok_head(self, headers: CIMultiDictProxy[str]) -> None:
        raise NotImplementedError

    def _on_ok_data(self, data: bytes) -> None:
        raise NotImplementedError

    def _on_ok_end(self) -> None:
        raise NotImplementedError

    def _collect(self, data: bytes, limit: int) -> None:
        self._collected.append(data)
        self._collected_bytes += len(data)
        if self._collected_bytes > limit:
            if self._error_status:  # enough of an error is enough
                call, self._call = self._call, None
                if call is not None:
                    call.cancel()
                self._fail_with_answer(self._error_status, b"".join(self._collected)[:limit])
            else:
                self._fail(UpstreamGarbage(f"Provider's answer is larger than {limit} bytes", provider_status=self.provider_status))

    def _fail_with_answer(self, status: int, body: bytes) -> None:
        self._fail(
            refusal.from_answer(
                status,
                body,
                provider=self.upstream.provider.name,
                secret=self.upstream.secret,
                retry_after=self._retry_after,
                now_s=time.time(),
            )
        )

    def _fail(self, error: GatewayError) -> None:
        """Before the first content byte: told to the exchange, which may go elsewhere."""
        if self.ended:
            return
        if not isinstance(error, CallerFault) and "provider_name" not in error.metadata:
            error.metadata = {"provider_name": self.upstream.provider.name, "is_byok": False, **error.metadata}
        self._end(error.code)
        self._exchange.attempt_failed(error)

    def _end(self, outcome: str) -> None:
        self.ended = True
        self.outcome = outcome
        self.phase_at = 0.0
        call, self._call = self._call, None
        if call is not None:
            call.cancel()


class AnswerAttempt(Attempt):
    """A whole JSON answer: collected up to a limit, read, rewritten, answered at once."""

    __slots__ = ()

    def _on_ok_head(self, headers: CIMultiDictProxy[str]) -> None:
        pass

    def _on_ok_data(self, data: bytes) -> None:
        self._collect(data, self._exchange.parts.upstream.answer_bytes_max)

    def _on_ok_end(self) -> None:
        clock = time.perf_counter()
        exchange = self._exchange
        body = self._collected[0] if len(self._collected) == 1 else b"".join(self._collected)
        self._collected.clear()
        try:
            answer = rewrite(body, exchange.generation_id, self.model.id, self.upstream.provider.name)
        except NotAnAnswer as wrong:
            self._fail(
                UpstreamGarbage("Provider's answer is not a completion", provider_status=200)
                if wrong.error is None
                else refusal.from_event(wrong.error, provider=self.upstream.provider.name, secret=self.upstream.secret, now_s=time.time())
            )
            return
        self.usage = answer.usage
        self.first_content_at = exchange.parts.loop.time()
        self._end("ok")
        exchange.overhead_s += time.perf_counter() - clock
        exchange.answer(answer.body)


class StreamAttempt(Attempt):
    """Events as they come, cut at event borders. What precedes the first content waits for it."""

    __slots__ = ("_cutter", "_held", "_held_bytes", "_splicer")

    streams = True

    def __init__(self, exchange: InferenceExchange, model: Model, endpoint: Endpoint, upstream: Upstream) -> None:
        super().__init__(exchange, model, endpoint, upstream)
        self._cutter = EventCutter(exchange.parts.upstream.sse_line_bytes_max)
        self._splicer = Splicer(exchange.generation_id, model.id, upstream.provider.name)
        self._held: list[bytes] = []
        self._held_bytes = 0

    @property
    def committed(self) -> bool:
        """Whether the caller has content of this attempt: nothing may be tried elsewhere any more."""
        return self.first_content_at > 0

    def start(self, body: bytes) -> None:
        super().start(body)
        timeouts = self._exchange.parts.timeouts
        headers_s = self.endpoint.timeouts.headers_s or timeouts.headers_s
        connect_s = self.endpoint.timeouts.connect_s or timeouts.connect_s
        connected = self._call is not None and self._call.connected
        # The time to connect has a limit of its own and must not eat that of the headers.
        self.phase_at = self.started_at + self._patience(headers_s) + (0.0 if connected else connect_s)
        self._exchange.rearm()

    def phase_expired(self) -> None:
        if not self.committed:
            super().phase_expired()
        elif self._call is not None and self._call.paused:
            self.phase_at = self._exchange.parts.loop.time() + self._idle_s()  # the caller is slow, not the provider
        else:
            self._fail(StreamStalled("Provider stopped sending"))

    def _patience(self, seconds: float) -> float:
        envelope = self._exchange.envelope
        reasons = self.model.reasoning is not None or (envelope is not None and envelope.reasoning)
        return max(seconds, REASONING_S_MIN) if reasons else seconds

    def _idle_s(self) -> float:
        return self._patience(self.endpoint.timeouts.idle_s or self._exchange.parts.timeouts.idle_s)

    def _on_ok_head(self, headers: CIMultiDictProxy[str]) -> None:
        if not self._error_status and not headers.get("Content-Type", "").lower().startswith("text/event-stream"):
            self._error_status = 200  # an error object, a page, anything but a stream
        setting = self._exchange.parts.timeouts.first_token_s
        first_token_s = self.endpoint.timeouts.first_token_s or (FIRST_TOKEN_COLD_S if setting == "adaptive" else setting)
        self.phase_at = self._exchange.parts.loop.time() + self._patience(float(first_token_s))
        self._exchange.rearm()

    def _on_ok_data(self, data: bytes) -> None:
        splicer = self._splicer
        try:
            block = self._cutter.feed(data)
        except LineTooLong:
            self._fail(UpstreamGarbage("Provider sent an event that does not end", provider_status=200))
            return
        if not block:
            return
        events = splicer.splice(block)
        if self.first_content_at and not splicer.done and splicer.error is None:
            if events:
                self.phase_at = self._exchange.parts.loop.time() + self._idle_s()
                self._exchange.stream(events)
            return
        self._on_border(events)

    def _on_border(self, events: bytes) -> None:
        """The first content, the end, or an error: what happens at most a few times per stream."""
        splicer = self._splicer
        exchange = self._exchange
        now = exchange.parts.loop.time()
        if not self.committed and splicer.content_events:
            self.first_content_at = now
            events = b"".join((*self._held, events))
            self._held.clear()
            self.phase_at = now + self._idle_s()
        if splicer.error is not None:
            if self.committed and events:
                exchange.stream(events)
            self._fail(
                refusal.from_event(splicer.error, provider=self.upstream.provider.name, secret=self.upstream.secret, now_s=time.time())
            )
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
        if not self.committed:
            if splicer.finish_reason is None:
                self._fail(UpstreamGarbage("Provider's answer is empty", provider_status=200))
                return
            events = b"".join((*self._held, events))
            self._held.clear()
        self.usage = splicer.usage
        call, self._call = self._call, None
        if call is not None:
            call.drain()
        self._end("ok")
        self._exchange.end_stream(events)

    def _on_ok_end(self) -> None:
        if self._splicer.finish_reason is not None:
            self._on_done(b"")
        elif self.committed:
            self._fail(StreamBroken("Provider ended its answer without finishing it"))
        else:
            self._fail(UpstreamGarbage("Provider's answer is empty", provider_status=self.provider_status))

    def _fail(self, error: GatewayError) -> None:
        if self.ended:
            return
        if not self.committed:
            super()._fail(error)
            return
        if not isinstance(error, StreamBroken):
            cause = error
            error = StreamBroken(cause.message, metadata=cause.metadata)
            error.__cause__ = cause
            if isinstance(cause, UpstreamFault):
                error.provider_status = cause.provider_status
        error.metadata = {"provider_name": self.upstream.provider.name, **error.metadata}
        self._end(error.code)
        self._exchange.break_stream(error)
