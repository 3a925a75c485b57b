"""Which endpoints a request may use: the account's rules, the caller's wishes, and what the request needs.

Filters only remove. The one that leaves nothing is named to the caller; a forbidden endpoint is never a fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from gateway.domain.catalog import Endpoint, Model, Provider
from gateway.domain.errors import NoEndpointMatches
from gateway.domain.rules import AccountRules
from gateway.routing.wishes import NO_WISHES, Wishes

TIERS = ("priority", "flex")  # service tiers cost more or wait longer: nobody gets them unasked
EVERYWHERE = frozenset({"stop", "max_tokens", "max_completion_tokens"})  # never a reason to refuse an endpoint under require_parameters


class Needs(msgspec.Struct, frozen=True, gc=False):
    """What a request needs of an endpoint."""

    prompt_tokens: int = 0  # a low estimate: where it is in doubt whether a prompt fits, the provider decides
    max_tokens: int | None = None
    parameters: frozenset[str] = frozenset()  # of the contract's vocabulary, as far as the body has them
    modalities: frozenset[str] = frozenset()  # of its input, beside text: "image", "file", "audio"
    forces_tool: bool = False  # tool_choice is neither "auto" nor "none"


NO_NEEDS = Needs()


class Traits(NamedTuple):
    """What filters look at, worked out once per catalog."""

    names: frozenset[str]  # by which callers may mean it, case folded; a provider's tiers only by their tag
    tag: str
    tier: str | None
    provider_name: str
    parameters: frozenset[str] | None  # None: nobody said, so nothing is refused
    modalities: frozenset[str]
    prices: dict[str, int]
    free: bool
    trains: bool  # or may
    retains: bool
    zdr: bool
    publishes: bool
    distillable: bool
    quantization: str
    prompt_max: int
    output_max: int
    caches: bool  # reading its prompt cache is cheaper than the prompt


def traits_of(model: Model, endpoint: Endpoint, provider: Provider) -> Traits:
    last = endpoint.tag.rpartition("/")[2]
    tier = last if "/" in endpoint.tag and last in TIERS else None
    names = {endpoint.tag.casefold()}
    if tier is None:
        names |= {endpoint.provider.casefold(), provider.name.casefold()}
    price, data = endpoint.price, provider.data
    parameters = endpoint.supported_parameters or model.supported_parameters
    return Traits(
        names=frozenset(names),
        tag=endpoint.tag,
        tier=tier,
        provider_name=provider.name,
        parameters=frozenset(parameters) if parameters else None,
        modalities=frozenset(model.input_modalities),
        prices={"prompt": price.prompt, "completion": price.completion, "request": price.request, "image": price.image},
        free=not (price.prompt or price.completion or price.request),
        trains=data is None or data.trains,
        retains=data is None or data.retains,
        zdr=data is not None and data.zdr,
        publishes=data is not None and data.publishes,
        distillable=model.distillable,
        quantization=endpoint.quantization or "unknown",
        prompt_max=min(endpoint.room, endpoint.max_prompt_tokens or endpoint.room),
        output_max=endpoint.max_completion_tokens or model.max_completion_tokens or endpoint.room,
        caches=price.input_cache_read is not None and price.input_cache_read < price.prompt,
    )


class Cause(NamedTuple):
    """Why nothing is left."""

    message: str  # may hold {model} and {site}
    code: str = "constraint_filtered"
    excluded_by: str | None = None
    field: str | None = None


Keeps = Callable[[Traits], bool]
Step = tuple[Keeps, Cause]

_NOT_ALLOWED = Cause("No allowed providers are available for the selected model.", excluded_by="allowed_providers", field="provider.only")
_POLICY = "No endpoints found matching your data policy ({kind}). Configure: {{site}}/settings/privacy"
_TRAINING = {
    free: Cause(_POLICY.format(kind=f"{'Free' if free else 'Paid'} model training"), "privacy_restricted", "data_policy:training")
    for free in (False, True)
}
_PUBLICATION = Cause(_POLICY.format(kind="Free model publication"), "privacy_restricted")
_ZDR = Cause(_POLICY.format(kind="Zero data retention"), "privacy_restricted", "data_policy:zdr")
_COLLECTION = Cause(_POLICY.format(kind="Data collection"), "privacy_restricted", "data_policy:training", "provider.data_collection")
_TOOLS = Cause("No endpoints found that support tool use. Choose a model with `tools` in its supported_parameters.", field="tools")
_TOOL_CHOICE = Cause(
    "No endpoints found that support the provided 'tool_choice' value. Use \"auto\", or another model.", field="tool_choice"
)
_PARAMETERS = Cause(
    "No endpoints found that can handle the requested parameters. Drop some, or provider.require_parameters.",
    excluded_by="require_parameters",
    field="provider.require_parameters",
)
_QUANTIZATION = Cause("No endpoints found with the requested quantizations.", excluded_by="quantization", field="provider.quantizations")
_PRICE = Cause("No endpoints found within provider.max_price. Raise it or drop it.", excluded_by="max_price", field="provider.max_price")
_DISTILLABLE = Cause("No endpoints found whose model may be distilled.", field="provider.enforce_distillable_text")
_TIER = Cause("No endpoints found for {model}.", "no_endpoints")


def rules_steps(account: AccountRules) -> list[Step]:
    """The filters that follow from an account alone."""
    steps: list[Step] = []
    if account.allowed:
        steps.append((_among(account.allowed), _NOT_ALLOWED))
    if account.ignored:
        steps.append((_not_among(account.ignored), _NOT_ALLOWED))
    if not account.train_paid:
        steps.append((lambda traits: traits.free or not traits.trains, _TRAINING[False]))
    if not account.train_free:
        steps.append((lambda traits: not traits.free or not traits.trains, _TRAINING[True]))
    if account.publish_free:
        steps.append((lambda traits: traits.free or not traits.publishes, _PUBLICATION))
    else:
        steps.append((lambda traits: not traits.publishes, _PUBLICATION))
    if account.zdr:
        steps.append((lambda traits: traits.zdr, _ZDR))
    return steps


def allowed_endpoints(model: Model, providers: Mapping[str, Provider], account: AccountRules) -> tuple[Endpoint, ...]:
    """Those of a model that an account's rules leave, in the model's order; maybe none."""
    steps = rules_steps(account)
    traits = [(endpoint, traits_of(model, endpoint, providers[endpoint.provider])) for endpoint in model.endpoints]
    return tuple(endpoint for endpoint, each in traits if all(keeps(each) for keeps, _ in steps))


def wishes_steps(wishes: Wishes, needs: Needs, tiers: Sequence[str] = ()) -> list[Step]:
    """The filters that follow from a caller's wishes. `tiers`: those that a variant opted into."""
    named = (*(wishes.only or ()), *(wishes.order or ()))
    opted = () if wishes.order else tiers
    tags = {slug.casefold() for slug in named if "/" in slug}
    steps: list[Step] = [(lambda traits: traits.tier is None or traits.tier in opted or traits.tag.casefold() in tags, _TIER)]
    if wishes is NO_WISHES:
        return steps
    if wishes.only:
        steps.append((_among(wishes.only), _NOT_ALLOWED))
    if wishes.ignore:
        steps.append((_not_among(wishes.ignore), _NOT_ALLOWED))
    if wishes.order and wishes.allow_fallbacks is False:
        steps.append((_among(wishes.order), _NOT_ALLOWED))
    if wishes.data_collection == "deny":
        steps.append((lambda traits: not (traits.trains or traits.retains), _COLLECTION))
    if wishes.zdr:
        steps.append((lambda traits: traits.zdr, _ZDR))
    if wishes.quantizations:
        wanted = frozenset(wishes.quantizations)
        steps.append((lambda traits: traits.quantization in wanted, _QUANTIZATION))
    if wishes.max_price is not None:
        limits = wishes.max_price.nanos()
        steps.append((lambda traits: all(traits.prices[kind] <= most for kind, most in limits.items()), _PRICE))
    if wishes.enforce_distillable_text:
        steps.append((lambda traits: traits.distillable, _DISTILLABLE))
    if wishes.require_parameters:
        required = needs.parameters - EVERYWHERE
        steps.append((lambda traits: traits.parameters is None or required <= traits.parameters, _PARAMETERS))
    return steps


def needs_steps(needs: Needs) -> list[Step]:
    """The filters that follow from the request's own content."""
    steps: list[Step] = []
    if "tools" in needs.parameters:
        steps.append((_supports("tools"), _TOOLS))
        if needs.forces_tool:
            steps.append((_supports("tool_choice"), _TOOL_CHOICE))
    for modality in sorted(needs.modalities):
        steps.append(
            (_takes(modality), Cause(f"No endpoints found that support {modality} input. Choose another model.", field="messages"))
        )
    if needs.prompt_tokens:
        message = f"No endpoints found with room for a prompt of about {needs.prompt_tokens} tokens. Shorten it, or choose another model."
        steps.append(
            (lambda traits: traits.prompt_max >= needs.prompt_tokens, Cause(message, excluded_by="context_length", field="messages"))
        )
    if (most := needs.max_tokens) is not None:
        message = f"No endpoints found that can make max_tokens {most}. Lower it or drop it."
        steps.append((lambda traits: traits.output_max >= most, Cause(message, field="max_tokens")))
    return steps


SOFT = ("response_format", "verbosity")  # kept to endpoints that have them if there are any


def in_turn(steps: Sequence[Step]) -> list[Step]:
    """Who is named first, what its policy is second: then a caller who named one provider learns what is wrong with it."""
    return sorted(steps, key=lambda step: step[1] not in (_NOT_ALLOWED, _TIER))


def narrow(traits: Sequence[Traits], mask: int, steps: Sequence[Step], *, model: str, site: str) -> int:
    """The endpoints of `mask` (bit 0 the first) that pass all steps. Raises NoEndpointMatches, naming the one that left nothing."""
    for keeps, cause in steps:
        left = 0
        for index, each in enumerate(traits):
            if mask >> index & 1 and keeps(each):
                left |= 1 << index
        if not left:
            raise refusal(cause, [each for index, each in enumerate(traits) if mask >> index & 1], model=model, site=site)
        mask = left
    return mask


def prefer(traits: Sequence[Traits], mask: int, needs: Needs) -> int:
    """Keep to endpoints that know the parameters of SOFT, where there are any."""
    for name in SOFT:
        if name in needs.parameters:
            supports = _supports(name)
            left = sum(1 << index for index, each in enumerate(traits) if mask >> index & 1 and supports(each))
            mask = left or mask
    return mask


def refusal(cause: Cause, affected: Sequence[Traits], *, model: str, site: str) -> NoEndpointMatches:
    """404 in the contract's words, with `error.availability`."""
    message = cause.message.format(model=model, site=site) if "{" in cause.message else cause.message
    availability: dict[str, Any] = {"code": cause.code, "retryable": False, "requested_models": [model]}
    if affected:
        availability["affected_providers"] = list(dict.fromkeys(each.provider_name for each in affected))
    if cause.excluded_by is not None:
        availability["excluded_by"] = [cause.excluded_by]
    if cause.field is not None:
        availability["constraint"] = {"field": cause.field, "detail": message}
    availability["docs_url"] = f"{site}/docs/routing"
    return NoEndpointMatches(message, availability=availability)


def no_endpoints(model: str, site: str, code: str = "no_endpoints") -> NoEndpointMatches:
    """404 for a model that has no endpoint, or whose free variant has gone."""
    return refusal(Cause("No endpoints found for {model}.", code), (), model=model, site=site)


def not_in_service(model: str, site: str) -> NoEndpointMatches:
    """404 for a model none of whose providers has its key here: no waiting helps, so nobody is asked to try again."""
    message = "No endpoints found for {model}: no provider of it is in service here. Whoever runs this gateway has to set its key."
    return refusal(Cause(message, "no_endpoints"), (), model=model, site=site)


def _among(slugs: Sequence[str]) -> Keeps:
    wanted = {slug.casefold() for slug in slugs}
    return lambda traits: not wanted.isdisjoint(traits.names)


def _not_among(slugs: Sequence[str]) -> Keeps:
    unwanted = {slug.casefold() for slug in slugs}
    return lambda traits: unwanted.isdisjoint(traits.names | {traits.tag.partition("/")[0].casefold()})


def _supports(parameter: str) -> Keeps:
    return lambda traits: traits.parameters is None or parameter in traits.parameters


def _takes(modality: str) -> Keeps:
    return lambda traits: modality in traits.modalities
