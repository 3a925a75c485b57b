"""Fields that several bodies have, and what is checked of them beyond their type. Every refusal names its field."""

from __future__ import annotations

import calendar
import datetime
import decimal
from decimal import Decimal
from typing import Annotated

from msgspec import Meta

from gateway.control.api.workspace import workspace_of
from gateway.domain.errors import BadRequest, NotFound
from gateway.domain.money import AMOUNT_NANOS_MAX, NANOS_PER_USD

_EXACT = decimal.Context(prec=64, Emax=10**6, Emin=-(10**6), rounding=decimal.ROUND_DOWN)

# USD as a JSON number, of which no float is made; a decimal string is taken as well.
Usd = Annotated[
    Decimal,
    Meta(
        extra_json_schema={
            "type": ["number", "string"],
            "minimum": 0,
            "maximum": AMOUNT_NANOS_MAX // NANOS_PER_USD,
            "pattern": r"^[0-9]{1,9}(\.[0-9]{1,9})?$",
            "format": "usd",
        }
    ),
]
Moment = Annotated[datetime.datetime, Meta(tz=True)]
Name = Annotated[str, Meta(min_length=1, max_length=200)]


def usd_nanos(field: str, value: Decimal) -> int:
    """Nanos; what is finer is cut off, for clients that compute in floats. Raises BadRequest."""
    if not value.is_finite() or value < 0 or value.adjusted() > 12:
        raise BadRequest(f"{field}: must be a number of USD, 0 or more, and in range")
    nanos = int(_EXACT.multiply(value, NANOS_PER_USD).to_integral_value(decimal.ROUND_DOWN)) if value.adjusted() > -12 else 0
    if nanos > AMOUNT_NANOS_MAX:
        raise BadRequest(f"{field}: must be a number of USD, 0 or more, and in range")
    return nanos


def expiry_s(field: str, value: datetime.datetime, now_s: float) -> int:
    """Unix seconds of a moment to come, told in UTC. Raises BadRequest."""
    if value.utcoffset() != datetime.timedelta(0):
        raise BadRequest(f"{field}: must be in UTC, such as 2027-01-31T00:00:00Z")
    moment_s = calendar.timegm(value.utctimetuple())  # by way of a float the last moment of year 9999 would lie in year 10000
    if moment_s <= now_s:
        raise BadRequest(f"{field}: must lie in the future")
    return moment_s


def require_own_workspace(workspace_id: str, account_id: str) -> None:
    """Raises NotFound, the same for foreign and for absent ones."""
    if workspace_id.lower() != workspace_of(account_id):
        raise NotFound("Workspace not found")
