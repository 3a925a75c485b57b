"""The end of an exchange as money: what was used, what it costs, what the journal says. Once per hold.

The record is written before the caller's last byte, so that no caller sees the end of an answer that a crash could
forget. What is free is recorded with what it would have cost. Exchanges that end in the same turn of the loop are settled
together: one write serves them all.
"""

from __future__ import annotations

import asyncio
import time
from math import floor
from typing import TYPE_CHECKING

import msgspec

from gateway.domain.errors import CallerGone, EdgeLost, GatewayError, InsufficientCredit, KeyLimitExceeded, Overrun, StreamBroken
from gateway.domain.generation import Generation
from gateway.domain.money import NANOS_PER_USD, parse_usd
from gateway.domain.usage import Usage
from gateway.edge.journal import Journal
from gateway.edge.presented import TEXT_CHARS_MAX, said
from gateway.edge.quotes import completion_most
from gateway.edge.report import ExchangeReport
from gateway.edge.selection import conversation_of
from gateway.ledger.book import FreeHold, Hold
from gateway.ledger.pricing import cost
from gateway.log import Log, exception_fields
from gateway.settings import Billing
from gateway.wire import records
from gateway.wire import usage as wire_usage
from gateway.wire.envelope import Envelope

if TYPE_CHECKING:
    from gateway.edge.attempts import Attempt
    from gateway.edge.exchange import InferenceExchange


_EDGE_LOST = EdgeLost()
# Errors that end a stream whose provider has made what it is paid for.
PAID_ENDS = (CallerGone, EdgeLost, InsufficientCredit, KeyLimitExceeded, Overrun)


class Bill(msgspec.Struct, frozen=True):
    """What an exchange used and costs, in nanos. Where it is free of charge, `unbilled_nanos` is what it would have cost."""

    usage: Usage | None
    nanos: int = 0
    prompt_nanos: int = 0  # of these
    unbilled_nanos: int = 0
    last: Bill | None = None  # where several endpoints made parts: the last one's own

    def usage_json(self) -> bytes:
        """The contract's `usage` object."""
        usage, nanos, prompt_nanos = self.usage, self.nanos, self.prompt_nanos
        assert usage is not None
        return _USAGE % (
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.prompt_tokens + usage.completion_tokens,
            nanos // NANOS_PER_USD,
            nanos % NANOS_PER_USD,
            usage.cached_tokens,
            usage.cache_write_tokens,
            usage.audio_tokens,
            usage.reasoning_tokens,
            prompt_nanos // NANOS_PER_USD,
            prompt_nanos % NANOS_PER_USD,
            (nanos - prompt_nanos) // NANOS_PER_USD,
            (nanos - prompt_nanos) % NANOS_PER_USD,
        )


# Amounts are decimal text all the way: a JSON number with exactly the nanos that were charged.
_USAGE = (
    b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,"cost":%d.%09d,"is_byok":false,'
    b'"prompt_tokens_details":{"cached_tokens":%d,"cache_write_tokens":%d,"audio_tokens":%d},'
    b'"completion_tokens_details":{"reasoning_tokens":%d},'
    b'"cost_details":{"upstream_inference_cost":null,"upstream_inference_prompt_cost":%d.%09d,"upstream_inference_completions_cost":%d.%09d}}'
)


class Settlement:
    """Bills, turns holds into charges, journals, reports, and lets last bytes leave."""

    def __init__(self, *, journal: Journal, report: ExchangeReport, billing: Billing, log: Log) -> None:
        self._journal = journal
        self._report = report
        self._charge_broken_streams = billing.charge_broken_streams
        self._overshoot_nanos = parse_usd(billing.overshoot_usd)
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._ending: list[InferenceExchange] = []

    def require_room(self) -> None:
        """Raises when a charge could not be recorded; asked before anything is held."""
        self._journal.require_room()

    def end(self, exchange: InferenceExchange) -> None:
        """An exchange is over that held credit and reached a provider: settle it before this turn of the loop ends."""
        if not self._ending:
            self._loop.call_soon(self.settle)
        self._ending.append(exchange)

    def settle(self) -> None:
        """Settle all that is over; their last bytes leave when the records are written."""
        ending, self._ending = self._ending, []
        now, wall_ms = self._loop.time(), floor(time.time() * 1000)
        lines: list[bytes] = []
        told: list[InferenceExchange] = []
        for exchange in ending:
            try:
                lines.append(self._settled(exchange, now, wall_ms))
            except Exception as error:  # noqa: BLE001 - what is wrong with one must not take the others' money and answers with it
                if exchange.hold is not None and not exchange.hold.resolved:
                    exchange.hold.release()
                self._failed(exchange, error)
            else:
                told.append(exchange)
        if told:
            self._journal.append(lines, lambda: self._let_go(told))

    def _settled(self, exchange: InferenceExchange, now: float, wall_ms: int) -> bytes:
        """Turn the hold into the charge; the record of it, without which nothing is charged."""
        hold = exchange.hold
        assert hold is not None
        bill = self._bill(exchange, exchange.attempt, exchange.error)
        if exchange.continuation is not None:
            bill = self._whole(exchange, bill, exchange.error)
        if bill.nanos > hold.nanos:
            bill = self._within(bill, hold, exchange.attempt)
        exchange.bill = bill
        generation = _record(exchange, hold, bill, exchange.error, now, wall_ms)
        record = records.encode(generation)
        if isinstance(hold, FreeHold):
            hold.served = generation.was_served
        hold.settle(bill.nanos)
        attempt = exchange.attempt
        if attempt is not None and exchange.error is None and attempt.endpoint.price.input_cache_read is not None:
            self._remember(exchange, attempt, bill.usage)
        return record

    def mark(self, exchange: InferenceExchange) -> bytes:
        """The record of a stream, if this edge died now: charged as if its caller had left."""
        hold, attempt = exchange.hold, exchange.attempt
        assert hold is not None and attempt is not None
        attempt.note()
        bill = self._whole(exchange, self._bill(exchange, attempt, _EDGE_LOST), _EDGE_LOST)
        now, wall_ms = self._loop.time(), floor(time.time() * 1000)
        return records.encode(_record(exchange, hold, self._within(bill, hold, attempt), _EDGE_LOST, now, wall_ms))

    def _within(self, bill: Bill, hold: Hold, attempt: Attempt | None) -> Bill:
        """Where nobody knew the most that it can cost: no more than an account may owe."""
        if attempt is None or not attempt.choice.is_open or bill.nanos <= (most := hold.most(self._overshoot_nanos)):
            return bill
        return msgspec.structs.replace(
            bill, nanos=most, prompt_nanos=min(bill.prompt_nanos, most), unbilled_nanos=bill.unbilled_nanos + bill.nanos - most
        )

    def _remember(self, exchange: InferenceExchange, attempt: Attempt, usage: Usage | None) -> None:
        """The conversation's prompt is in this endpoint's cache now: its next request is to find it."""
        envelope, key, presented = exchange.envelope, exchange.key, exchange.head.presented
        assert envelope is not None and key is not None and presented is not None
        conversation = conversation_of(envelope, key, presented.session_id, attempt.model.id)
        if conversation is not None:
            exchange.parts.router.remember(
                conversation,
                attempt.choice,
                self._loop.time(),
                by_session=bool(envelope.session_id or presented.session_id),
                cached_tokens=usage.cached_tokens if usage is not None else 0,
            )

    def _let_go(self, ending: list[InferenceExchange]) -> None:
        now, clock = self._loop.time(), time.perf_counter()
        for exchange in ending:
            if exchange.answered_at:
                exchange.overhead_s += clock - exchange.answered_at
        self._report.finished(ending, now)
        for exchange in ending:
            try:
                exchange.send_last()
            except Exception as error:  # noqa: BLE001 - as above
                self._failed(exchange, error)

    def _failed(self, exchange: InferenceExchange, error: Exception) -> None:
        self._log.error("settlement_failed", generation=exchange.generation_id, **exception_fields(error))
        exchange.abandon()

    def _bill(self, exchange: InferenceExchange, attempt: Attempt | None, error: GatewayError | None) -> Bill:
        """What this end costs, by the attempt that served; failed attempts cost nothing."""
        if attempt is None or not attempt.first_content_at:
            return Bill(None)
        assert exchange.envelope is not None
        usage = usage_of(exchange.envelope, attempt, was_cut=attempt.outcome != "ok")
        full = cost(attempt.endpoint.price, usage, exchange.created_s, exchange.paid_millionths)
        if error is not None and not isinstance(error, PAID_ENDS):
            free = not (self._charge_broken_streams and isinstance(error, StreamBroken))
        else:
            # Zero-completion insurance: nothing made and no word of an end, or an end that was an error.
            free = attempt.finish_reason == "error" or (usage.completion_tokens == 0 and not attempt.finish_reason)
        if free:
            return Bill(usage, unbilled_nanos=full.total_nanos)
        return Bill(usage, full.total_nanos, full.prompt_nanos)

    def _whole(self, exchange: InferenceExchange, bill: Bill, error: GatewayError | None) -> Bill:
        """The bill with the parts that other endpoints made before: paid for if the whole ends well, or its caller left."""
        continuation, attempt = exchange.continuation, exchange.attempt
        if continuation is None or not continuation.parts:
            return bill
        is_broken = error is not None and not isinstance(error, PAID_ENDS)
        is_charged = not is_broken or (self._charge_broken_streams and isinstance(error, StreamBroken))
        return continuation.billed(bill, is_free=not is_charged or (attempt is not None and attempt.finish_reason == "error"))


def usage_of(envelope: Envelope, attempt: Attempt, *, was_cut: bool) -> Usage:
    """What an attempt used for this request: the provider's count, or ours where it is missing or cannot be believed."""
    prompt_max, completion_max = attempt.choice.prompt_tokens_most, completion_most(envelope, attempt.choice)
    told = wire_usage.read(attempt.usage, prompt_max, completion_max, images=envelope.images)
    if told is None:
        return wire_usage.estimate(
            prompt_max, completion_max,
            prompt_text_bytes=envelope.prompt_text_bytes, completion_tokens=attempt.made_tokens(), images=envelope.images,
        )  # fmt: skip
    if was_cut:
        # Of an answer that was cut the last count may be an early one: what has come since was made all the same.
        made = min(attempt.made_tokens(), completion_max)
        if made > told.completion_tokens:
            return msgspec.structs.replace(told, completion_tokens=made, estimated=True)
    return told


def _record(exchange: InferenceExchange, hold: Hold, bill: Bill, error: GatewayError | None, now: float, wall_ms: int) -> Generation:
    attempt, attempts = exchange.attempt, exchange.attempts
    key, envelope, presented = exchange.key, exchange.envelope, exchange.head.presented
    assert key is not None and envelope is not None and presented is not None
    model, endpoint_id, provider, upstream_id = envelope.model, "", "", ""
    finish = native = latency_ms = generation_ms = None
    if attempt is not None:
        endpoint, began, first_content_at = attempt.endpoint, attempt.started_at, attempt.first_content_at
        model, endpoint_id, provider = endpoint.model_id, endpoint.id, endpoint.provider
        upstream_id, finish, native = attempt.upstream_id[:TEXT_CHARS_MAX], attempt.finish_reason, attempt.native_finish_reason
        if native is not None:
            native = native[:TEXT_CHARS_MAX]
        if first_content_at:
            latency_ms = floor((first_content_at - began) * 1000)
            generation_ms = floor((now - began) * 1000)
    record = Generation(
        exchange.generation_id,
        key.account_id,
        key.digest,
        wall_ms,
        model,
        endpoint_id,
        provider,
        "" if error is None else error.code,
        bill.usage,
        bill.nanos,
        hold.resources,
        bill.prompt_nanos,
        bill.unbilled_nanos,
        exchange.kind,
        envelope.stream,
        isinstance(error, CallerGone),
        exchange.status,
        upstream_id,
        finish if error is None or isinstance(error, CallerGone) else "error",
        native,
        latency_ms,
        generation_ms,
        presented.http_referer,
        presented.title,
        presented.user_agent,
        said(envelope.user) if envelope.user else "",
        (said(envelope.session_id) if envelope.session_id else "") or presented.session_id,
        (attempts[0].record(),) if len(attempts) == 1 else tuple([each.record() for each in attempts]),
    )
    if bill.last is not None and exchange.continuation is not None:
        exchange.continuation.tell(record, bill, now)
    return record
