"""Who may serve a request, in which order: the envelope, the account's rules and the caller's wishes, put to the router."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from random import random

from gateway.domain.errors import ContextTooLong, GatewayError
from gateway.domain.keys import KeyRecord
from gateway.edge.snapshots import Choice
from gateway.routing.filters import Needs
from gateway.routing.router import Router
from gateway.wire.envelope import Envelope

BYTES_PER_TOKEN_MOST = 8  # a low estimate: where it is in doubt whether a prompt fits, the provider decides


def select(envelope: Envelope, key: KeyRecord, session_id: str, router: Router[Choice], now_s: float) -> tuple[Choice, ...]:
    """The endpoints to try, the best first; never empty. Raises a GatewayError that says why there is none."""
    needs = Needs(
        envelope.prompt_text_bytes // BYTES_PER_TOKEN_MOST,
        envelope.max_tokens,
        envelope.parameters,
        envelope.modalities,
        envelope.forces_tool,
    )
    model = router.catalog.find(envelope.model)
    if model is not None and envelope.provider is None and not envelope.models:
        conversation = conversation_of(envelope, key, session_id, model.id) if router.caches(model) else None
        return router.rank(model, now_s=now_s, rng=random, needs=needs, rules=key.rules, conversation=conversation)
    models = [router.resolve(name) for name in (envelope.model, *envelope.models)]
    wished = router.wishes.find(envelope.provider, envelope.route)
    conversation = conversation_of(envelope, key, session_id, models[0].model.id) if router.caches(models[0].model) else None
    return router.rank_as_wished(models, wished, now_s=now_s, rng=random, needs=needs, rules=key.rules, conversation=conversation)


def conversation_of(envelope: Envelope, key: KeyRecord, session_id: str, model_id: str) -> Hashable:
    """What tells a conversation from the account's others: its session's name, or what it began with. None: nothing does."""
    told = envelope.session_id or session_id or hash(envelope.opening)
    return (key.account_id, model_id, told) if envelope.opening or not isinstance(told, int) else None


def remaining(choices: Sequence[Choice], failed: Choice, error: GatewayError) -> list[Choice]:
    """Who may still serve what `failed` could not. A request that one model's provider refused for what it is may suit another model."""
    if isinstance(error, ContextTooLong):
        room = failed.context_length
        return [each for each in choices if each.model is not failed.model or each.context_length > room]
    if not error.retryable:
        return [each for each in choices if each.model is not failed.model]
    return list(choices)


def next_of(choices: Sequence[Choice], now_s: float) -> Choice | None:
    """The first that its breaker admits; where all are ejected or resting any, but never one whose provider said not to come back yet."""
    for each in choices:
        if each.live.admits(now_s):
            return each
    for each in choices:
        if not each.live.is_held(now_s):
            return each
    return None
