"""The last bytes of an exchange: the usage object of an answer, or an error as a body or an event, explained where that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.domain.errors import GatewayError, envelope
from gateway.edge.explanation import UNEXPLAINED
from gateway.wire.chunk import error_event
from gateway.wire.sse import DONE

if TYPE_CHECKING:
    from gateway.edge.exchange import InferenceExchange


def good_end(exchange: InferenceExchange) -> bytes:
    """The whole answer, or the last events of a stream: with the usage object, and the explanation as the next member beside it."""
    assert exchange.bill is not None and exchange.render is not None
    usage = exchange.bill.usage_json()
    if exchange.explanation is not None:
        usage += exchange.explanation.member(exchange.attempts, exchange.attempt)
    body = exchange.render(usage)
    return b"%b%b%b" % (exchange.last_events, body, DONE) if exchange.streaming else body


def error_answer(exchange: InferenceExchange, error: GatewayError) -> bytes:
    """The JSON body that answers in place of a completion."""
    return _explained(exchange, error, envelope(error), b"}")


def error_end(exchange: InferenceExchange, error: GatewayError) -> bytes:
    """The event that ends a stream which has begun."""
    attempt = exchange.attempt
    assert exchange.envelope is not None
    model = attempt.model.id if attempt is not None else exchange.envelope.model
    provider = attempt.upstream.provider.name if attempt is not None else ""
    event = error_event(error.body(), exchange.generation_id, model, provider, exchange.created_s, exchange.kind)
    return _explained(exchange, error, event, b"}\n\n")


def _explained(exchange: InferenceExchange, error: GatewayError, body: bytes, end: bytes) -> bytes:
    if exchange.explanation is None or error.http_status in UNEXPLAINED:
        return body
    return body.removesuffix(end) + exchange.explanation.member(exchange.attempts, None) + end
