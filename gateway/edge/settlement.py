"""The end of an exchange as money: what was used, what it costs, what the journal says. Once per hold.

The record is written before the caller's last byte, so that no caller sees the end of an answer that a crash could
forget. What is free is recorded with what it would have cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from gateway.domain.errors import CallerGone, GatewayError, StreamBroken
from gateway.domain.generation import AttemptRecord, Generation
from gateway.domain.keys import PREFIX
from gateway.domain.money import NANOS_PER_USD
from gateway.domain.usage import Usage
from gateway.edge.admission import completion_max
from gateway.edge.journal import Journal
from gateway.ledger.book import Hold
from gateway.ledger.pricing import Cost, Moment, cost
from gateway.wire import usage as wire_usage

if TYPE_CHECKING:
    from gateway.edge.attempts import Attempt
    from gateway.edge.exchange import InferenceExchange

FREE = Cost(0)
TEXT_CHARS_MAX = 256  # of what callers say about themselves


class Bill(msgspec.Struct, frozen=True):
    """What an exchange used and costs. `would_cost` differs from `cost` where it is free of charge."""

    usage: Usage | None
    cost: Cost
    would_cost: Cost

    def usage_json(self) -> bytes:
        """The contract's `usage` object."""
        usage, cost = self.usage, self.cost
        assert usage is not None
        return _USAGE % (
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.prompt_tokens + usage.completion_tokens,
            *divmod(cost.total_nanos, NANOS_PER_USD),
            usage.cached_tokens,
            usage.cache_write_tokens,
            usage.audio_tokens,
            usage.reasoning_tokens,
            *divmod(cost.prompt_nanos, NANOS_PER_USD),
            *divmod(cost.total_nanos - cost.prompt_nanos, NANOS_PER_USD),
        )


# Amounts are decimal text all the way: a JSON number with exactly the nanos that were charged.
_USAGE = (
    b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,"cost":%d.%09d,"is_byok":false,'
    b'"prompt_tokens_details":{"cached_tokens":%d,"cache_write_tokens":%d,"audio_tokens":%d},'
    b'"completion_tokens_details":{"reasoning_tokens":%d},'
    b'"cost_details":{"upstream_inference_cost":null,"upstream_inference_prompt_cost":%d.%09d,"upstream_inference_completions_cost":%d.%09d}}'
)


class Settlement:
    """Bills, journals, and turns holds into charges."""

    def __init__(self, *, journal: Journal, charge_broken_streams: bool) -> None:
        self._journal = journal
        self._charge_broken_streams = charge_broken_streams

    def require_room(self) -> None:
        """Raises when a charge could not be recorded; asked before anything is held."""
        self._journal.require_room()

    def bill(self, exchange: InferenceExchange, attempt: Attempt | None, error: GatewayError | None) -> Bill:
        """What this end costs, by the attempt that served; failed attempts cost nothing."""
        if attempt is None or not attempt.committed:
            return Bill(None, FREE, FREE)
        usage = self._usage(exchange, attempt, was_cut=error is not None)
        full = cost(attempt.endpoint.price, usage, _moment(exchange.created_s))
        if error is not None and not isinstance(error, CallerGone):
            free = not (self._charge_broken_streams and isinstance(error, StreamBroken))
        else:
            # Zero-completion insurance: nothing made and no word of an end, or an end that was an error.
            free = attempt.finish_reason == "error" or (usage.completion_tokens == 0 and not attempt.finish_reason)
        return Bill(usage, FREE if free else full, full)

    def settle(
        self,
        exchange: InferenceExchange,
        hold: Hold,
        attempt: Attempt | None,
        bill: Bill,
        *,
        status: int,
        error: GatewayError | None,
        then: Callable[[], None],
    ) -> None:
        """Journal the exchange, resolve its hold, then call `then`, which sends the last byte."""
        hold.settle(bill.cost.total_nanos)
        self._journal.append(_record(exchange, hold, attempt, bill, status, error), then)

    def _usage(self, exchange: InferenceExchange, attempt: Attempt, *, was_cut: bool) -> Usage:
        envelope = exchange.envelope
        assert envelope is not None
        limits = wire_usage.Limits(
            # Twice the context: no tokenizer is that far off, a mistaken or hostile count is.
            prompt_tokens=2 * attempt.endpoint.context_length,
            completion_tokens=completion_max(envelope, attempt.model, attempt.endpoint),
        )
        told = wire_usage.read(attempt.usage, limits, images=envelope.images)
        if told is not None:
            # Of an answer that was cut the last count may be an early one: what has come since was made all the same.
            made = min(attempt.made_tokens(), limits.completion_tokens) if was_cut else 0
            return told if made <= told.completion_tokens else msgspec.structs.replace(told, completion_tokens=made, estimated=True)
        return wire_usage.estimate(
            prompt_text_bytes=envelope.prompt_text_bytes, completion_tokens=attempt.made_tokens(), images=envelope.images, limits=limits
        )


def _record(
    exchange: InferenceExchange, hold: Hold, attempt: Attempt | None, bill: Bill, status: int, error: GatewayError | None
) -> Generation:
    key, envelope = exchange.key, exchange.envelope
    assert key is not None and envelope is not None
    header = exchange.head.headers.get
    record = Generation(
        id=exchange.generation_id,
        account_id=key.account_id,
        key_digest=key.digest,
        created_at_ms=int(time.time() * 1000),
        model=envelope.model,
        kind=exchange.kind,
        streamed=envelope.stream,
        status=status,
        usage=bill.usage,
        charged_nanos=bill.cost.total_nanos,
        prompt_nanos=bill.cost.prompt_nanos,
        unbilled_nanos=bill.would_cost.total_nanos - bill.cost.total_nanos,
        settles=hold.resources,
        http_referer=_said(header("HTTP-Referer") or header("Referer")),
        title=_said(header("X-OpenRouter-Title") or header("X-Title")),
        user_agent=_said(header("User-Agent")),
        external_user=_said(envelope.user),
        session_id=_said(envelope.session_id or header("x-session-id")),
        attempts=tuple([_attempt_record(each) for each in exchange.attempts]),
    )
    if attempt is not None:
        record.model = attempt.model.id
        record.endpoint_id = attempt.endpoint.id
        record.provider = attempt.endpoint.provider
        record.upstream_id = attempt.upstream_id[:TEXT_CHARS_MAX]
        record.finish_reason = attempt.finish_reason
        record.native_finish_reason = attempt.native_finish_reason
        if attempt.first_content_at:
            record.latency_ms = int((attempt.first_content_at - attempt.started_at) * 1000)
            record.generation_ms = int((exchange.parts.loop.time() - attempt.started_at) * 1000)
    if error is not None:
        record.error = error.code
        record.cancelled = isinstance(error, CallerGone)
        if not record.cancelled:
            record.finish_reason = "error"
    return record


def _attempt_record(attempt: Attempt) -> AttemptRecord:
    return AttemptRecord(
        endpoint_id=attempt.endpoint.id,
        provider=attempt.endpoint.provider,
        outcome=attempt.outcome,
        status=attempt.provider_status,
        latency_ms=int((attempt.first_content_at - attempt.started_at) * 1000) if attempt.first_content_at else None,
    )


def _said(text: str | None) -> str:
    """Of what callers say about themselves, what may be kept: bounded, Unicode, and never a key."""
    if not text or PREFIX in text:
        return ""
    if not text.isascii():  # header bytes that are not UTF-8 come surrogate-escaped, which no record can hold
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return text[:TEXT_CHARS_MAX]


def _moment(unix_s: int) -> Moment:
    minutes = unix_s // 60 % 1440
    return Moment(hhmm=minutes // 60 * 100 + minutes % 60, weekday=(unix_s // 86400 + 4) % 7)
