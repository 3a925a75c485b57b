"""Money as integers: nanos (1e-9 USD) for amounts, nanos per million units for prices.

No float ever holds money here; USD enters and leaves as decimal text.
"""

from __future__ import annotations

from decimal import Context, Decimal, DecimalException, Inexact

NANOS_PER_USD = 1_000_000_000
PRICE_UNITS = 1_000_000  # a price is nanos per this many tokens (or requests, images, searches)
AMOUNT_NANOS_MAX = 2**62  # half of SQLite's integer range, so that sums of two never wrap

# A text of 40 characters times a scale of 16 digits fits exactly; the default 28 digits would round what is too fine into a whole number.
_EXACT = Context(prec=64, traps=[Inexact])


def parse_usd(text: str) -> int:
    """Nanos of a decimal USD string such as "10.00". Raises ValueError: not a plain decimal, finer than a nano, out of range."""
    return _scaled(text, NANOS_PER_USD, AMOUNT_NANOS_MAX)


def parse_price(text: str) -> int:
    """Nanos per million units of a decimal USD-per-unit string such as "0.0000025". Raises ValueError: negative, not decimal, too fine."""
    price = _scaled(text, NANOS_PER_USD * PRICE_UNITS, AMOUNT_NANOS_MAX)
    if price < 0:
        raise ValueError("a price cannot be negative")
    return price


def format_usd(nanos: int) -> str:
    """Decimal USD of an amount, exact, without trailing zeros: 1_500_000_000 -> "1.5"."""
    return _plain(nanos, NANOS_PER_USD)


def format_price(price: int) -> str:
    """Decimal USD per unit, exact: the inverse of `parse_price`."""
    return _plain(price, NANOS_PER_USD * PRICE_UNITS)


def usd_number(nanos: int) -> float:
    """A JSON number for display on the wire (`usage.cost`, credits). Never computed with."""
    return nanos / NANOS_PER_USD


def _scaled(text: str, scale: int, limit: int) -> int:
    if len(text) > 40 or not text.strip("-+.0123456789eE") == "":
        raise ValueError("not a decimal number")
    try:
        value = Decimal(text)
    except DecimalException:
        raise ValueError("not a decimal number") from None
    if not value.is_finite() or value.adjusted() > 30 or value.adjusted() < -40:
        raise ValueError("out of range")
    scaled = _EXACT.multiply(value, Decimal(scale))
    if scaled != scaled.to_integral_value():
        raise ValueError("finer than the smallest unit")
    if abs(scaled) > limit:
        raise ValueError("out of range")
    return int(scaled)


def _plain(value: int, scale: int) -> str:
    sign, value = ("-", -value) if value < 0 else ("", value)
    whole, part = divmod(value, scale)
    digits = str(part).zfill(len(str(scale)) - 1).rstrip("0")
    return f"{sign}{whole}.{digits}" if digits else f"{sign}{whole}"
