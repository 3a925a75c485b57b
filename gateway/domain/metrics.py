"""The metrics this product exports: names, help, labels and buckets, in one table.

Edges count by these names, control renders them, the README lists them. Label values come from closed sets
(routes, status codes, catalog names, outcomes): never a key, an account or a path.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal["counter", "gauge", "histogram"]

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
OVERHEAD = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
LAG = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class Metric(msgspec.Struct, frozen=True):
    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()  # upper bounds, without +Inf
    is_mean: bool = False  # a gauge that is shown as the mean over processes instead of their sum


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("gateway_requests_total", "counter", "Caller requests answered, by route and status code.", ("route", "code")),
        Metric("gateway_refusals_total", "counter", "Requests that ended in an error, by error code.", ("code",)),
        Metric("gateway_attempts_total", "counter", "Calls to endpoints, by outcome.", ("provider", "model", "outcome")),
        Metric("gateway_hedges_total", "counter", "Second calls begun beside slow ones, by what became of them.", ("outcome",)),
        Metric("gateway_hedge_spend_usd_total", "counter", "Estimated cost of calls that were outrun, in USD: nobody is charged for it."),
        Metric("gateway_inflight_requests", "gauge", "Caller requests being served now."),
        Metric("gateway_inflight_attempts", "gauge", "Calls to a provider under way now.", ("provider",)),
        Metric(
            "gateway_endpoint_state",
            "gauge",
            "On how many edges an endpoint takes traffic (closed), waits for a rate limit (held), or was put out by errors (ejected).",
            ("provider", "model", "state"),
        ),
        Metric(
            "gateway_endpoint_weight",
            "gauge",
            "An endpoint's part of its model's requests without wishes, 0-1, as last shared out.",
            ("provider", "model"),
            is_mean=True,
        ),
        Metric("gateway_connections", "gauge", "Open caller connections."),
        Metric("gateway_body_bytes", "gauge", "Bytes of request bodies held that came in pieces; `bodies_bytes_max` is the most."),
        Metric("gateway_upstream_connections_total", "counter", "Provider connections opened.", ("provider",)),
        Metric(
            "gateway_dropped_events_total",
            "counter",
            "Provider events dropped: their data was neither an object nor [DONE].",
            ("provider",),
        ),
        Metric("gateway_overhead_seconds", "histogram", "Time inside the gateway per request, not waiting for the provider.", (), OVERHEAD),
        Metric(
            "gen_ai_server_time_to_first_token_seconds",
            "histogram",
            "Request sent to first content, by provider and model.",
            ("provider", "model"),
            SECONDS,
        ),
        Metric(
            "gen_ai_server_time_per_output_token_seconds",
            "histogram",
            "Time per output token after the first.",
            ("provider", "model"),
            PER_TOKEN,
        ),
        Metric(
            "gen_ai_server_request_duration_seconds",
            "histogram",
            "Whole answer of the endpoint that served.",
            ("provider", "model"),
            SECONDS,
        ),
        Metric("gen_ai_client_token_usage", "counter", "Tokens reported by providers.", ("provider", "model", "token_type")),
        Metric("gateway_loop_lag_seconds", "histogram", "How late the event loop ran a timer.", ("process",), LAG),
        Metric("gateway_tasks", "gauge", "Tasks that an event loop runs.", ("process",)),
        Metric(
            "gateway_log_dropped_total", "counter", "Log lines dropped because the reader of stderr was too slow or gone.", ("process",)
        ),
        Metric(
            "gateway_content_dropped_total",
            "counter",
            "Exchanges of accounts that log their prompts that were not kept: edge (control is away or slow).",
            ("reason",),
        ),
        Metric("gateway_process_starts_total", "counter", "Processes started by the supervisor.", ("process",)),
        Metric("gateway_catalog_reloads_total", "counter", "Catalog reloads by result.", ("result",)),
        Metric("gateway_edges", "gauge", "Edges joined to control."),
        Metric("gateway_charged_usd_total", "counter", "Charged for usage, ever, in USD, as far as the ledger has it."),
        Metric("gateway_journal_pending_records", "gauge", "Finished exchanges in journal files that are not in the ledger yet."),
        Metric("gateway_journal_oldest_seconds", "gauge", "Age of the oldest exchange that waits for the ledger; 0: none waits."),
        Metric("gateway_ledger_commit_seconds", "histogram", "Time to post one batch of exchanges to the ledger.", (), SECONDS),
        Metric("gateway_ledger_refused_records_total", "counter", "Journal records set aside instead of posted, by reason.", ("reason",)),
        Metric("gateway_generations_removed_total", "counter", "Generations removed after [store] generations_days."),
        Metric("gateway_content_stored_total", "counter", "Exchanges of which prompt and answer were stored, encrypted."),
        Metric(
            "gateway_content_dropped_total",
            "counter",
            "Exchanges of accounts that have their prompts kept, of which nothing was stored, by reason.",
            ("reason",),
        ),
    )
}


class HistogramSample(msgspec.Struct, frozen=True, array_like=True):
    buckets: list[int]  # counts per bucket, not cumulative; the last one is +Inf
    sum: float


class Samples(msgspec.Struct, frozen=True):
    """All figures of one process since it started: metric name -> label values -> figure."""

    numbers: dict[str, dict[tuple[str, ...], float]] = {}
    histograms: dict[str, dict[tuple[str, ...], HistogramSample]] = {}
    whole: bool = True  # otherwise these changed and all others stand; of a gauge all label values are named

    def changed_by(self, changes: Samples) -> Samples:
        """These after `changes`. New objects where anything is different, so that others may be reading the old ones."""
        if changes.whole:
            return changes
        numbers, histograms = dict(self.numbers), dict(self.histograms)
        for name, series in changes.numbers.items():
            metric = METRICS.get(name)
            is_gauge = metric is not None and metric.kind == "gauge"
            numbers[name] = series if is_gauge else {**numbers.get(name, {}), **series}
        for name, found in changes.histograms.items():
            histograms[name] = {**histograms.get(name, {}), **found}
        return Samples(numbers=numbers, histograms=histograms, whole=self.whole)
