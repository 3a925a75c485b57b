"""Suffixes of a model's name. Static ones (`:free`, `:thinking`, `:extended`, `:beta`) are models of their own, valid where the
catalog lists them; dynamic ones (`:nitro`, `:floor`, `:exacto`, `:online`) change how any model is routed, and can be stacked.
"""

from __future__ import annotations

import msgspec

from gateway.domain.catalog import Catalog, Model
from gateway.domain.errors import NoEndpointMatches, UnknownModel
from gateway.routing.filters import no_endpoints
from gateway.routing.wishes import SortBy

SORTS: dict[str, SortBy] = {"nitro": "throughput", "floor": "price", "exacto": "exacto"}
TIERS = {"nitro": ("priority",), "floor": ("flex",)}
ONLINE = "online"
ALIASES = ("beta",)  # once meant unmoderated; nothing is moderated here, so it is the model itself


class Resolved(msgspec.Struct, frozen=True):
    """A model as it was asked for."""

    model: Model
    sort: SortBy | None = None
    tiers: tuple[str, ...] = ()  # service tiers that join
    online: bool = False  # a web search is to be done first


def resolve(name: str, catalog: Catalog, *, site: str = "") -> Resolved:
    """The model and routing that a name stands for. Raises UnknownModel, or NoEndpointMatches for a free variant that is none."""
    model = catalog.find(name)
    if model is not None:
        return Resolved(model)
    sort: SortBy | None = None
    tiers: tuple[str, ...] = ()
    online = False
    base = name
    while model is None:
        base, colon, suffix = base.rpartition(":")
        if not colon:
            raise UnknownModel("the model is not a valid model ID; see /api/v1/models")
        if suffix in SORTS:
            sort = sort or SORTS[suffix]
            tiers += TIERS.get(suffix, ())
        elif suffix == ONLINE:
            online = True
        elif suffix not in ALIASES:
            raise _unlisted(base, suffix, catalog, site)
        model = catalog.find(base)
    return Resolved(model, sort, tiers, online)


def _unlisted(base: str, suffix: str, catalog: Catalog, site: str) -> NoEndpointMatches | UnknownModel:
    if suffix == "free" and (model := catalog.find(base)) is not None:
        return no_endpoints(f"{model.id}:free", site, "free_variant_ended")
    return UnknownModel("the model is not a valid model ID; see /api/v1/models")
