"""What a purchase of credits costs on top: a percentage, but at least so much. Inference itself has no fee."""

from __future__ import annotations

from gateway.domain.money import NANOS_PER_USD, parse_usd
from gateway.settings import Billing

CENT_NANOS = NANOS_PER_USD // 100


def purchase_fee_nanos(nanos: int, billing: Billing) -> int:
    """The fee on a purchase of `nanos`, rounded up to a whole cent, for cards know nothing finer."""
    share = -(-nanos * parse_usd(billing.purchase_fee_percent) // (100 * NANOS_PER_USD))
    fee = max(share, parse_usd(billing.purchase_fee_min_usd))
    return -(-fee // CENT_NANOS) * CENT_NANOS
