"""The order in which a model's endpoints are tried."""

from __future__ import annotations

from gateway.domain.catalog import Endpoint, Model


def by_price(model: Model) -> list[Endpoint]:
    """Cheapest first, by a blend of three prompt tokens to one completion token; file order among equals."""
    return sorted(model.endpoints, key=lambda endpoint: 3 * endpoint.price.prompt + endpoint.price.completion)
