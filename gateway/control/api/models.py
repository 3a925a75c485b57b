"""The public catalog: /models, /models/count, one model, its endpoints, the providers. Readable without a key.

OpenAI's clients ask for one model at `/models/<name>`, its slash escaped or not, where OpenRouter has nothing: they get the row
with OpenAI's own members beside it, and no `data` around it.

Rows are rendered once per catalog, and once per set of rules that accounts have; a request only picks among them. Filters by
what no catalog says (category, benchmarks) are ignored as unknown parameters are, and orders by them leave the catalog's own order.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from urllib.parse import urlencode

import msgspec
import orjson
from aiohttp import web
from msgspec import UNSET

from gateway.control.api.http import answer
from gateway.control.api.model_orders import ModelOrders
from gateway.control.api.model_rows import (
    cheapest,
    endpoint_row,
    model_endpoints_row,
    model_row,
    provider_row,
    retains_nothing,
    supported_parameters,
)
from gateway.control.api.models_feed import CONTENT_TYPE, feed
from gateway.control.api.models_query import CountQuery, ModelsQuery, words
from gateway.control.api.route import Call, Nothing, Route
from gateway.control.catalog_source import CatalogSource
from gateway.control.store.management import ModelUse
from gateway.domain.catalog import Catalog, Model, Provider
from gateway.domain.errors import BadRequest, NotFound
from gateway.domain.money import parse_usd
from gateway.domain.rules import AccountRules
from gateway.routing.filters import allowed_endpoints
from gateway.routing.fleet import UNSEEN, Shown

LIMIT_DEFAULT = 500
DAY_S = 86_400
RULES_MAX = 32  # sets of rules whose rows are kept
DYNAMIC_VARIANTS = (":nitro", ":floor", ":exacto")  # name a way of routing, not a model of their own


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
    """Handlers over the catalog in force. `rules` are those of an account, by its id; `now` is unix time; `public_url` is where
    pages are, "" where nobody knows; `shown` says what is known of an endpoint, by its id; `used` what was asked of each model from a
    UTC day on.
    """

    def __init__(
        self,
        *,
        catalogs: CatalogSource,
        rules: Callable[[str], Awaitable[AccountRules]],
        public_url: str = "",
        shown: Callable[[str], Shown] = lambda endpoint_id: UNSEEN,
        used: Callable[[str], Awaitable[Mapping[str, ModelUse]]],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._catalogs = catalogs
        self._rules = rules
        self._public_url = public_url.rstrip("/")
        self._shown = shown
        self._now = now
        self._orders = ModelOrders(shown=shown, used=used, now=now)
        self._listed: list[_Listed] = []
        self._listed_by_rules: dict[AccountRules, list[_Listed]] = {}
        self._listed_of: Catalog | None = None

    def routes(self) -> list[Route]:
        return [
            Route(
                method="GET", path="/models", access="public", handler=self.list_models, query=ModelsQuery,
                also=(CONTENT_TYPE,),
                summary="All models with prices; offset and limit page",
            ),
            Route(
                method="GET", path="/models/user", access="either", handler=self.list_models_of_account, query=ModelsQuery,
                summary="The models that the account may use",
            ),
            Route(
                method="GET", path="/models/count", access="public", handler=self.count_models, query=CountQuery, summary="How many models",
            ),
            Route(
                method="GET", path="/embeddings/models", access="public", handler=self.list_embedding_models, query=ModelsQuery,
                summary="All embedding models",
            ),
            Route(method="GET", path="/model/{author}/{slug}", access="public", handler=self.get_model, summary="One model"),
            *(
                Route(method="GET", path=path, access="public", handler=self.retrieve_model, summary="One model, for OpenAI's clients")
                for path in ("/models/{model}", "/models/{author}/{slug}")
            ),
            Route(
                method="GET", path="/models/{author}/{slug}/endpoints", access="public", handler=self.list_endpoints,
                summary="A model's endpoints",
            ),
            Route(
                method="GET", path="/endpoints/zdr", access="public", handler=self.list_zdr_endpoints,
                summary="Endpoints of providers that retain no prompt",
            ),
            Route(method="GET", path="/providers", access="public", handler=self.list_providers, summary="Providers and their policies"),
        ]  # fmt: skip

    async def list_models(self, call: Call[ModelsQuery, Nothing]) -> web.Response:
        found = await self._sorted(call.query, self._matching(call.query))
        if "true" in (call.query.use_rss, call.query.use_rss_chat_links):
            models = [listed.model for listed in found]
            text = feed(models, public_url=self._public_url, to_chat=call.query.use_rss_chat_links == "true")
            return web.Response(body=text, content_type=CONTENT_TYPE)
        return _page(call, call.query, found)

    async def list_models_of_account(self, call: Call[ModelsQuery, Nothing]) -> web.Response:
        """A model whose every endpoint is against the account's rules is not there; the others at the price of what is left."""
        rules = await self._rules(call.caller.account_id)
        return _page(call, call.query, await self._sorted(call.query, self._matching(call.query, self._rows_within(rules))))

    async def list_embedding_models(self, call: Call[ModelsQuery, Nothing]) -> web.Response:
        found = self._matching(msgspec.structs.replace(call.query, output_modalities="embeddings"))
        return _page(call, call.query, await self._sorted(call.query, found))

    async def count_models(self, call: Call[CountQuery, Nothing]) -> web.Response:
        return answer({"data": {"count": len(self._matching(ModelsQuery(output_modalities=call.query.output_modalities)))}})

    async def get_model(self, call: Call[Nothing, Nothing]) -> web.Response:
        return answer({"data": model_row(self._named(call.request))})

    async def retrieve_model(self, call: Call[Nothing, Nothing]) -> web.Response:
        model = self._named(call.request)
        return answer({**model_row(model), "object": "model", "owned_by": model.id.partition("/")[0]})

    async def list_endpoints(self, call: Call[Nothing, Nothing]) -> web.Response:
        return answer({"data": model_endpoints_row(self._named(call.request), self._catalogs.catalog, self._shown)})

    async def list_zdr_endpoints(self, call: Call[Nothing, Nothing]) -> web.Response:
        catalog = self._catalogs.catalog
        rows = []
        for model in catalog.models.values():
            for endpoint in model.endpoints:
                provider = catalog.providers[endpoint.provider]
                if retains_nothing(provider):
                    rows.append(endpoint_row(model, endpoint, provider, self._shown(endpoint.id)))
        return answer({"data": rows})

    async def list_providers(self, call: Call[Nothing, Nothing]) -> web.Response:
        return answer({"data": [provider_row(provider) for provider in self._catalogs.catalog.providers.values()]})

    def _named(self, request: web.Request) -> Model:
        parts = request.match_info
        name = parts["model"] if "model" in parts else f"{parts['author']}/{parts['slug']}"
        catalog = self._catalogs.catalog
        model = catalog.find(name)
        while model is None and name.endswith(DYNAMIC_VARIANTS):
            name = name.rpartition(":")[0]
            model = catalog.find(name)
        if model is None or not model.endpoints:
            raise NotFound("Model not found")
        return model

    def _matching(self, query: ModelsQuery, rows: Iterable[_Listed] | None = None) -> list[_Listed]:
        keeps = [*_filters(query), *_age_filters(query, int(self._now())), *_price_filters(query)]
        return [listed for listed in (self._rows() if rows is None else rows) if all(keep(listed) for keep in keeps)]

    async def _sorted(self, query: ModelsQuery, found: list[_Listed]) -> list[_Listed]:
        if (order := _ORDERS.get(query.sort)) is not None:
            found.sort(key=order)
        elif (by_use := await self._orders.of(query.sort, self._catalogs.catalog.models.values())) is not None:
            found.sort(key=lambda listed: by_use(listed.model))
        return found

    def _rows(self) -> list[_Listed]:
        catalog = self._catalogs.catalog
        if self._listed_of is not catalog:
            self._listed = [_listed(model, catalog.providers) for model in catalog.models.values() if model.endpoints]
            self._listed_of = catalog
            self._listed_by_rules.clear()
        return self._listed

    def _rows_within(self, rules: AccountRules) -> list[_Listed]:
        everything = self._rows()
        found = self._listed_by_rules.get(rules)
        if found is None:
            if len(self._listed_by_rules) >= RULES_MAX:
                self._listed_by_rules.clear()
            providers = self._catalogs.catalog.providers
            found = self._listed_by_rules[rules] = [
                kept for listed in everything if (kept := _within(listed, rules, providers)) is not None
            ]
        return found


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


def _within(listed: _Listed, rules: AccountRules, providers: Mapping[str, Provider]) -> _Listed | None:
    """None: no endpoint of it is left."""
    endpoints = allowed_endpoints(listed.model, providers, rules)
    if len(endpoints) == len(listed.model.endpoints):
        return listed
    return _listed(msgspec.structs.replace(listed.model, endpoints=endpoints), providers) if endpoints else None


_ORDERS: dict[str, Callable[[_Listed], int]] = {
    "pricing-low-to-high": lambda listed: listed.prompt + listed.completion,
    "pricing-high-to-low": lambda listed: -(listed.prompt + listed.completion),
    "context-high-to-low": lambda listed: -(listed.model.context_length or 0),
    "newest": lambda listed: -listed.model.created,
}


def _filters(query: ModelsQuery) -> list[Keep]:
    """One test for each filter that is given. Unknown parameters are ignored, as everywhere in the contract."""
    outputs = words(query.output_modalities)
    keeps: list[Keep] = []
    if "all" not in outputs:
        keeps.append(lambda listed: not outputs.isdisjoint(listed.model.output_modalities))
    if inputs := words(query.input_modalities):
        keeps.append(lambda listed: inputs.issubset(listed.model.input_modalities))
    if parameters := words(query.supported_parameters):
        keeps.append(lambda listed: parameters <= listed.parameters)
    if authors := words(query.model_authors):
        keeps.append(lambda listed: listed.model.id.partition("/")[0] in authors)
    if providers := words(query.providers.lower()):
        keeps.append(lambda listed: not providers.isdisjoint(listed.providers))
    if family := query.arch.strip().lower():
        keeps.append(lambda listed: listed.model.tokenizer.lower() == family)
    if query.distillable is not UNSET:
        keeps.append(lambda listed: listed.model.distillable == (query.distillable == "true"))
    if query.zdr == "true":
        keeps.append(lambda listed: listed.zdr)
    if (region := query.region) is not UNSET:
        # An endpoint's region is the provider's own word, such as europe-west1 or us-east-2.
        keeps.append(lambda listed: any((endpoint.region or "").lower().startswith(region) for endpoint in listed.model.endpoints))
    if sought := query.q.strip().lower():
        keeps.append(lambda listed: sought in listed.model.id.lower() or sought in listed.model.name.lower())
    if (context := query.context) is not UNSET:
        keeps.append(lambda listed: (listed.model.context_length or 0) >= context)
    return keeps


def _age_filters(query: ModelsQuery, now_s: int) -> Iterable[Keep]:
    """A model whose `created` is unknown (0) is as old as can be."""
    if (least := query.min_age_days) is not UNSET:
        yield lambda listed: listed.model.created <= now_s - least * DAY_S
    if (most := query.max_age_days) is not UNSET:
        yield lambda listed: listed.model.created >= now_s - most * DAY_S


def _price_filters(query: ModelsQuery) -> Iterable[Keep]:
    """Limits in USD per million tokens, which as nanos are the very unit of our prices."""
    if (least := _usd("min_price", query.min_price)) is not None:
        yield lambda listed: listed.prompt >= least
    if (most := _usd("max_price", query.max_price)) is not None:
        yield lambda listed: listed.prompt <= most
    if (least_out := _usd("min_output_price", query.min_output_price)) is not None:
        yield lambda listed: listed.completion >= least_out
    if (most_out := _usd("max_output_price", query.max_output_price)) is not None:
        yield lambda listed: listed.completion <= most_out


def _page(call: Call[ModelsQuery, Nothing], query: ModelsQuery, found: list[_Listed]) -> web.Response:
    """All rows, or one page when the caller asks for pages."""
    shown, following = found, None
    if query.offset is not UNSET or query.limit is not UNSET:
        offset = query.offset if query.offset is not UNSET else 0
        limit = query.limit if query.limit is not UNSET else LIMIT_DEFAULT
        shown = found[offset : offset + limit]
        if offset + limit < len(found):
            following = f"{call.request.path}?{urlencode({**call.request.query, 'offset': offset + limit, 'limit': limit})}"
    return answer({"data": [listed.row for listed in shown], "total_count": len(found), "links": {"next": following}})


def _usd(name: str, text: str | msgspec.UnsetType) -> int | None:
    if text is UNSET:
        return None
    try:
        return parse_usd(text)
    except ValueError as error:
        raise BadRequest(f"{name}: {error}") from None
