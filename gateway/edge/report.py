"""What is told of a finished exchange: one log line, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from typing import TYPE_CHECKING

import msgspec

from gateway.domain.catalog import Catalog
from gateway.domain.errors import GatewayError
from gateway.domain.usage import Usage
from gateway.edge.telemetry import Counter, Telemetry
from gateway.log import Log

if TYPE_CHECKING:
    from gateway.edge.attempts import Attempt
    from gateway.edge.exchange import InferenceExchange

ROUTES = {"chat": "chat_completions", "text": "completions"}


class ExchangeLine(msgspec.Struct, gc=False, omit_defaults=True):
    """The log line of an exchange, beside time, level, event and process."""

    generation: str | None
    route: str
    status: int
    attempts: list[tuple[str, str, int | None]]  # endpoint, outcome, the provider's status
    duration_ms: int
    overhead_us: int
    key: str | None = None  # masked
    account: str | None = None
    stream: bool | None = None
    endpoint: str | None = None
    ttft_ms: int | None = None
    error: str | None = None
    fault: str | None = None


class _EndpointFigures:
    """The metric children of one endpoint, looked up once."""

    __slots__ = ("duration", "input", "label", "ok", "output", "per_token", "ttft")

    def __init__(self, telemetry: Telemetry, provider: str, model: str) -> None:
        self.label = (provider, model)
        self.ok = telemetry.counter("gateway_attempts_total", provider, model, "ok")
        self.duration = telemetry.histogram("gen_ai_server_request_duration_seconds", provider, model)
        self.ttft = telemetry.histogram("gen_ai_server_time_to_first_token_seconds", provider, model)
        self.per_token = telemetry.histogram("gen_ai_server_time_per_output_token_seconds", provider, model)
        self.input = telemetry.counter("gen_ai_client_token_usage", provider, model, "input")
        self.output = telemetry.counter("gen_ai_client_token_usage", provider, model, "output")


class ExchangeReport:
    """Looks metric children up once and then only adds."""

    def __init__(self, telemetry: Telemetry, log: Log) -> None:
        self._telemetry = telemetry
        self._log = log
        self._overhead = telemetry.histogram("gateway_overhead_seconds")
        self._requests: dict[tuple[str, int], Counter] = {}
        self._endpoints: dict[str, _EndpointFigures] = {}

    def catalog_changed(self, catalog: Catalog) -> None:
        """Children of vanished endpoints are not looked up any more; their figures stay."""
        self._endpoints.clear()

    def finished(self, exchanges: Sequence[InferenceExchange], now: float) -> None:
        """Exchanges that end at this moment."""
        self._log.structs("exchange", [self._finished(exchange, now) for exchange in exchanges])

    def _finished(self, exchange: InferenceExchange, now: float) -> ExchangeLine:
        route, attempts, error, bill = ROUTES[exchange.kind], exchange.attempts, exchange.error, exchange.bill
        self.answered(route, exchange.status)
        if error is not None:
            self._telemetry.counter("gateway_refusals_total", error.code).add()
        told: list[tuple[str, str, int | None]] = []
        if attempts:
            usage = (bill.last or bill).usage if bill is not None else None  # what earlier parts used is no figure of the last endpoint's
            for attempt in attempts:
                self._attempt(attempt, now, usage, exchange.streaming)
                told.append((attempt.endpoint.id, attempt.outcome, attempt.provider_status))
            self._overhead.observe(exchange.overhead_s)
        return _line(exchange, route, told, now)

    def refused(self, route: str, error: GatewayError) -> None:
        """A request that never became an exchange."""
        self.answered(route, error.http_status)
        self._telemetry.counter("gateway_refusals_total", error.code).add()
        self._log.info("refused", route=route, status=error.http_status, error=error.code)

    def answered(self, route: str, status: int) -> None:
        counter = self._requests.get((route, status))
        if counter is None:
            counter = self._requests[route, status] = self._telemetry.counter("gateway_requests_total", route, str(status))
        counter.value += 1

    def _attempt(self, attempt: Attempt, now: float, usage: Usage | None, streaming: bool) -> None:
        endpoint = attempt.endpoint
        figures = self._endpoints.get(endpoint.id)
        if figures is None:
            figures = self._endpoints[endpoint.id] = _EndpointFigures(self._telemetry, endpoint.provider, endpoint.model_id)
        if attempt.outcome != "ok":
            self._telemetry.counter("gateway_attempts_total", *figures.label, attempt.outcome).add()
            return
        attempt.tell_success(usage, now)
        figures.ok.value += 1
        figures.duration.observe(now - attempt.started_at)
        if usage is None:
            return
        figures.input.value += usage.prompt_tokens
        figures.output.value += usage.completion_tokens
        if streaming and attempt.first_content_at:
            figures.ttft.observe(attempt.first_content_at - attempt.started_at)
            if usage.completion_tokens > 1:
                figures.per_token.observe((now - attempt.first_content_at) / (usage.completion_tokens - 1))


def _line(exchange: InferenceExchange, route: str, attempts: list[tuple[str, str, int | None]], now: float) -> ExchangeLine:
    envelope, key, error = exchange.envelope, exchange.key, exchange.error
    last = exchange.attempt  # the one that served
    return ExchangeLine(
        exchange.generation_id or None,
        route,
        exchange.status,
        attempts,
        floor((now - exchange.started_at) * 1000),
        floor(exchange.overhead_s * 1e6),
        key.label if key is not None else None,
        key.account_id if key is not None else None,
        envelope.stream if envelope is not None else None,
        last.endpoint.id if last is not None else None,
        floor((last.first_content_at - last.started_at) * 1000) if last is not None and last.first_content_at else None,
        error.code if error is not None else None,
        error.fault if error is not None else None,
    )
