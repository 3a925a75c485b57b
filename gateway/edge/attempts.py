"""One call to one endpoint, watched through its phases: connect, headers, first content, the rest.

Before the first content byte an attempt only collects; its failure is told to the exchange, which may try elsewhere.
"""

from __future__ import annotations

import time
from math import floor
from typing import TYPE_CHECKING

from multidict import CIMultiDictProxy

from gateway.domain.errors import CallerFault, EdgeLost, FirstByteTimeout, GatewayError, Overloaded, Throttled, UpstreamGarbage
from gateway.domain.generation import HEDGE_LOST, AttemptRecord
from gateway.domain.usage import Usage
from gateway.edge.providers import Upstream
from gateway.edge.snapshots import Choice
from gateway.edge.upstream import Call, CallListener
from gateway.wire import refusal
from gateway.wire.answer import Answer, NotAnAnswer, rewrite
from gateway.wire.usage import BYTES_PER_TOKEN

if TYPE_CHECKING:
    from gateway.edge.exchange import InferenceExchange

ERROR_BODY_BYTES_MAX = 65536


class Attempt(CallListener):
    """What streams and whole answers have in common. `phase_at` is the time at which the current phase is cut; 0: never."""

    __slots__ = (
        "_call", "_collected", "_collected_bytes", "_error_status", "_exchange", "number", "_retry_after", "choice", "ended", "endpoint",
        "finish_reason", "first_content_at", "model", "native_finish_reason", "outcome", "phase_at", "provider_status", "started_at",
        "upstream", "upstream_id", "usage", "waited_ms", "was_sent",
    )  # fmt: skip

    def __init__(self, exchange: InferenceExchange, choice: Choice, upstream: Upstream) -> None:
        self._exchange = exchange
        self.choice = choice
        self.model = choice.model
        self.endpoint = choice.endpoint
        self.upstream = upstream
        self.started_at = exchange.parts.loop.time()
        self.phase_at = 0.0
        self.ended = False
        self.was_sent = True  # False: the provider never had to do with it
        self.outcome = ""  # the metric label: "ok", an error's code or HEDGE_LOST
        self.first_content_at = 0.0
        self.waited_ms: int | None = None  # of one that was outrun
        self.provider_status: int | None = None
        self.usage: bytes | None = None  # the provider's usage object
        self.upstream_id = ""
        self.finish_reason: str | None = None  # of the contract's vocabulary
        self.native_finish_reason: str | None = None
        self.number = 0  # by which the endpoint's state knows it; 0: nothing more to tell
        self._call: Call | None = None
        self._collected: list[bytes] = []
        self._collected_bytes = 0
        self._error_status = 0  # not 0: the body is an error's
        self._retry_after: str | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.endpoint.id} {self.outcome or 'running'}>"

    @property
    def committed(self) -> bool:
        """Whether the caller has content of this attempt: nothing may be tried elsewhere any more."""
        return self.first_content_at > 0

    @property
    def follows_content(self) -> bool:
        """Whether the caller has content, of this attempt or of one that it goes on with."""
        return self.committed

    def made_tokens(self) -> int:
        """Our own count of the completion, for where the provider's is missing."""
        raise NotImplementedError

    def record(self) -> AttemptRecord:
        """What the generation remembers of this attempt."""
        endpoint, first_content_at = self.endpoint, self.first_content_at
        return AttemptRecord(
            endpoint.id,
            endpoint.provider,
            self.outcome or EdgeLost.code,  # of a stream that runs: what its mark says if nothing follows
            self.provider_status,
            floor((first_content_at - self.started_at) * 1000) if first_content_at else self.waited_ms,
        )

    def note(self) -> None:
        """What the answer has said of itself so far, for the bill and the record."""

    def start(self, body: bytes) -> None:
        """Raises Overloaded when the provider has its fill of calls."""
        exchange, upstream = self._exchange, self.upstream
        timeouts, own, stream = exchange.parts.timeouts, self.endpoint.timeouts, exchange.streaming
        request = upstream.request(exchange.kind, body, stream=stream)
        self._call = upstream.pool.call(request, self, connect_s=own.connect_s or timeouts.connect_s)
        self.number = self.choice.live.begin(self.started_at, stream=stream)
        exchange.total_at = exchange.started_at + (own.total_s or timeouts.total_s)
        exchange.rearm()

    def not_sent(self, full: Overloaded) -> None:
        """Instead of a start."""
        self.ended, self.was_sent = True, False
        self.outcome = full.code
        self.phase_at = 0.0

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
            if error is not None:
                self._tell_failure(error)
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def outrun(self, prompt_tokens: int, tokens: int) -> None:
        """Another attempt has the first content, or the whole answer, of `tokens`: stop the provider."""
        now = self._exchange.parts.loop.time()
        waited_s = now - self.started_at
        self.waited_ms = int(waited_s * 1000)
        self._end(HEDGE_LOST)
        number, self.number = self.number, 0
        self.choice.live.outrun(number, now, waited_s, prompt_tokens=prompt_tokens, tokens=tokens)

    def phase_expired(self) -> None:
        self._fail(FirstByteTimeout("Provider did not answer in time"))

    # What the endpoint's state is told: once, how the attempt ended.

    def tell_success(self, usage: Usage | None, now: float) -> None:
        number, self.number = self.number, 0
        if number:
            began = self.first_content_at if self._exchange.streaming else self.started_at
            self.choice.live.succeeded(number, now, tokens=usage.completion_tokens if usage is not None else 0, gen_s=now - began)

    def tell_nothing(self) -> None:
        number, self.number = self.number, 0
        if number:
            self.choice.live.told_nothing(number)

    def _tell_failure(self, error: GatewayError) -> None:
        if error.fault != "upstream":
            self.tell_nothing()
            return
        number, self.number = self.number, 0
        if number:
            live, now = self.choice.live, self._exchange.parts.loop.time()
            (live.throttled if isinstance(error, Throttled) else live.failed)(number, now, error.retry_after_s)

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

    def _fail_with_event(self, error: bytes) -> None:
        """An error object inside a 200."""
        self._fail(refusal.from_event(error, provider=self.upstream.provider.name, secret=self.upstream.secret, now_s=time.time()))

    def _fail(self, error: GatewayError) -> None:
        """Before the first content byte: told to the exchange, which may go elsewhere."""
        if self.ended:
            return
        if not isinstance(error, CallerFault) and "provider_name" not in error.metadata:
            error.metadata = {"provider_name": self.upstream.provider.name, "is_byok": False, **error.metadata}
        self._end(error.code)
        self._tell_failure(error)
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

    __slots__ = ("_answer",)

    def __init__(self, exchange: InferenceExchange, choice: Choice, upstream: Upstream) -> None:
        super().__init__(exchange, choice, upstream)
        self._answer: Answer | None = None

    def made_tokens(self) -> int:
        return -(-self._answer.content_bytes // BYTES_PER_TOKEN) if self._answer is not None else 0

    def _on_ok_head(self, headers: CIMultiDictProxy[str]) -> None:
        pass

    def _on_ok_data(self, data: bytes) -> None:
        self._collect(data, self._exchange.parts.upstream.answer_bytes_max)

    def on_whole(self, headers: CIMultiDictProxy[str], pieces: list[bytes]) -> None:
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if "Content-Encoding" in headers or len(data) > self._exchange.parts.upstream.answer_bytes_max:
            super().on_whole(headers, pieces)
            return
        self.provider_status = 200
        self._call = None
        self._on_answer(data)

    def _on_ok_end(self) -> None:
        body = b"".join(self._collected)
        self._collected.clear()
        self._on_answer(body)

    def _on_answer(self, body: bytes) -> None:
        exchange = self._exchange
        exchange.answered_at = time.perf_counter()
        try:
            answer = rewrite(body, exchange.generation_id, self.model.id, self.upstream.provider.name)
        except NotAnAnswer as wrong:
            if wrong.error is None:
                self._fail(UpstreamGarbage("Provider's answer is not a completion", provider_status=200))
            else:
                self._fail_with_event(wrong.error)
            return
        self._answer = answer
        self.usage = answer.usage
        self.upstream_id = answer.upstream_id
        self.finish_reason, self.native_finish_reason = answer.finish_reason, answer.native_finish_reason
        self.first_content_at = exchange.parts.loop.time()
        self._end("ok")
        exchange.answer(answer.render)
