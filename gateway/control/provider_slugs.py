"""Which providers an account's rules may name: those of the catalog in force, by slug or by the tag of an endpoint.

A word that means nobody would be a rule that nobody keeps: a typing error in an ignore list lets prompts go where they must not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import UNSET, UnsetType

from gateway.domain.catalog import Catalog
from gateway.domain.errors import BadRequest

SLUGS_MAX = 200


def provider_slugs(field: str, slugs: Sequence[str] | UnsetType, catalog: Callable[[], Catalog]) -> tuple[str, ...] | UnsetType:
    """Each once, in lower case. Raises BadRequest, naming `field` and the slug that no provider has.

    The catalog is asked for only where there is a name to check.
    """
    if isinstance(slugs, UnsetType):
        return UNSET
    found = tuple(dict.fromkeys(slug.strip().lower() for slug in slugs))
    if len(found) > SLUGS_MAX:
        raise BadRequest(f"{field}: more than {SLUGS_MAX} providers")
    if found:
        known = _names(catalog())
        for slug in found:
            if slug not in known:
                raise BadRequest(f"{field}: {slug[:100]!r} is not a provider's slug; GET /api/v1/providers lists them")
    return found


def _names(catalog: Catalog) -> set[str]:
    tags = {endpoint.tag.lower() for model in catalog.models.values() for endpoint in model.endpoints}
    return tags | {slug.lower() for slug in catalog.providers}
