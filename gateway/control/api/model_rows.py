"""Catalog objects as the contract's JSON rows: every required key, prices as exact decimal strings, no null where none is allowed.

Source: models and endpoints API of the contract, read 2026-11. A model shows the price of its cheapest endpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from gateway.domain.catalog import Catalog, Endpoint, Model, Price, PriceOverride, Provider
from gateway.domain.money import format_price
from gateway.routing.figures import Percentiles
from gateway.routing.fleet import Shown

Row = dict[str, Any]


def cheapest(model: Model) -> Endpoint:
    """By the price of one prompt and one completion token; the first of equals."""
    return min(model.endpoints, key=lambda endpoint: endpoint.price.prompt + endpoint.price.completion)


def retains_nothing(provider: Provider) -> bool:
    """Zero data retention, as far as it is confirmed."""
    return provider.data is not None and provider.data.zdr


def supported_parameters(model: Model) -> list[str]:
    """What the model says, or else what any of its endpoints supports."""
    if model.supported_parameters:
        return list(model.supported_parameters)
    return list(dict.fromkeys(name for endpoint in model.endpoints for name in endpoint.supported_parameters))


def model_row(model: Model) -> Row:
    top = cheapest(model)
    row: Row = {
        "id": model.id,
        "canonical_slug": model.canonical_slug,
        "name": model.name,
        "created": model.created,
        "context_length": model.context_length,
        "architecture": _architecture(model),
        "pricing": _pricing(top.price),
        "top_provider": {
            "context_length": top.context_length,
            "max_completion_tokens": top.max_completion_tokens,
            "is_moderated": model.moderated,
        },
        "per_request_limits": None,
        "supported_parameters": supported_parameters(model),
        "default_parameters": model.default_parameters,
        "supported_voices": None,
        "links": {"details": f"/api/v1/models/{model.canonical_slug}/endpoints"},
    }
    optional = {
        "description": model.description or None,
        "hugging_face_id": model.hugging_face_id,
        "knowledge_cutoff": model.knowledge_cutoff,
        "reasoning": _present(msgspec.structs.asdict(model.reasoning)) if model.reasoning is not None else None,
    }
    return row | _present(optional)


def model_endpoints_row(model: Model, catalog: Catalog, shown: Callable[[str], Shown]) -> Row:
    """A model with all its endpoints, and what is known of each by its id."""
    return {
        "id": model.id,
        "name": model.name,
        "created": model.created,
        "description": model.description,
        "architecture": _architecture(model),
        "endpoints": [
            endpoint_row(model, endpoint, catalog.providers[endpoint.provider], shown(endpoint.id)) for endpoint in model.endpoints
        ],
    }


def endpoint_row(model: Model, endpoint: Endpoint, provider: Provider, shown: Shown) -> Row:
    parameters = endpoint.supported_parameters or tuple(supported_parameters(model))
    chooses_tools = "tool_choice" in parameters
    return {
        "name": f"{provider.name} | {model.canonical_slug}",
        "model_id": model.id,
        "model_name": model.name,
        "provider_name": provider.name,
        "tag": endpoint.tag,
        "context_length": endpoint.context_length or 0,  # strict clients want a number here, unlike in a model's row
        "max_completion_tokens": endpoint.max_completion_tokens,
        "max_prompt_tokens": endpoint.max_prompt_tokens,
        "quantization": endpoint.quantization,
        "status": shown.status,
        "pricing": {"discount": 0} | _pricing(endpoint.price),
        "supported_parameters": list(parameters),
        "supports_implicit_caching": endpoint.supports_implicit_caching,
        "uptime_last_5m": _percent(shown.uptime_last_5m),  # null: too little is known to say
        "uptime_last_30m": _percent(shown.uptime_last_30m),
        "uptime_last_1d": _percent(shown.uptime_last_1d),
        "latency_last_30m": _percentiles(shown.latency_last_30m),
        "throughput_last_30m": _percentiles(shown.throughput_last_30m),
        "native_tools": {},
        "service_tier": None,
        "supports_diarization": False,
        "supports_tool_choice": dict.fromkeys(("auto", "none", "required", "function"), chooses_tools),
    }


def provider_row(provider: Provider) -> Row:
    optional = {
        "terms_of_service_url": provider.terms_of_service_url,
        "status_page_url": provider.status_page_url,
        "headquarters": provider.headquarters,
        "datacenters": list(provider.datacenters) or None,
    }
    return {"name": provider.name, "slug": provider.slug, "privacy_policy_url": provider.privacy_policy_url} | _present(optional)


def _architecture(model: Model) -> Row:
    inputs, outputs = list(model.input_modalities), list(model.output_modalities)
    return {
        "modality": f"{'+'.join(inputs)}->{'+'.join(outputs)}",
        "input_modalities": inputs,
        "output_modalities": outputs,
        "tokenizer": model.tokenizer,
        "instruct_type": model.instruct_type,
    }


def _pricing(price: Price) -> Row:
    row: Row = {
        kind: format_price(getattr(price, kind))
        for kind in ("prompt", "completion", "request", "image", "web_search", "internal_reasoning")
    }
    for kind in ("input_cache_read", "input_cache_write"):
        if (nanos_per_mtok := getattr(price, kind)) is not None:
            row[kind] = format_price(nanos_per_mtok)
    if price.discount_millionths:
        row["discount"] = price.discount_millionths / 1_000_000
    if price.overrides:
        row["overrides"] = [_override(override) for override in price.overrides]
    return row


def _override(override: PriceOverride) -> Row:
    conditions = {
        "min_prompt_tokens": override.min_prompt_tokens,
        "utc_start": override.utc_start,
        "utc_end": override.utc_end,
        "utc_days": list(override.utc_days) if override.utc_days is not None else None,
    }
    return _present(conditions) | {kind: format_price(nanos_per_mtok) for kind, nanos_per_mtok in override.prices.items()}


def _percent(share: float | None) -> float | None:
    return None if share is None else round(share, 3)


def _percentiles(found: Percentiles | None) -> Row | None:
    return None if found is None else {name: round(value, 2) for name, value in msgspec.structs.asdict(found).items()}


def _present(optional: Row) -> Row:
    return {key: value for key, value in optional.items() if value is not None}
