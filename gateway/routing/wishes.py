"""A caller's wishes: the `provider` object, as the contract has it. Decoded strictly: a wish that is not understood is refused,
never ignored, for it may be about privacy.

Source: OpenRouter provider preferences, read 2026-11.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from gateway.domain.errors import BadRequest
from gateway.routing.figures import Percentiles

Slugs = Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=128)], ...], Meta(max_length=128)]
Quantization = Literal["int4", "int8", "fp4", "mxfp4", "nvfp4", "fp6", "fp8", "mxfp8", "fp16", "bf16", "fp32", "unknown"]
SortBy = Literal["price", "throughput", "latency", "exacto"]
Positive = Annotated[float, Meta(ge=0, le=1e12)]
Money = Positive | Annotated[str, Meta(min_length=1, max_length=32)]  # USD; SDKs send strings too

NANOS = 10**9
MILLION = 10**6


class Sort(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    by: SortBy | None = None
    partition: Literal["model", "none"] | None = None


class Cutoffs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Per percentile; all that are given must hold."""

    p50: Positive | None = None
    p75: Positive | None = None
    p90: Positive | None = None
    p99: Positive | None = None


class MaxPrice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """USD: per million tokens for prompt, completion and audio, per piece for request and image."""

    prompt: Money | None = None
    completion: Money | None = None
    request: Money | None = None
    image: Money | None = None
    audio: Money | None = None

    def nanos(self) -> dict[str, int]:
        """The kinds that are limited, in the units of Price. Raises BadRequest."""
        units = {"prompt": NANOS, "completion": NANOS, "request": NANOS * MILLION, "image": NANOS * MILLION}
        given = {kind: getattr(self, kind) for kind in units}
        return {kind: _nanos(kind, value, units[kind]) for kind, value in given.items() if value is not None}


class Wishes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `provider` object. Every key may be null, which is as if it were absent."""

    order: Slugs | None = None
    only: Slugs | None = None
    ignore: Slugs | None = None
    allow_fallbacks: bool | None = None  # null: true
    require_parameters: bool | None = None
    data_collection: Literal["allow", "deny"] | None = None
    zdr: bool | None = None
    enforce_distillable_text: bool | None = None
    quantizations: tuple[Quantization, ...] | None = None
    sort: SortBy | Sort | None = None
    preferred_min_throughput: Positive | Cutoffs | None = None  # tokens per second; a bare number is p50
    preferred_max_latency: Positive | Cutoffs | None = None  # seconds to the first token
    max_price: MaxPrice | None = None
    continuation: bool | None = None  # of ours: go on elsewhere when a stream breaks

    @property
    def sort_by(self) -> SortBy | None:
        return self.sort.by if isinstance(self.sort, Sort) else self.sort

    @property
    def across_models(self) -> bool:
        """Whether the endpoints of all models are sorted together."""
        return isinstance(self.sort, Sort) and self.sort.partition == "none"

    @property
    def has_thresholds(self) -> bool:
        return self.preferred_min_throughput is not None or self.preferred_max_latency is not None


NO_WISHES = Wishes()
_decoder = msgspec.json.Decoder(Wishes)
_KNOWN = ", ".join(Wishes.__struct_fields__)


def read_wishes(raw: bytes | msgspec.Raw) -> Wishes:
    """The wishes in a `provider` object. Raises BadRequest, naming the field and what it must be, never echoing it."""
    try:
        wishes = _decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise BadRequest(_told(str(error))) from None
    except msgspec.DecodeError:
        raise BadRequest("provider is not valid JSON") from None
    if wishes.max_price is not None:
        wishes.max_price.nanos()
    return wishes


def routed(wishes: Wishes, route: str | None) -> Wishes:
    """With the deprecated `route` taken into account: "sort" sorts all models' endpoints together, "fallback" does not."""
    if route != "sort" or wishes.across_models:
        return wishes
    return msgspec.structs.replace(wishes, sort=Sort(wishes.sort_by, "none"))


def is_slow(percentiles: Percentiles | None, wished: float | Cutoffs | None) -> bool:
    """Whether seconds are above what was wished. What nobody knows is not held against an endpoint."""
    return _misses(percentiles, wished, lambda seen, cutoff: seen > cutoff)


def is_weak(percentiles: Percentiles | None, wished: float | Cutoffs | None) -> bool:
    """Whether tokens per second are below what was wished."""
    return _misses(percentiles, wished, lambda seen, cutoff: seen < cutoff)


def _misses(percentiles: Percentiles | None, wished: float | Cutoffs | None, fails: Callable[[float, float], bool]) -> bool:
    if percentiles is None or wished is None:
        return False
    if not isinstance(wished, Cutoffs):
        return fails(percentiles.p50, wished)
    for name in Cutoffs.__struct_fields__:
        cutoff = getattr(wished, name)
        if cutoff is not None and fails(getattr(percentiles, name), cutoff):
            return True
    return False


def _told(message: str) -> str:
    """msgspec's words, without the caller's own."""
    reason, _, path = message.partition(" - at `$")
    where = "provider" + path.rstrip("`")
    if reason.startswith("Object contains unknown field"):
        return f"{where}: an unknown key; known are {_KNOWN}" if where == "provider" else f"{where}: an unknown key"
    if reason.startswith("Invalid enum value"):
        return f"{where}: not one of the allowed values"
    return f"{where}: {reason}"


def _nanos(kind: str, value: float | str, unit: int) -> int:
    try:
        amount = Decimal(value if isinstance(value, str) else repr(value))
    except InvalidOperation:
        amount = Decimal(-1)
    if not amount.is_finite() or not 0 <= amount <= 10**12:
        raise BadRequest(f"provider.max_price.{kind}: an amount in USD, such as 0.5")
    return int(amount * unit)
