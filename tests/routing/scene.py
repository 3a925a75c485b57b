"""A small catalog, a router over it, and calls to its endpoints in virtual time."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from gateway.domain.catalog import Catalog, DataPolicy, Endpoint, Model, Price, Provider
from gateway.domain.rules import NO_RULES, AccountRules
from gateway.routing.router import Router
from gateway.settings import Routing

USD_PER_MTOK = 10**9
DECLARED = DataPolicy(trains=False, retains=True)  # of providers about which a test says nothing


class Pick(msgspec.Struct, frozen=True):
    model: Model
    endpoint: Endpoint


def endpoint(tag: str, usd: float = 1.0, *, model: str = "acme/large", context: int = 8192, **fields: Any) -> Endpoint:
    price = fields.pop("price", None) or Price(prompt=int(usd * USD_PER_MTOK), completion=int(usd * USD_PER_MTOK))
    return Endpoint(
        id=f"{model}@{tag}",
        model_id=model,
        provider=tag.partition("/")[0],
        tag=tag,
        upstream_model="m",
        price=price,
        context_length=context,
        **fields,
    )


def model_of(endpoints: Sequence[Endpoint], **fields: Any) -> Model:
    name = endpoints[0].model_id
    return Model(id=name, canonical_slug=name, name=name, endpoints=tuple(endpoints), context_length=8192, **fields)


class Scene:
    """Models with endpoints, and one virtual clock."""

    def __init__(
        self,
        *models: Model,
        data: Mapping[str, DataPolicy | None] | None = None,
        rules: AccountRules = NO_RULES,
        seed: int = 1,
        **settings: Any,
    ) -> None:
        """`rules` are those of the account that asks, where a test names no others."""
        self.now_s = 1000.0
        self.random = random.Random(seed)
        self.router: Router[Pick] = Router(Routing(**settings), site="https://llm.example")
        self.data = data or {}
        self.rules = rules
        self.show(*models)

    def show(self, *models: Model, without: Sequence[str] = ()) -> None:
        """Bring this catalog; endpoints in `without` are out of service."""
        slugs = {each.provider for model in models for each in model.endpoints}
        providers = {
            slug: Provider(slug=slug, name=slug.title(), base_url="http://x", data=self.data.get(slug, DECLARED)) for slug in slugs
        }
        catalog = Catalog(revision="1", providers=providers, models={model.id: model for model in models})
        choices = {model.id: [Pick(model, each) for each in model.endpoints if each.id not in without] for model in models}
        self.models = {model.id: model for model in models}
        self.router.replace(catalog, choices)

    @property
    def model(self) -> Model:
        return next(iter(self.models.values()))

    def rank(self, **given: Any) -> list[str]:
        """Tags in the order to try."""
        order = self.router.rank(self.model, now_s=self.now_s, rng=self.random.random, **{"rules": self.rules, **given})
        return [pick.endpoint.tag for pick in order]

    def call(
        self, tag: str, first_s: float = 0.3, *, tokens: int = 50, gen_s: float = 1.0, wait: bool = False, prompt_tokens: int = 100
    ) -> None:
        """One good stream from this endpoint of the first model, told as it happens; the clock moves only if asked."""
        live = self.live(tag)
        attempt = live.begin(self.now_s, stream=True)
        live.first_content(attempt, self.now_s + first_s, prompt_tokens)
        live.succeeded(attempt, self.now_s + first_s + gen_s, tokens=tokens, gen_s=gen_s)
        if wait:
            self.now_s += first_s + gen_s

    def fail(self, tag: str, *, retry_after_s: float | None = None) -> None:
        live = self.live(tag)
        live.failed(live.begin(self.now_s, stream=True), self.now_s + 0.001, retry_after_s)

    def throttle(self, tag: str, retry_after_s: float | None = None) -> None:
        live = self.live(tag)
        live.throttled(live.begin(self.now_s, stream=True), self.now_s, retry_after_s)

    def live(self, tag: str) -> Any:
        return self.router.live(next(each for each in self.model.endpoints if each.tag == tag))

    def warm(self, speeds: dict[str, float], calls: int = 20) -> None:
        """Let every endpoint be known by its time to first token."""
        for _ in range(calls):
            for tag, first_s in speeds.items():
                self.call(tag, first_s)
            self.now_s += 0.1
        self.now_s += 1.0

    def shares(self, requests: int = 2000, per_s: float = 1000.0, **given: Any) -> dict[str, float]:
        """Who comes first, over so many requests."""
        first: dict[str, int] = {}
        for _ in range(requests):
            tag = self.rank(**given)[0]
            first[tag] = first.get(tag, 0) + 1
            self.now_s += 1 / per_s
        return {tag: count / requests for tag, count in first.items()}
