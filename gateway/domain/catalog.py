"""The catalog: providers, models, endpoints and their prices, as immutable snapshots.

An endpoint is one model at one provider, with its price: what routing chooses. Nothing here reads a file;
`gateway.config.read_catalog` does, and `gateway.domain.catalog_rules` turns documents into this.
"""

from __future__ import annotations

from typing import Literal

import msgspec

CONTEXT_MOST = 10_000_000  # tokens; the longest context that any model has, read 2026-11


class DataPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a provider does with prompts. An absent policy is unconfirmed and treated as the worst."""

    trains: bool
    retains: bool
    zdr: bool = False  # zero data retention
    publishes: bool = False  # prompts may become public


class Provider(msgspec.Struct, frozen=True, kw_only=True):
    """Who runs models, and how to reach them. Holds the name of a secret's place, never the secret."""

    slug: str
    name: str
    base_url: str  # http(s)://host[:port]/path, no trailing slash, no query, no userinfo
    api_key_env: str = ""
    api_key_file: str = ""  # absolute path
    dialect: str = "openai"
    data: DataPolicy | None = None
    headers: dict[str, str] = {}  # sent with every call to this provider
    privacy_policy_url: str | None = None
    terms_of_service_url: str | None = None
    status_page_url: str | None = None
    headquarters: str | None = None  # ISO country
    datacenters: tuple[str, ...] = ()


class PriceOverride(msgspec.Struct, frozen=True, kw_only=True):
    """Replaces prices when every given condition holds; later matches win, kind by kind."""

    min_prompt_tokens: int | None = None  # strictly greater than
    utc_start: int | None = None  # HHMM, half-open with utc_end, may wrap
    utc_end: int | None = None
    utc_days: tuple[int, ...] | None = None  # 0 = Sunday
    prices: dict[str, int] = {}  # kind -> nanos per million units


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """Nanos (1e-9 USD) per million tokens, requests, images or searches. None: the kind is not priced apart."""

    prompt: int
    completion: int
    request: int = 0
    image: int = 0
    web_search: int = 0
    internal_reasoning: int = 0  # on top of completion
    input_cache_read: int | None = None  # None: as prompt
    input_cache_write: int | None = None
    discount_millionths: int = 0  # 10_000 = 1 % off
    overrides: tuple[PriceOverride, ...] = ()

    @property
    def is_zero(self) -> bool:
        """Whether nothing is ever owed, whatever is used and when."""
        kinds = (self.prompt, self.completion, self.request, self.image, self.web_search, self.internal_reasoning)
        apart = (self.input_cache_read, self.input_cache_write)
        return not (any(kinds) or any(apart) or any(any(each.prices.values()) for each in self.overrides))


class PhaseTimeouts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds; None: the gateway's setting."""

    connect_s: float | None = None
    headers_s: float | None = None
    first_token_s: float | None = None
    idle_s: float | None = None
    total_s: float | None = None


# How an endpoint is told to go on with an answer begun elsewhere ("": it cannot).
Prefill = Literal["", "assistant", "deepseek", "mistral", "moonshot", "vllm"]


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One model at one provider."""

    id: str  # "<model id>@<tag>": unique in the catalog
    model_id: str
    provider: str  # provider slug
    tag: str  # provider slug, or slug/suffix
    upstream_model: str
    price: Price
    context_length: int | None = None  # None: its provider does not say
    max_completion_tokens: int | None = None
    max_prompt_tokens: int | None = None
    region: str | None = None
    quantization: str | None = None
    supported_parameters: tuple[str, ...] = ()
    supports_implicit_caching: bool = False
    prefill: Prefill = ""
    timeouts: PhaseTimeouts = PhaseTimeouts()

    @property
    def room(self) -> int:
        """The tokens that fit, prompt and answer together; where nobody says, more than fit in any model."""
        return self.context_length or CONTEXT_MOST

    def __repr__(self) -> str:
        return f"<Endpoint {self.id}>"


class Reasoning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a reasoning model may be steered. Source: models API, read 2026-11."""

    mandatory: bool = False
    default_enabled: bool | None = None
    default_effort: str | None = None
    supported_efforts: tuple[str, ...] | None = None
    supports_max_tokens: bool | None = None


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model as callers name it, with its endpoints in file order."""

    id: str  # "author/name" or "author/name:variant"
    canonical_slug: str
    name: str
    endpoints: tuple[Endpoint, ...]
    created: int = 0  # unix seconds
    description: str = ""
    context_length: int | None = None
    max_completion_tokens: int | None = None
    input_modalities: tuple[str, ...] = ("text",)
    output_modalities: tuple[str, ...] = ("text",)
    supported_parameters: tuple[str, ...] = ()
    default_parameters: dict[str, float] = {}
    tokenizer: str = "Other"
    instruct_type: str | None = None
    hugging_face_id: str | None = None
    knowledge_cutoff: str | None = None  # YYYY-MM-DD
    moderated: bool = False
    distillable: bool = False  # its author permits training on its answers
    reasoning: Reasoning | None = None


class Catalog(msgspec.Struct, frozen=True, kw_only=True):
    """Everything routable, swapped whole. `models` is keyed by id; canonical slugs resolve through `aliases`."""

    revision: str  # content digest: equal catalogs have equal revisions
    providers: dict[str, Provider]
    models: dict[str, Model]
    aliases: dict[str, str] = {}  # canonical slug -> id

    def find(self, name: str) -> Model | None:
        """The model of exactly this name: an id or a canonical slug. No case folding, no trimming."""
        model = self.models.get(name)
        if model is None and (alias := self.aliases.get(name)) is not None:
            model = self.models.get(alias)
        return model
