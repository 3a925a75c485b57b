"""The public catalog: /models, /models/count, one model, its endpoints, the providers. Readable without a key.

Rows are rendered once per catalog; a request only picks among them. Filters by what no catalog says (category,
distillable, benchmarks) are ignored as unknown parameters are, and orders by them leave the catalog's own order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import urlencode

import msgspec
import orjson
from aiohttp import web

from gateway.control.api.http import API_PREFIXES, answer
from gateway.control.api.model_rows import (
    cheapest,
    endpoint_row,
    model_endpoints_row,
    model_row,
    provider_row,
    retains_nothing,
    supported_parameters,
)
from gateway.control.catalog_source import CatalogSource
from gateway.domain.catalog import Catalog, Model, Provider
from gateway.domain.errors import BadRequest, NotFound
from gateway.domain.money import parse_usd
from gateway.routing.fleet import UNSEEN, Shown

LIMIT_DEFAULT = 500
LIMIT_MAX = 1000
OFFSET_MAX = 10**9
AGE_DAYS_MAX = 10**6
DAY_S = 86_400
REGIONS = ("eu", "us")
DYNAMIC_VARIANTS = (":nitro", ":floor", ":exacto", ":online")  # name a way of routing, not a model of their own


class _Listed(msgspec.Struct, frozen=True):
    model: Model
    row: orjson.Fragment
    parameters: frozenset[str]
    providers: frozenset[str]  # slugs and display names, lower case
    zdr: bool  # some provider of it retains nothing
    prompt: int  # nanos per million tokens, of the cheapest endpoint
    completion: int


Keep = Callable[[_Listed], bool]


class ModelsApi:
    """Handlers over the catalog in force. `shown` says what is known of an endpoint, by its id."""

    def __init__(self, *, catalogs: CatalogSource, shown: Callable[[str], Shown] = lambda endpoint_id: UNSEEN) -> None:
        self._catalogs = catalogs
        self._shown = shown
        self._listed: list[_Listed] = []
        self._listed_of: Catalog | None = None

    def routes(self) -> list[web.RouteDef]:
        paths = {
            "/models": self.models,
            "/models/count": self.count,
            "/embeddings/models": self.embedding_models,
            "/model/{author}/{slug}": self.model,
            "/models/{author}/{slug}/endpoints": self.endpoints,
            "/endpoints/zdr": self.zdr_endpoints,
            "/providers": self.providers,
        }
        return [web.get(prefix + path, handler) for prefix in API_PREFIXES for path, handler in paths.items()]

    async def models(self, request: web.Request) -> web.Response:
        return _page(request, self._matching(request.query))

    async def embedding_models(self, request: web.Request) -> web.Response:
        return _page(request, self._matching({**request.query, "output_modalities": "embeddings"}))

    async def count(self, request: web.Request) -> web.Response:
        return answer({"data": {"count": len(self._matching(request.query))}})

    async def model(self, request: web.Request) -> web.Response:
        return answer({"data": model_row(self._named(request))})

    async def endpoints(self, request: web.Request) -> web.Response:
        return answer({"data": model_endpoints_row(self._named(request), self._catalogs.catalog, self._shown)})

    async def zdr_endpoints(self, request: web.Request) -> web.Response:
        catalog = self._catalogs.catalog
        rows = []
        for model in catalog.models.values():
            for endpoint in model.endpoints:
                provider = catalog.providers[endpoint.provider]
                if retains_nothing(provider):
                    rows.append(endpoint_row(model, endpoint, provider, self._shown(endpoint.id)))
        return answer({"data": rows})

    async def providers(self, request: web.Request) -> web.Response:
        return answer({"data": [provider_row(provider) for provider in self._catalogs.catalog.providers.values()]})

    def _named(self, request: web.Request) -> Model:
        name = f"{request.match_info['author']}/{request.match_info['slug']}"
        catalog = self._catalogs.catalog
        model = catalog.find(name)
        while model is None and name.endswith(DYNAMIC_VARIANTS):
            name = name.rpartition(":")[0]
            model = catalog.find(name)
        if model is None or not model.endpoints:
            raise NotFound("Model not found")
        return model

    def _matching(self, query: Mapping[str, str]) -> list[_Listed]:
        keeps = _filters(query)
        found = [listed for listed in self._rows() if all(keep(listed) for keep in keeps)]
        if (order := _ORDERS.get(query.get("sort", ""))) is not None:
            found.sort(key=order)
        return found

    def _rows(self) -> list[_Listed]:
        catalog = self._catalogs.catalog
        if self._listed_of is not catalog:
            self._listed = [_listed(model, catalog.providers) for model in catalog.models.values() if model.endpoints]
            self._listed_of = catalog
        return self._listed


def _listed(model: Model, catalog_providers: Mapping[str, Provider]) -> _Listed:
    price = cheapest(model).price
    providers = [catalog_providers[endpoint.provider] for endpoint in model.endpoints]
    return _Listed(
        model=model,
        row=orjson.Fragment(orjson.dumps(model_row(model))),
        parameters=frozenset(supported_parameters(model)),
        providers=frozenset(name.lower() for provider in providers for name in (provider.slug, provider.name)),
        zdr=any(retains_nothing(provider) for provider in providers),
        prompt=price.prompt,
        completion=price.completion,
    )


_ORDERS: dict[str, Callable[[_Listed], int]] = {
    "pricing-low-to-high": lambda listed: listed.prompt + listed.completion,
    "pricing-high-to-low": lambda listed: -(listed.prompt + listed.completion),
    "context-high-to-low": lambda listed: -listed.model.context_length,
    "newest": lambda listed: -listed.model.created,
}


def _filters(query: Mapping[str, str]) -> list[Keep]:
    """One test for each filter that is given. Unknown parameters are ignored, as everywhere in the contract."""
    outputs = _words(query.get("output_modalities", "text"))
    keeps: list[Keep] = []
    if "all" not in outputs:
        keeps.append(lambda listed: not outputs.isdisjoint(listed.model.output_modalities))
    if inputs := _words(query.get("input_modalities", "")):
        keeps.append(lambda listed: inputs.issubset(listed.model.input_modalities))
    if parameters := _words(query.get("supported_parameters", "")):
        keeps.append(lambda listed: parameters <= listed.parameters)
    if authors := _words(query.get("model_authors", "")):
        keeps.append(lambda listed: listed.model.id.partition("/")[0] in authors)
    if providers := _words(query.get("providers", "").lower()):
        keeps.append(lambda listed: not providers.isdisjoint(listed.providers))
    if family := query.get("arch", "").strip().lower():
        keeps.append(lambda listed: listed.model.tokenizer.lower() == family)
    if query.get("zdr") == "true":
        keeps.append(lambda listed: listed.zdr)
    if (region := query.get("region")) is not None:
        keeps.append(_in_region(region))
    if sought := query.get("q", "").strip().lower():
        keeps.append(lambda listed: sought in listed.model.id.lower() or sought in listed.model.name.lower())
    if (context := _whole(query, "context", 0, 10**12)) is not None:
        keeps.append(lambda listed: listed.model.context_length >= context)
    return [*keeps, *_age_filters(query), *_price_filters(query)]


def _in_region(region: str) -> Keep:
    """An endpoint's region is the provider's own word, such as europe-west1 or us-east-2."""
    if region not in REGIONS:
        raise BadRequest("region must be eu or us")
    return lambda listed: any((endpoint.region or "").lower().startswith(region) for endpoint in listed.model.endpoints)


def _age_filters(query: Mapping[str, str]) -> Iterable[Keep]:
    """A model whose `created` is unknown (0) is as old as can be."""
    now_s = int(time.time())
    if (least := _whole(query, "min_age_days", 0, AGE_DAYS_MAX)) is not None:
        yield lambda listed: listed.model.created <= now_s - least * DAY_S
    if (most := _whole(query, "max_age_days", 0, AGE_DAYS_MAX)) is not None:
        yield lambda listed: listed.model.created >= now_s - most * DAY_S


def _price_filters(query: Mapping[str, str]) -> Iterable[Keep]:
    """Limits in USD per million tokens, which as nanos are the very unit of our prices."""
    limits = {name: _usd(query, name) for name in ("min_price", "max_price", "min_output_price", "max_output_price")}
    if (least := limits["min_price"]) is not None:
        yield lambda listed: listed.prompt >= least
    if (most := limits["max_price"]) is not None:
        yield lambda listed: listed.prompt <= most
    if (least_out := limits["min_output_price"]) is not None:
        yield lambda listed: listed.completion >= least_out
    if (most_out := limits["max_output_price"]) is not None:
        yield lambda listed: listed.completion <= most_out


def _page(request: web.Request, found: list[_Listed]) -> web.Response:
    """All rows, or one page when the caller asks for pages."""
    offset = _whole(request.query, "offset", 0, OFFSET_MAX)
    limit = _whole(request.query, "limit", 1, LIMIT_MAX)
    shown, following = found, None
    if offset is not None or limit is not None:
        offset, limit = offset or 0, limit or LIMIT_DEFAULT
        shown = found[offset : offset + limit]
        if offset + limit < len(found):
            following = f"{request.path}?{urlencode({**request.query, 'offset': offset + limit, 'limit': limit})}"
    return answer({"data": [listed.row for listed in shown], "total_count": len(found), "links": {"next": following}})


def _words(text: str) -> frozenset[str]:
    return frozenset(word.strip() for word in text.split(",") if word.strip())


def _whole(query: Mapping[str, str], name: str, least: int, most: int) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 15 and least <= int(text) <= most):
        raise BadRequest(f"{name} must be a whole number from {least} to {most}")
    return int(text)


def _usd(query: Mapping[str, str], name: str) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    try:
        return parse_usd(text)
    except ValueError as error:
        raise BadRequest(f"{name}: {error}") from None
