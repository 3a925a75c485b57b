"""What can be set: one struct per part, read by `gateway.config`. Units are in the names.

`config/gateway.toml` documents every setting; `tests/test_docs.py` keeps the two equal.
"""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from gateway.domain.money import parse_usd

PERCENT_STEP_NANOS = 100_000  # of a percentage read as if it were USD: a millionth of the whole

Port = Annotated[int, Meta(ge=0, le=65535)]  # 0: the kernel chooses
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
SecondsOrOff = Annotated[float, Meta(ge=0, le=86_400)]
Bytes = Annotated[int, Meta(gt=0, le=2**40)]
Count = Annotated[int, Meta(ge=0, le=10**12)]
Some = Annotated[int, Meta(ge=1, le=10**9)]
Share = Annotated[float, Meta(ge=0, le=1)]
Weight = Annotated[float, Meta(ge=0, le=1000)]
Decimals = Annotated[str, Meta(description='a decimal string in quotes, such as "0.80"')]
Adaptive = Annotated[Seconds | Literal["adaptive"], Meta(description='"adaptive" or a positive number of seconds')]


class Server(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    port: Port = 8080
    workers: Annotated[int, Meta(ge=0, le=64)] = 0
    public_url: str = ""
    trusted_proxies: tuple[str, ...] = ()
    tls_cert: str = ""
    tls_key: str = ""
    runtime_dir: str = ""
    body_bytes_max: Bytes = 26_214_400
    bodies_bytes_max: Count = 0
    request_head_s: Seconds = 10.0
    request_body_s: Seconds = 60.0
    client_idle_s: Seconds = 620.0
    write_stall_s: Seconds = 10.0
    hang_s: SecondsOrOff = 5.0
    drain_s: SecondsOrOff = 30.0

    @property
    def public_origin(self) -> str:
        """What browsers call the origin of our pages; "" where `public_url` does not say."""
        return "{0.scheme}://{0.netloc}".format(urlsplit(self.public_url)) if self.public_url else ""


class Operations(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    port: Port = 9464


class StoreSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: str = "sqlite:///var/gateway.db"
    generations_days: Annotated[int, Meta(ge=0, le=36_500)] = 0


class JournalSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    dir: Annotated[str, Meta(min_length=1)] = "var/journal"
    fsync: Literal["batch", "always", "never"] = "batch"
    fsync_ms: Annotated[int, Meta(ge=1, le=60_000)] = 20
    bytes_max: Bytes = 1_073_741_824


class Timeouts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    connect_s: Seconds = 5.0
    headers_s: Seconds = 30.0
    first_token_s: Adaptive = "adaptive"  # noqa: S105 (a time)
    keepalive_s: Seconds = 10.0
    idle_s: Seconds = 30.0
    total_s: Seconds = 600.0


class Upstream(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    inflight_max: Some = 1000
    sse_line_bytes_max: Bytes = 1_048_576
    answer_bytes_max: Bytes = 33_554_432


class Routing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    price_weight: Weight = 2.0
    latency_weight: Weight = 1.0
    throughput_weight: Weight = 0.5
    exploration_share: Annotated[float, Meta(ge=0, le=0.5)] = 0.05
    outage_s: Seconds = 30.0
    ramp_s: SecondsOrOff = 10.0
    breaker_failures: Some = 5
    breaker_error_share: Annotated[float, Meta(gt=0, le=1)] = 0.5
    breaker_attempts_min: Some = 20
    breaker_open_s: Seconds = 5.0
    breaker_open_s_max: Seconds = 30.0
    attempts_max: Annotated[int, Meta(ge=1, le=100)] = 6
    retry_budget_share: Share = 0.2
    retry_budget_per_s: Annotated[float, Meta(ge=0, le=10**6)] = 10.0
    hedge_percent: Decimals = "0"
    prometheus_url: str = ""


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of each account. 0: no such limit."""

    free_requests_per_day: Count = 200
    free_requests_per_minute: Count = 20
    free_requests_per_day_credited: Count = 1000
    credited_usd: Decimals = "10"
    requests_per_minute_per_usd: Count = 60
    requests_per_minute_min: Count = 60
    requests_per_minute_max: Count = 30_000

    @property
    def has_paid_rate(self) -> bool:
        """Whether requests to models with a price are limited by the minute."""
        return bool(self.requests_per_minute_max and (self.requests_per_minute_per_usd or self.requests_per_minute_min))

    @property
    def has_free_quota(self) -> bool:
        """Whether requests to free models are limited by the day, for some accounts at least."""
        return bool(self.free_requests_per_day or self.free_requests_per_day_credited)


class Billing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    signup_usd: Decimals = "0"
    purchase_fee_percent: Decimals = "5.5"
    purchase_fee_min_usd: Decimals = "0.80"
    credits_expire_days: Count = 365
    logging_discount_percent: Decimals = "1"
    charge_broken_streams: bool = False
    overshoot_usd: Decimals = "0.05"

    @property
    def logging_discount_millionths(self) -> int:
        """Of every cost."""
        return parse_usd(self.logging_discount_percent) // PERCENT_STEP_NANOS


class ContentSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    key_env: Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "GATEWAY_CONTENT_KEY"
    file: str = ""
    retention_days: Annotated[int, Meta(ge=1, le=36_500)] = 90
    exchange_bytes_max: Annotated[int, Meta(gt=0, le=2 * 1024 * 1024)] = 1_048_576  # more would keep leases waiting on the link
    total_bytes_max: Bytes = 10_737_418_240


class Accounts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    signup: bool = True


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    catalog: Annotated[tuple[str, ...], Meta(min_length=1)] = ("catalog.toml",)
    server: Server = Server()
    operations: Operations = Operations()
    store: StoreSettings = StoreSettings()
    journal: JournalSettings = JournalSettings()
    timeouts: Timeouts = Timeouts()
    upstream: Upstream = Upstream()
    routing: Routing = Routing()
    limits: Limits = Limits()
    billing: Billing = Billing()
    content: ContentSettings = ContentSettings()
    accounts: Accounts = Accounts()
