"""Suffixes of a model's name. Static ones (`:free`, `:thinking`, `:extended`, `:beta`) are models of their own, valid where the
catalog lists them; dynamic ones (`:nitro`, `:floor`, `:exacto`) change how any model is routed, and can be stacked. `:online` asks
for a web search, which nobody does here: it is refused, for an answer without one would be taken for one with it.
"""

from __future__ import annotations

import re

import msgspec

from gateway.domain.catalog import Catalog, Model
from gateway.domain.errors import BadRequest, NoEndpointMatches, UnknownModel
from gateway.routing.filters import no_endpoints
from gateway.routing.wishes import SortBy

SORTS: dict[str, SortBy] = {"nitro": "throughput", "floor": "price", "exacto": "exacto"}
TIERS = {"nitro": ("priority",), "floor": ("flex",)}
ONLINE = "online"
_PLAIN = re.compile(r"(?!.*sk-)[A-Za-z0-9._~@-]{1,64}/[A-Za-z0-9._~@-]{1,128}(:[A-Za-z0-9._-]{1,32}){0,4}")  # a key is no name
ALIASES = ("beta",)  # once meant unmoderated; nothing is moderated here, so it is the model itself


class Resolved(msgspec.Struct, frozen=True):
    """A model as it was asked for."""

    model: Model
    sort: SortBy | None = None
    tiers: tuple[str, ...] = ()  # service tiers that join


def resolve(name: str, catalog: Catalog, *, site: str = "") -> Resolved:
    """The model and routing that a name stands for.

    Raises UnknownModel, BadRequest for `:online`, or NoEndpointMatches for a free variant that is none.
    """
    model = catalog.find(name)
    if model is not None:
        return Resolved(model)
    sort: SortBy | None = None
    tiers: tuple[str, ...] = ()
    base = name
    while model is None:
        base, colon, suffix = base.rpartition(":")
        if not colon:
            raise _unknown(name)
        if suffix in SORTS:
            sort = sort or SORTS[suffix]
            tiers += TIERS.get(suffix, ())
        elif suffix == ONLINE:
            raise BadRequest("model: :online asks for a web search, which this gateway does not do; name the model without it")
        elif suffix not in ALIASES:
            raise _unlisted(base, suffix, catalog, site)
        model = catalog.find(base)
    return Resolved(model, sort, tiers)


def _unlisted(base: str, suffix: str, catalog: Catalog, site: str) -> NoEndpointMatches | UnknownModel:
    if suffix == "free" and (model := catalog.find(base)) is not None:
        return no_endpoints(f"{model.id}:free", site, "free_variant_ended")
    return _unknown(f"{base}:{suffix}")


def _unknown(name: str) -> UnknownModel:
    """Names it where it has the form of a model's, author and slug: no other text of a body comes back in an answer."""
    named = name if _PLAIN.fullmatch(name) else "the model"
    return UnknownModel(f"{named} is not a valid model ID; see /api/v1/models")
