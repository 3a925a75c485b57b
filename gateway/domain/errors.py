"""Every way an exchange can fail, as one small tree; and the only place that renders an error.

A class states the HTTP status, a code (the metric label), the wire's `error_type`, whose fault it is and whether
another endpoint may be tried. Messages are fixed texts of ours: never an echo of unchecked input, never a secret.
Source: OpenRouter error envelope and `error_type` vocabulary, read 2026-11.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import orjson

Fault = Literal["caller", "upstream", "ours"]


class GatewayError(Exception):
    """Base of the tree. `message` is shown to the caller; `metadata` is merged into `error.metadata`."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "bug"
    error_type: ClassVar[str] = "server"
    fault: ClassVar[Fault] = "ours"
    retryable: ClassVar[bool] = False  # at another endpoint

    def __init__(self, message: str = "", *, retry_after_s: float | None = None, metadata: dict[str, Any] | None = None) -> None:
        super().__init__(message or self.__class__.__name__)
        self.message = message or "Internal Server Error"
        self.retry_after_s = retry_after_s
        self.metadata = metadata or {}

    @property
    def transient(self) -> bool:
        """Whether the same endpoint may do better a moment later."""
        return False

    @property
    def http_status(self) -> int:
        """The status the caller sees; an upstream fault may carry the provider's own."""
        return self.status

    def body(self) -> dict[str, Any]:
        """The JSON object `{"code", "message", "metadata"}` of this error."""
        return {"code": self.http_status, "message": self.message, "metadata": {"error_type": self.error_type, **self.metadata}}


class CallerFault(GatewayError):
    status = 400
    code = "bad_request"
    error_type = "invalid_request"
    fault = "caller"


class BadRequest(CallerFault):
    pass


class UnknownModel(CallerFault):
    code = "unknown_model"


class Unauthenticated(CallerFault):
    status = 401
    code = "unauthenticated"
    error_type = "authentication"


class InsufficientCredit(CallerFault):
    status = 402
    code = "insufficient_credit"
    error_type = "payment_required"


class Forbidden(CallerFault):
    status = 403
    code = "forbidden"
    error_type = "permission_denied"


class KeyLimitExceeded(Forbidden):
    code = "key_limit_exceeded"


class NotFound(CallerFault):
    status = 404
    code = "not_found"
    error_type = "not_found"


class NoEndpointMatches(NotFound):
    """A filter left no endpoint. `availability` says which, in the contract's words for machines."""

    code = "no_endpoint_matches"

    def __init__(
        self,
        message: str = "",
        *,
        retry_after_s: float | None = None,
        metadata: dict[str, Any] | None = None,
        availability: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s, metadata=metadata)
        self.availability = availability

    def body(self) -> dict[str, Any]:
        return super().body() | ({"availability": self.availability} if self.availability else {})


class MethodNotAllowed(CallerFault):
    status = 405
    code = "method_not_allowed"


class CallerTimeout(CallerFault):
    status = 408
    code = "caller_timeout"
    error_type = "timeout"


class Conflict(CallerFault):
    status = 409
    code = "conflict"


class BodyTooLarge(CallerFault):
    status = 413
    code = "body_too_large"
    error_type = "payload_too_large"


class UriTooLong(CallerFault):
    status = 414
    code = "uri_too_long"


class UnsupportedMediaType(CallerFault):
    status = 415
    code = "unsupported_media_type"


class RateLimited(CallerFault):
    status = 429
    code = "rate_limited"
    error_type = "rate_limit_exceeded"


class HeadersTooLarge(CallerFault):
    status = 431
    code = "headers_too_large"


class CallerGone(CallerFault):
    """The caller hung up. In the log and metrics only: nobody is left to read it."""

    status = 499
    code = "caller_gone"


class UpstreamFault(GatewayError):
    """The provider failed. `provider_status` is what it answered, if it answered."""

    status = 502
    code = "upstream"
    error_type = "provider_unavailable"
    fault: ClassVar[Fault] = "upstream"
    retryable = True

    def __init__(
        self,
        message: str = "Provider returned error",
        *,
        provider_status: int | None = None,
        retry_after_s: float | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s, metadata=metadata)
        self.provider_status = provider_status

    @property
    def transient(self) -> bool:
        return (self.provider_status or 0) >= 500


class ConnectFailed(UpstreamFault):
    """No connection: refused, unreachable, timed out, or a name that does not resolve."""

    code = "connect_failed"


class TlsFailed(ConnectFailed):
    """The provider's certificate did not verify. Nothing was sent."""

    code = "tls_failed"


class UpstreamGarbage(UpstreamFault):
    """An answer that is not the protocol: bad HTTP, not JSON, empty, too large."""

    code = "upstream_garbage"


class Refused(UpstreamFault):
    """The provider answered with an error status of its own."""

    code = "upstream_refused"


class Rejected(Refused):
    """The provider refused the request itself (400-class): the caller's fault, told in the provider's words."""

    status = 400
    code = "upstream_rejected"
    error_type = "invalid_request"
    fault = "caller"
    retryable = False

    @property
    def http_status(self) -> int:
        return self.provider_status or 400


class ContextTooLong(Rejected):
    """The prompt does not fit there; elsewhere it may."""

    code = "context_too_long"
    error_type = "context_length_exceeded"


class ContentRefused(Rejected):
    """The provider's filter refused the prompt: so would another provider of the same model."""

    code = "content_refused"
    error_type = "content_policy_violation"


class Throttled(UpstreamFault):
    status = 429
    code = "upstream_throttled"
    error_type = "rate_limit_exceeded"


class FirstByteTimeout(UpstreamFault):
    """No answer, or no first content, within the deadline."""

    status = 504
    code = "first_byte_timeout"
    error_type = "timeout"


class StreamBroken(UpstreamFault):
    """The answer broke off after its first content: cut, stalled, or an error event."""

    code = "stream_broken"
    retryable = False


class StreamStalled(StreamBroken):
    code = "stream_stalled"
    error_type = "timeout"


class Overrun(UpstreamFault):
    """The provider went on past all that the request may make, and has paid for."""

    status = 402
    code = "overrun"
    error_type = "payment_required"
    retryable = False


class DeadlineExceeded(UpstreamFault):
    """The whole exchange ran over `total_s`."""

    status = 504
    code = "deadline_exceeded"
    error_type = "timeout"
    retryable = False


class OurFault(GatewayError):
    status = 503
    code = "unavailable"
    error_type = "provider_overloaded"


class NoEndpointAvailable(OurFault):
    """Endpoints match, but none can be tried now."""

    code = "no_endpoint_available"


class Overloaded(OurFault):
    code = "overloaded"


class StoreUnavailable(OurFault):
    """The control plane or its store did not answer, and the request cannot go on without it."""

    code = "store_unavailable"


class Draining(OurFault):
    """The gateway is shutting down and this exchange outlived `drain_s`."""

    code = "draining"


class EdgeLost(OurFault):
    """The process that served the exchange died. In the record only: nobody could be told."""

    code = "edge_lost"


class Bug(OurFault):
    """An assertion failed. The message stays generic; the log has the rest."""

    status = 500
    code = "bug"
    error_type = "server"


def envelope(error: GatewayError) -> bytes:
    """The JSON body `{"error": {...}}` that answers a request. Compact, UTF-8."""
    return orjson.dumps({"error": error.body()})
