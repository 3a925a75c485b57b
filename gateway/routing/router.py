"""The door to routing for an edge: who may serve a request, in which order. Read `rank` first.

Most requests have no wishes and need nothing that an endpoint lacks: for them all but two draws was worked out when the
catalog came. The rest are filtered, and share plans with others whose filters left the same endpoints.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Generic

import msgspec

from gateway.domain.catalog import Catalog, Endpoint, Model
from gateway.domain.errors import GatewayError, NoEndpointAvailable, NoEndpointMatches, Throttled
from gateway.domain.rules import NO_RULES, AccountRules
from gateway.routing.arrangement import Arrangements
from gateway.routing.breaker import BreakerRules
from gateway.routing.entry import Entry, Masks
from gateway.routing.figures import Merged, Observed, Tally
from gateway.routing.filters import NO_NEEDS, Needs, traits_of
from gateway.routing.known_wishes import Kept, KnownWishes, Wished
from gateway.routing.live import Changes, Live
from gateway.routing.plan import Board, C, Plan, Rng, Seat
from gateway.routing.scorer import Weights
from gateway.routing.sticky import Stickiness
from gateway.routing.variants import Resolved, resolve
from gateway.routing.wishes import SortBy
from gateway.settings import Routing


class Explained(msgspec.Struct, frozen=True):
    """How one endpoint stood at a moment: for `openrouter_metadata` and for records."""

    endpoint_id: str
    provider: str  # slug
    model: str
    share: float  # of traffic without wishes
    cost: float | None  # 1.0: best in everything; None: may not be tried now
    reason: str


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
        self.wishes = KnownWishes()
        self._masks: Masks = Kept()
        self._arrangements: Arrangements[C] = Arrangements(self._weights())

    # When the catalog comes.

    def replace(self, catalog: Catalog, choices: Mapping[str, Sequence[C]]) -> None:
        """Take over a catalog. `choices`: by model id, of the endpoints that are in service. States live on by endpoint id."""
        before, self._entries = self._entries, {}
        self._masks.clear()
        self._arrangements.clear()
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
            self._entries[model_id] = Entry(model, board, traits, self._site, self._masks)
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
        plan = entry.plan(rules) if entry.suits_all(needs) else entry.plan_for(needs, rules)
        preferred = None if conversation is None else self._last_of(conversation, now_s)
        order = plan.choose(now_s, rng, preferred)
        if not order:
            raise _held(plan.held_until_s, now_s)
        return order

    def rank_as_wished(
        self,
        models: Sequence[Resolved],
        wished: Wished,
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
        if len(models) == 1 and not wished.across_models:
            entry = self._entries[models[0].model.id]
            return self._as_wished(entry, models[0], wished, now_s, rng, needs, rules, conversation)
        found: list[tuple[C, ...]] = []
        pool: list[Plan[C]] = []
        first_error: GatewayError | None = None
        for resolved in models:
            entry = self._entries[resolved.model.id]
            try:
                if wished.across_models:
                    plan = entry.plan_as_wished(wished, needs, rules, resolved.tiers)
                    if not plan.ranked(now_s):
                        raise _held(plan.held_until_s, now_s)
                    pool.append(plan)
                else:
                    found.append(self._as_wished(entry, resolved, wished, now_s, rng, needs, rules, conversation))
            except (NoEndpointMatches, Throttled, NoEndpointAvailable) as error:
                first_error = first_error or error
        if pool:
            order = self._arrangements.pooled(pool, wished, now_s)
            found = [order[:1] if wished.alone else order]
        if not found:
            raise first_error or NoEndpointAvailable("no provider of this model can be tried now", retry_after_s=1.0)
        return found[0] if len(found) == 1 else tuple(chain.from_iterable(found))

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
        tallies: dict[str, Tally] = {}
        inflight: dict[str, int] = {}
        ejected, held = list[str](), list[str]()
        for endpoint_id, live in self._lives.items():
            if not live.was_called:
                continue
            if (tally := live.report(self._seq, now_s)) is not None:
                tallies[endpoint_id] = tally
            if live.inflight:
                inflight[endpoint_id] = live.inflight
            if (state := live.breaker.state(now_s)) != "closed":
                (ejected if state == "ejected" else held).append(endpoint_id)
        return Observed(self._seq, tallies, inflight, tuple(ejected), tuple(held))

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

    def _as_wished(
        self,
        entry: Entry[C],
        resolved: Resolved,
        wished: Wished,
        now_s: float,
        rng: Rng,
        needs: Needs,
        rules: AccountRules,
        conversation: Hashable,
    ) -> tuple[C, ...]:
        """Of one model; raises what `rank` raises."""
        plan = entry.plan_as_wished(wished, needs, rules, resolved.tiers)
        sort: SortBy | None = wished.sort or resolved.sort
        preferred = None if conversation is None or wished.order else self._last_of(conversation, now_s)
        if sort is not None or wished.order:
            order = self._arrangements.order(entry, plan, wished, sort, preferred, now_s)
        else:
            order = plan.choose(now_s, rng, preferred)
            if wished.has_thresholds:
                order = self._arrangements.demoted(plan, wished, order, now_s)
        if not order:
            raise _held(plan.held_until_s, now_s)
        return order[:1] if wished.alone and not wished.order else order


def _held(until_s: float, now_s: float) -> GatewayError:
    """Nobody may be tried before this time, because every provider said so."""
    if until_s <= now_s:
        return NoEndpointAvailable("no provider of this model can be tried now", retry_after_s=1.0)
    return Throttled("Every provider of this model is rate-limited; try again later", retry_after_s=until_s - now_s)
