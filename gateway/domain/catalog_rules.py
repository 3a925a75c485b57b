"""From catalog documents to a Catalog: every rule of the file format, and every problem found. Pure: opens nothing.

Strict on purpose: a typo in a price file must not become a free model or a silent default.
"""

from __future__ import annotations

import datetime
import hashlib
import os.path
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from gateway.domain.catalog import Catalog, DataPolicy, Endpoint, Model, PhaseTimeouts, Prefill, Provider, Reasoning
from gateway.domain.catalog_prices import read_price
from gateway.domain.document import Findings, Place, http_url_fault, read, unknown_keys

DYNAMIC_VARIANTS = ("nitro", "floor", "exacto", "online")  # change how any model is routed, so no model may be called so
# Source: contract 3.3, the vocabulary of models and endpoints; others pass, with a warning.
# fmt: off
PARAMETERS = frozenset(
    {
        "temperature", "top_p", "top_k", "min_p", "top_a", "frequency_penalty", "presence_penalty", "repetition_penalty", "max_tokens",
        "max_completion_tokens", "logit_bias", "logprobs", "top_logprobs", "prediction", "seed", "response_format",
        "structured_outputs", "stop", "tools", "tool_choice", "parallel_tool_calls", "include_reasoning", "reasoning",
        "reasoning_effort", "web_search_options", "verbosity"
    }
)
# fmt: on
DEFAULT_PARAMETERS = ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "repetition_penalty")
HEADERS_OF_OURS = frozenset(
    {"authorization", "host", "content-length", "transfer-encoding", "connection", "content-type", "accept-encoding"}
)

_NAME = r"[a-z0-9][a-z0-9._-]*"
_SMALL = "small letters, digits, . _ -"
Slug = Annotated[str, Meta(pattern=rf"^{_NAME}\Z", max_length=64, description=f"a slug: {_SMALL}")]
ModelId = Annotated[
    str, Meta(pattern=rf"^{_NAME}/{_NAME}(:{_NAME})?\Z", max_length=200, description=f"author/name or author/name:variant: {_SMALL}")
]
Tag = Annotated[str, Meta(pattern=rf"^{_NAME}(/{_NAME})*\Z", max_length=128, description=f"a tag: slug or slug/suffix: {_SMALL}")]
Line = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]+\Z", max_length=500, description="a line of text, not empty")]
Country = Annotated[str, Meta(pattern=r"^[A-Z]{2}\Z", description="a country code of two capitals")]
Day = Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\d\Z", description="a date such as 2026-01-31")]
Tokens = Annotated[int, Meta(ge=1, le=10**9)]
Modality = Literal["text", "image", "file", "audio", "video"]
OutputModality = Literal["text", "image", "audio", "video", "embeddings"]
Quantization = Literal["int4", "int8", "fp4", "mxfp4", "nvfp4", "fp6", "fp8", "mxfp8", "fp16", "bf16", "fp32", "unknown"]


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """One parsed file. `file` names it in problems; relative `api_key_file` paths are taken from its folder."""

    file: str
    table: dict[str, Any]


class ProviderTable(msgspec.Struct, frozen=True, kw_only=True):
    slug: Slug
    base_url: str
    name: Line | None = None
    api_key_env: Annotated[str, Meta(pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?\Z", description="the name of an environment variable")] = ""
    api_key_file: str = ""
    dialect: Literal["openai", "mistral"] = "openai"
    data: DataPolicy | None = None
    headers: dict[str, str] = {}
    privacy_policy_url: str | None = None
    terms_of_service_url: str | None = None
    status_page_url: str | None = None
    headquarters: Country | None = None
    datacenters: tuple[Country, ...] = ()


class TimeoutsTable(msgspec.Struct, frozen=True, kw_only=True):
    connect_s: Annotated[float, Meta(gt=0)] | None = None
    headers_s: Annotated[float, Meta(gt=0)] | None = None
    first_token_s: Annotated[float, Meta(gt=0)] | None = None
    idle_s: Annotated[float, Meta(gt=0)] | None = None
    total_s: Annotated[float, Meta(gt=0)] | None = None


class EndpointTable(msgspec.Struct, frozen=True, kw_only=True):
    provider: str
    upstream_model: Line
    pricing: dict[str, Any]
    tag: Tag | None = None  # default: the provider's slug
    region: Line | None = None
    quantization: Quantization | None = None
    context_length: Tokens | None = None  # these three: default as the model's
    max_completion_tokens: Tokens | None = None
    supported_parameters: tuple[Line, ...] | None = None
    max_prompt_tokens: Tokens | None = None
    supports_implicit_caching: bool = False
    prefill: bool | Prefill = False
    timeouts: TimeoutsTable = TimeoutsTable()


class ModelTable(msgspec.Struct, frozen=True, kw_only=True):
    id: ModelId
    endpoints: Annotated[tuple[EndpointTable, ...], Meta(min_length=1)]
    name: Line | None = None
    canonical_slug: ModelId | None = None
    created: Annotated[int, Meta(ge=0, le=10**11)] | datetime.date = 0  # unix seconds, or a date at 00:00 UTC
    description: str = ""
    context_length: Tokens | None = None  # None: not known
    max_completion_tokens: Tokens | None = None
    input_modalities: Annotated[tuple[Modality, ...], Meta(min_length=1)] = ("text",)
    output_modalities: Annotated[tuple[OutputModality, ...], Meta(min_length=1)] = ("text",)
    supported_parameters: tuple[Line, ...] = ()
    default_parameters: dict[str, Annotated[float, Meta(ge=-(10**6), le=10**6)]] = {}
    tokenizer: Line = "Other"
    instruct_type: str | None = None
    hugging_face_id: str | None = None
    knowledge_cutoff: Day | datetime.date | None = None
    moderated: bool = False
    distillable: bool = False
    reasoning: Reasoning | None = None


def compile_catalog(documents: Sequence[Document], findings: Findings) -> tuple[Catalog | None, dict[str, Place]]:
    """The catalog of all documents together, and where each provider is written. None if any document has an error."""
    before = len(findings.errors)
    for document in documents:
        unknown_keys(document.table, ("providers", "models"), Place(document.file), findings)
    places: dict[str, Place] = {}
    providers: dict[str, Provider] = {}
    for table, place in _entries(documents, "providers", findings):
        if (provider := _provider(table, place, findings)) is not None and _first(provider.slug, places, place.at("slug"), place, findings):
            providers[provider.slug] = provider
    slugs = _slugs(documents)
    models: dict[str, Model] = {}
    named: dict[str, Place] = {}
    for table, place in _entries(documents, "models", findings):
        if (model := _model(table, place, slugs, findings)) is None:
            continue
        if not _first(model.id, named, place.at("id"), place, findings):
            continue
        if model.canonical_slug != model.id and not _first(model.canonical_slug, named, place.at("canonical_slug"), place, findings):
            continue
        models[model.id] = model
    if len(findings.errors) > before:
        return None, places
    if not models:
        findings.warn(Place(documents[0].file if documents else "catalog", "models"), "no model: nothing can be served")
    aliases = {model.canonical_slug: model.id for model in models.values() if model.canonical_slug != model.id}
    catalog = Catalog(revision="", providers=providers, models=models, aliases=aliases)
    return msgspec.structs.replace(catalog, revision=digest(catalog)), places


def digest(catalog: Catalog) -> str:
    """Lowercase hex SHA-256 of everything in the catalog but its revision; the order of tables does not matter."""
    plain = msgspec.structs.replace(catalog, revision="")
    return hashlib.sha256(msgspec.msgpack.encode(plain, order="deterministic")).hexdigest()


def _entries(documents: Sequence[Document], key: str, findings: Findings) -> Iterator[tuple[object, Place]]:
    for document in documents:
        tables = document.table.get(key, [])
        place = Place(document.file, key)
        if not isinstance(tables, list):
            findings.error(place, f"expected a list of tables: write [[{key}]]")
            continue
        yield from ((table, place.at(i)) for i, table in enumerate(tables))


def _slugs(documents: Sequence[Document]) -> set[str]:
    """Slugs of all providers, also of faulty ones, so that one mistake is not told again at each of its endpoints."""
    tables = (table for table, _ in _entries(documents, "providers", Findings()) if isinstance(table, dict))
    return {slug for table in tables if isinstance(slug := table.get("slug"), str)}


def _first(name: str, seen: dict[str, Place], place: Place, owner: Place, findings: Findings) -> bool:
    """Claims a name for its owner, or reports who has it."""
    if name in seen:
        findings.error(place, f"{name} is used twice; the other is at {seen[name]}")
        return False
    seen[name] = owner
    return True


def _provider(table: object, place: Place, findings: Findings) -> Provider | None:
    before = len(findings.errors)
    written = read(ProviderTable, table, place, findings)
    if written is None:
        return None
    if written.base_url is not None and (fault := http_url_fault(written.base_url)):
        findings.error(place.at("base_url"), fault)
    for key in ("privacy_policy_url", "terms_of_service_url", "status_page_url"):
        if (url := getattr(written, key)) is not None and not re.fullmatch(r"https?://[!-~]+", url):
            findings.error(place.at(key), "not an http(s) URL")
    if written.api_key_env and written.api_key_file:
        findings.error(place.at("api_key_file"), "give api_key_env or api_key_file, not both")
    _check_headers(written.headers, place.at("headers"), findings)
    if written.data is None:
        findings.warn(
            place.at("data"), f"{written.slug} has no data policy: taken as unconfirmed, routed only where the account allows training"
        )
    elif written.data.zdr and written.data.retains:
        findings.error(place.at("data").at("zdr"), "zero data retention and retains contradict each other")
    if len(findings.errors) > before:
        return None
    fields = msgspec.structs.asdict(written) | {
        "name": written.name or written.slug,
        "base_url": written.base_url.rstrip("/"),
        "api_key_file": _beside(place.file, written.api_key_file),
    }
    return Provider(**fields)


def _beside(file: str, path: str) -> str:
    return path and os.path.normpath(os.path.join(os.path.dirname(file), path))  # noqa: PTH118, PTH120 (text only, no disk)


def _check_headers(headers: dict[str, str], place: Place, findings: Findings) -> None:
    for name, value in headers.items():
        if not isinstance(value, str):
            continue  # told already
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
            findings.error(place.at(name), "not a header name")
        elif name.lower() in HEADERS_OF_OURS:
            findings.error(place.at(name), "is set by the gateway and cannot be overridden")
        if not re.fullmatch(r"[\t -~]*", value):
            findings.error(place.at(name), "control or non-ASCII characters in the value")


def _model(table: object, place: Place, slugs: set[str], findings: Findings) -> Model | None:
    before = len(findings.errors)
    written = read(ModelTable, table, place, findings)
    if written is None:
        return None
    for key in ("id", "canonical_slug"):
        _, _, variant = (getattr(written, key) or "").partition(":")
        if variant in DYNAMIC_VARIANTS:
            findings.error(place.at(key), f":{variant} changes the routing of any model and cannot be part of a name")
    _check_parameters(written.supported_parameters, place, findings)
    unknown_keys(written.default_parameters, DEFAULT_PARAMETERS, place.at("default_parameters"), findings)
    endpoints: list[Endpoint] = []
    tags: dict[str, Place] = {}
    for i, endpoint_table in enumerate(written.endpoints or ()):
        where = place.at("endpoints").at(i)
        endpoint = _endpoint(endpoint_table, written, where, slugs, findings)
        if endpoint is not None and _first(endpoint.tag, tags, where.at("tag"), where, findings):
            endpoints.append(endpoint)
    if len(findings.errors) > before:
        return None
    fields = msgspec.structs.asdict(written) | {
        "name": written.name or written.id,
        "canonical_slug": written.canonical_slug or written.id,
        "created": _unix_seconds(written.created),
        "knowledge_cutoff": str(written.knowledge_cutoff) if written.knowledge_cutoff else None,
        "endpoints": tuple(endpoints),
    }
    return Model(**fields)


def _endpoint(table: EndpointTable, model: ModelTable, place: Place, slugs: set[str], findings: Findings) -> Endpoint | None:
    before = len(findings.errors)
    if table.provider is not None and table.provider not in slugs:
        findings.error(place.at("provider"), "no provider of this slug in the catalog")
    tag = table.tag or table.provider
    if tag != table.provider and not tag.startswith(f"{table.provider}/"):
        findings.error(place.at("tag"), f"must be {table.provider} or begin with {table.provider}/")
    _check_parameters(table.supported_parameters or (), place, findings)
    price = read_price(table.pricing, place.at("pricing"), findings) if table.pricing is not None else None
    if price is None or len(findings.errors) > before:
        return None
    if not (table.context_length or model.context_length or table.max_completion_tokens or model.max_completion_tokens or price.is_zero):
        findings.warn(
            place.at("max_completion_tokens"),
            "with no context_length either, nobody knows what a request costs at most: credit is held bit by bit as it runs",
        )
    supported = model.supported_parameters if table.supported_parameters is None else table.supported_parameters
    fields = msgspec.structs.asdict(table) | {
        "id": f"{model.id}@{tag}",
        "model_id": model.id,
        "tag": tag,
        "price": price,
        "context_length": table.context_length or model.context_length,
        "max_completion_tokens": table.max_completion_tokens or model.max_completion_tokens,
        "supported_parameters": supported,
        "prefill": ("assistant" if table.prefill else "") if isinstance(table.prefill, bool) else table.prefill,
        "timeouts": PhaseTimeouts(**msgspec.structs.asdict(table.timeouts)),
    }
    del fields["pricing"]
    return Endpoint(**fields)


def _check_parameters(parameters: Sequence[str], place: Place, findings: Findings) -> None:
    for i, parameter in enumerate(parameters):
        if parameter not in PARAMETERS:
            findings.warn(place.at("supported_parameters").at(i), f"{parameter} is not in the vocabulary; clients will not look for it")


def _unix_seconds(created: int | datetime.date) -> int:
    if isinstance(created, int):
        return created
    return int(datetime.datetime(created.year, created.month, created.day, tzinfo=datetime.UTC).timestamp())
