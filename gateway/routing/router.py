"""The door to routing for an edge: who may serve a request, in which order. Read `rank` first.

Most requests have no wishes and need nothing that an endpoint lacks: for them all but two draws was worked out when the
catalog came. The rest are filtered, and share plans with others whose filters left the same endpoints.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Generic

import msgspec

from gateway.domain.catalog import Catalog, Endpoint, Model
from gateway.domain.errors import GatewayError, NoEndpointAvailable, NoEndpointMatches, Throttled
from gateway.domain.rules import NO_RULES, AccountRules
from gateway.routing.breaker import BreakerRules
from gateway.routing.figures import Merged, Observed
from gateway.routing.filters import (
    NO_NEEDS,
    Needs,
    Traits,
    in_turn,
    means,
    narrow,
    needs_steps,
    not_in_service,
    prefer,
    rules_steps,
    traits_of,
    wishes_steps,
)
from gateway.routing.live import Changes, Live
from gateway.routing.plan import Board, C, Plan, Rng, Seat
from gateway.routing.scorer import Estimate, Weights, score
from gateway.routing.sticky import Stickiness
from gateway.routing.variants import Resolved, resolve
from gateway.routing.wishes import NO_WISHES, SortBy, Wishes, is_slow, is_weak
from gateway.settings import Routing

FILTERING = frozenset({"tools", "tool_choice", "response_format", "verbosity"})  # parameters that filter endpoints unasked
RULES_MAX = 256  # different account rules whose outcome is kept per model


class Explained(msgspec.Struct, frozen=True):
    """How one endpoint stood at a moment: for `openrouter_metadata` and for records."""

    endpoint_id: str
    provider: str  # slug
    model: str
    share: float  # of traffic without wishes
    cost: float | None  # 1.0: best in everything; None: may not be tried now
    reason: str


class Entry(Generic[C]):
    """One model: its board, its endpoints' traits, and what can be said of requests without wishes ahead of time."""

    __slots__ = (
        "_of_rules",
        "_without_rules",
        "board",
        "caches",
        "common",
        "modalities",
        "model",
        "output_max",
        "prompt_max",
        "site",
        "traits",
    )

    def __init__(self, model: Model, board: Board[C], traits: Sequence[Traits], site: str) -> None:
        self.model = model
        self.board = board
        self.traits = tuple(traits)
        self.site = site
        said = [each.parameters for each in self.traits if each.parameters is not None]
        self.common = frozenset.intersection(*said) if said else FILTERING
        self.modalities = frozenset(model.input_modalities)
        self.prompt_max = min((each.prompt_max for each in self.traits), default=0)
        self.output_max = min((each.output_max for each in self.traits), default=0)
        self.caches = any(each.caches for each in self.traits)
        self._of_rules: dict[AccountRules, Plan[C]] = {}
        self._without_rules: Plan[C] | None = None  # of the commonest rules

    def plan(self, rules: AccountRules) -> Plan[C]:
        """For requests without wishes. Raises NoEndpointMatches."""
        if rules is NO_RULES and self._without_rules is not None:
            return self._without_rules
        plan = self._of_rules.get(rules)
        if plan is None:
            if len(self._of_rules) >= RULES_MAX:
                self._of_rules.clear()
            plan = self._of_rules[rules] = self.board.plan(self.mask(rules, NO_WISHES, NO_NEEDS, ()))
        if rules is NO_RULES:
            self._without_rules = plan
        return plan

    def suits_all(self, needs: Needs) -> bool:
        """Whether no endpoint lacks anything that is needed: then there is nothing to filter."""
        if needs is NO_NEEDS:
            return True
        if needs.prompt_tokens > self.prompt_max or (needs.max_tokens or 0) > self.output_max:
            return False
        if not needs.modalities <= self.modalities:
            return False
        return needs.parameters.isdisjoint(FILTERING) or needs.parameters & FILTERING <= self.common

    def mask(self, rules: AccountRules, wishes: Wishes, needs: Needs, tiers: Sequence[str]) -> int:
        """The endpoints that are left, as bits. Raises NoEndpointMatches."""
        if not self.traits:
            raise not_in_service(self.model.id, self.site)
        steps = in_turn([*rules_steps(rules), *wishes_steps(wishes, needs, tiers), *needs_steps(needs)])
        mask = narrow(self.traits, (1 << len(self.traits)) - 1, steps, model=self.model.id, site=self.site)
        return prefer(self.traits, mask, needs)


class Router(Generic[C]):
    """Endpoints, their state, and the choice among them, for one edge."""

    def __init__(self, settings: Routing, *, site: str = "") -> None:
        self._settings = settings
        self._site = site
        self._changes: dict[str, Changes] = {}  # by model id
        self._lives: dict[str, Live] = {}
        self._entries: dict[str, Entry[C]] = {}
        self._seq = 0
        self._rules = BreakerRules(
            failures=settings.breaker_failures,
            error_share=settings.breaker_error_share,
            attempts_min=settings.breaker_attempts_min,
            open_s=settings.breaker_open_s,
            open_s_max=settings.breaker_open_s_max,
        )
        self.catalog = Catalog(revision="", providers={}, models={})
        self.sticky = Stickiness()

    # When the catalog comes.

    def replace(self, catalog: Catalog, choices: Mapping[str, Sequence[C]]) -> None:
        """Take over a catalog. `choices`: by model id, of the endpoints that are in service. States live on by endpoint id."""
        before, self._entries = self._entries, {}
        for model_id, model in catalog.models.items():
            own = choices.get(model_id, ())
            seats = [Seat(index, choice, self.live(choice.endpoint)) for index, choice in enumerate(own)]
            board = Board(
                seats,
                self._changes_of(model_id),
                weights=self._weights(),
                exploration_share=self._settings.exploration_share,
                ramp_s=self._settings.ramp_s,
            )
            if (old := before.get(model_id)) is not None:
                board.inherit(old.board)
            traits = [traits_of(model, choice.endpoint, catalog.providers[choice.endpoint.provider]) for choice in own]
            self._entries[model_id] = Entry(model, board, traits, self._site)
        self.catalog = catalog
        gone = self._lives.keys() - {seat.live.endpoint_id for entry in self._entries.values() for seat in entry.board.seats}
        for endpoint_id in gone:
            if not self._lives[endpoint_id].inflight:
                del self._lives[endpoint_id]

    def live(self, endpoint: Endpoint) -> Live:
        """The state of an endpoint, to be told of attempts; the same one for the same endpoint id, whatever the catalog does."""
        live = self._lives.get(endpoint.id)
        if live is None:
            changes = self._changes_of(endpoint.model_id)
            live = self._lives[endpoint.id] = Live(endpoint.id, self._rules, outage_s=self._settings.outage_s, changes=changes)
        return live

    def resolve(self, name: str) -> Resolved:
        """What a model's name stands for, variants included. Raises UnknownModel or NoEndpointMatches."""
        return resolve(name, self.catalog, site=self._site)

    def caches(self, model: Model) -> bool:
        """Whether an endpoint of this model reads cached prompts at a lower price."""
        return self._entries[model.id].caches

    # Per request.

    def rank(
        self,
        model: Model,
        *,
        now_s: float,
        rng: Rng,
        needs: Needs = NO_NEEDS,
        rules: AccountRules = NO_RULES,
        conversation: Hashable = None,
    ) -> tuple[C, ...]:
        """The endpoints to try for a request without wishes, in order; never empty.

        `conversation` is (account, model, conversation) where the caller may have a prompt cached; None: not asked.
        Raises NoEndpointMatches (404), Throttled (429: all said when to come back), NoEndpointAvailable (503).
        """
        entry = self._entries[model.id]
        plan = entry.plan(rules) if entry.suits_all(needs) else entry.board.plan(entry.mask(rules, NO_WISHES, needs, ()))
        preferred = None if conversation is None else self._last_of(conversation, now_s)
        order = plan.choose(now_s, rng, preferred)
        if not order:
            raise _held(plan.held_until_s, now_s)
        return order

    def rank_as_wished(
        self,
        models: Sequence[Resolved],
        wishes: Wishes,
        *,
        now_s: float,
        rng: Rng,
        needs: Needs = NO_NEEDS,
        rules: AccountRules = NO_RULES,
        conversation: Hashable = None,
    ) -> tuple[C, ...]:
        """The same for requests with wishes, variants or fallback models. A model that nothing can serve is skipped if another can be.

        Raises what `rank` raises, of the first model.
        """
        found: list[tuple[C, ...]] = []
        pooled: list[tuple[Entry[C], Seat[C]]] = []
        first_error: GatewayError | None = None
        for resolved in models:
            entry = self._entries[resolved.model.id]
            try:
                plan = entry.board.plan(entry.mask(rules, wishes, needs, resolved.tiers))
                if wishes.across_models:
                    pooled += [(entry, seat) for seat in plan.ranked(now_s)]
                    order: tuple[C, ...] = ()
                else:
                    order = self._ordered(entry, plan, wishes, resolved.sort, now_s, rng, conversation)
                if not order and not pooled:
                    raise _held(plan.held_until_s, now_s)
            except (NoEndpointMatches, Throttled, NoEndpointAvailable) as error:
                first_error = first_error or error
            else:
                found.append(order)
        if pooled:
            found = [self._pooled(pooled, wishes, now_s)]
        if not found:
            raise first_error or NoEndpointAvailable("no provider of this model can be tried now", retry_after_s=1.0)
        return tuple(choice for order in found for choice in order)

    def remember(self, conversation: Hashable, choice: C, now_s: float, *, by_session: bool, cached_tokens: int) -> None:
        """After a success: the endpoint now holds the conversation's prompt, as far as it caches at a lower price.

        `by_session`: the caller named the session; otherwise only a call that used the cache counts.
        """
        price = choice.endpoint.price
        caches = price.input_cache_read is not None and price.input_cache_read < price.prompt
        if caches and (by_session or cached_tokens):
            self.sticky.remember(conversation, choice.endpoint.id, now_s)

    def explain(self, model: Model, now_s: float) -> list[Explained]:
        """How the endpoints of a model stand, the best first."""
        rows = []
        plan = self._entries[model.id].board.all
        plan.rebuild(now_s, explain=True)
        for seat, scored, share in plan.scored():
            endpoint = seat.choice.endpoint
            reason = scored.reason if scored is not None else repr(seat.live.breaker)
            rows.append(Explained(endpoint.id, endpoint.provider, model.id, round(share, 4), scored.cost if scored else None, reason))
        return sorted(rows, key=lambda row: row.cost if row.cost is not None else float("inf"))

    # Each second.

    def report(self, now_s: float) -> Observed:
        """What to tell control."""
        self._seq += 1
        tallies = {endpoint_id: tally for endpoint_id, live in self._lives.items() if (tally := live.report(self._seq, now_s)) is not None}
        states = {endpoint_id: live.breaker.state(now_s) for endpoint_id, live in self._lives.items()}
        return Observed(
            self._seq,
            tallies,
            {endpoint_id: live.inflight for endpoint_id, live in self._lives.items() if live.inflight},
            tuple(endpoint_id for endpoint_id, state in states.items() if state == "ejected"),
            tuple(endpoint_id for endpoint_id, state in states.items() if state == "held"),
        )

    def take(self, merged: Merged, edge: str, now_s: float) -> None:
        """Control's push, to the edge of this incarnation."""
        seen = merged.seen.get(edge, 0)
        for endpoint_id, live in self._lives.items():
            live.take_merged(merged.figures.get(endpoint_id), seen, now_s)

    def boards(self) -> Iterator[Board[C]]:
        """Of the catalog's models."""
        return (entry.board for entry in self._entries.values())

    # Within.

    def _changes_of(self, model_id: str) -> Changes:
        return self._changes.setdefault(model_id, Changes())

    def _last_of(self, conversation: Hashable, now_s: float) -> Live | None:
        """The endpoint that holds a conversation's prompt, if it is still there."""
        endpoint_id = self.sticky.find(conversation, now_s)
        return None if endpoint_id is None else self._lives.get(endpoint_id)

    def _weights(self) -> Weights:
        return Weights(self._settings.price_weight, self._settings.latency_weight, self._settings.throughput_weight)

    def _ordered(
        self,
        entry: Entry[C],
        plan: Plan[C],
        wishes: Wishes,
        variant: SortBy | None,
        now_s: float,
        rng: Rng,
        conversation: Hashable,
    ) -> tuple[C, ...]:
        sort = wishes.sort_by or variant
        preferred = None if conversation is None or wishes.order else self._last_of(conversation, now_s)
        if sort is not None or wishes.order:
            seats = list(plan.ranked(now_s))
            if sort is not None:
                seats = _sorted(entry.board, seats, sort, now_s)
                seats.sort(key=lambda seat: seat.live is not preferred)
            seats = _demoted(seats, wishes, now_s)
            if wishes.order:
                seats = _in_wished_order(seats, entry.traits, wishes.order)
            order = tuple(seat.choice for seat in seats)
        else:
            order = plan.choose(now_s, rng, preferred)
            if wishes.has_thresholds:
                by_endpoint = {seat.choice.endpoint.id: seat for seat in entry.board.seats}
                order = tuple(seat.choice for seat in _demoted([by_endpoint[choice.endpoint.id] for choice in order], wishes, now_s))
        if wishes.allow_fallbacks is False and not wishes.order:
            order = order[:1]
        return order

    def _pooled(self, pooled: Sequence[tuple[Entry[C], Seat[C]]], wishes: Wishes, now_s: float) -> tuple[C, ...]:
        """All models' endpoints in one order."""
        seats = [seat for _, seat in pooled]
        estimates = [entry.board.estimate(seat, now_s) for entry, seat in pooled]
        if (sort := wishes.sort_by) is not None:
            keys = [_sort_key(sort, seat.price, estimate) for seat, estimate in zip(seats, estimates, strict=True)]
        else:
            keys = [(scored.cost,) for scored in score([seat.price for seat in seats], estimates, self._weights())]
        seats = [seats[i] for i in sorted(range(len(seats)), key=keys.__getitem__)]
        seats = _demoted(seats, wishes, now_s)
        return tuple(seat.choice for seat in seats)[: 1 if wishes.allow_fallbacks is False else None]


def _sorted(board: Board[C], seats: list[Seat[C]], by: SortBy, now_s: float) -> list[Seat[C]]:
    return sorted(seats, key=lambda seat: _sort_key(by, seat.price, board.estimate(seat, now_s)))


def _sort_key(by: SortBy, price: int, estimate: Estimate) -> tuple[float, ...]:
    """Ascending; what nobody knows goes last, in the order in which it came: the best first."""
    unknown = float("inf")
    if by == "price":
        return (float(price),)
    if by == "latency":
        return (unknown if estimate.first_s is None else estimate.first_s,)
    if by == "throughput":
        return (unknown if estimate.token_s is None else estimate.token_s,)
    return (round(estimate.failure, 2),)  # exacto: who answers most reliably


def _demoted(seats: list[Seat[C]], wishes: Wishes, now_s: float) -> list[Seat[C]]:
    """Those that miss a wished speed go to the end; none is removed."""
    if not wishes.has_thresholds:
        return seats

    def misses(seat: Seat[C]) -> bool:
        first_s, rate = seat.live.percentiles(now_s)
        return is_slow(first_s, wishes.preferred_max_latency) or is_weak(rate, wishes.preferred_min_throughput)

    return sorted(seats, key=misses)


def _in_wished_order(seats: list[Seat[C]], traits: Sequence[Traits], order: Sequence[str]) -> list[Seat[C]]:
    def place(seat: Seat[C]) -> int:
        return next((i for i, slug in enumerate(order) if means(slug, traits[seat.index])), len(order))

    return sorted(seats, key=place)


def _held(until_s: float, now_s: float) -> GatewayError:
    """Nobody may be tried before this time, because every provider said so."""
    if until_s <= now_s:
        return NoEndpointAvailable("no provider of this model can be tried now", retry_after_s=1.0)
    return Throttled("Every provider of this model is rate-limited; try again later", retry_after_s=until_s - now_s)
