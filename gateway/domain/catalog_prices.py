"""The `pricing` table of an endpoint: decimal strings to integers, with the conditions of `overrides`.

A TOML float is refused: 0.1 + 0.2 is not a price.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from gateway.domain.catalog import Price, PriceOverride
from gateway.domain.document import Findings, Place, read, unknown_keys
from gateway.domain.money import NANOS_PER_USD, parse_price, parse_usd

KINDS = ("prompt", "completion", "request", "image", "internal_reasoning", "input_cache_read", "input_cache_write", "web_search")
REQUIRED = ("prompt", "completion")  # free must be said: "0"
MILLION = 1_000_000

Clock = Annotated[int, Meta(ge=0, le=2359)]


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """When an override holds; every given part must. Source: contract 3.3."""

    min_prompt_tokens: Annotated[int, Meta(ge=0, le=10**9)] | None = None
    utc_start: Clock | None = None
    utc_end: Clock | None = None
    utc_days: Annotated[tuple[Annotated[int, Meta(ge=0, le=6)], ...], Meta(min_length=1)] | None = None


def read_price(table: dict[str, Any], place: Place, findings: Findings) -> Price | None:
    """The price written in a `pricing` table (USD per token, request, image or search); None after an error."""
    before = len(findings.errors)
    unknown_keys(table, (*KINDS, "discount", "overrides"), place, findings)
    for kind in REQUIRED:
        if kind not in table:
            findings.error(place.at(kind), 'missing; write "0" if it is free')
    prices = _prices(table, place, findings)
    discount = _discount(table["discount"], place.at("discount"), findings) if "discount" in table else 0
    overrides = _overrides(table.get("overrides", []), place.at("overrides"), findings)
    if len(findings.errors) > before:
        return None
    return Price(**prices, discount_millionths=discount, overrides=overrides)


def _prices(table: dict[str, Any], place: Place, findings: Findings) -> dict[str, int]:
    prices: dict[str, int] = {}
    for kind in KINDS:
        if kind not in table:
            continue
        text = _quoted(table[kind], place.at(kind), findings)
        try:
            if text is not None:
                prices[kind] = parse_price(text)
        except ValueError as error:
            findings.error(place.at(kind), f"{error}; a price is USD per unit, such as 0.0000025")
    return prices


def _discount(value: object, place: Place, findings: Findings) -> int:
    """Millionths of a share such as "0.25" (a quarter off)."""
    text = _quoted(value, place, findings)
    if text is None:
        return 0
    try:
        nanos = parse_usd(text)
    except ValueError as error:
        findings.error(place, f"{error}; a discount is a share, from 0 to 1")
        return 0
    millionths, rest = divmod(nanos * MILLION, NANOS_PER_USD)
    if not 0 <= millionths <= MILLION or rest:
        findings.error(place, "a discount is a share from 0 to 1, no finer than 0.000001")
    return millionths


def _overrides(value: object, place: Place, findings: Findings) -> tuple[PriceOverride, ...]:
    if not isinstance(value, list):
        findings.error(place, "expected a list of tables")
        return ()
    found = (_override(table, place.at(i), findings) for i, table in enumerate(value))
    return tuple(override for override in found if override is not None)


def _override(table: object, place: Place, findings: Findings) -> PriceOverride | None:
    before = len(findings.errors)
    if not isinstance(table, dict):
        findings.error(place, "expected a table")
        return None
    conditions = read(Condition, {key: value for key, value in table.items() if key not in KINDS}, place, findings)
    prices = _prices(table, place, findings)
    if conditions is None or len(findings.errors) > before:
        return None
    start, end = conditions.utc_start, conditions.utc_end
    if (start is None) != (end is None):
        findings.error(place, "utc_start and utc_end come together")
    elif start is not None and (start == end or start % 100 > 59 or (end or 0) % 100 > 59):
        findings.error(place, "utc_start and utc_end are HHMM and differ, such as 1630 and 30")
    if not prices:
        findings.error(place, "changes no price")
    if conditions == Condition():
        findings.error(place, "has no condition; write its prices into the table above")
    if len(findings.errors) > before:
        return None
    return PriceOverride(**msgspec.structs.asdict(conditions), prices=prices)


def _quoted(value: object, place: Place, findings: Findings) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        findings.error(place, f'put it in quotes, "{Decimal(repr(value)):f}": a number would pass through binary fractions')
    else:
        findings.error(place, "must be a decimal string")
    return None
