"""One model as requests meet it: which of its endpoints may serve, and the plan for those."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

from gateway.domain.catalog import Model
from gateway.domain.rules import NO_RULES, AccountRules
from gateway.routing.filters import NO_NEEDS, Needs, Traits, in_turn, narrow, needs_steps, not_in_service, prefer, rules_steps, wishes_steps
from gateway.routing.known_wishes import Kept, Wished
from gateway.routing.plan import Board, C, Plan
from gateway.routing.wishes import NO_WISHES, Wishes

FILTERING = frozenset({"tools", "tool_choice", "response_format", "verbosity"})  # parameters that filter endpoints unasked
RULES_MAX = 256  # different account rules whose outcome is kept per model
_NONE: frozenset[str] = frozenset()

Masks = Kept[tuple[object, ...], int]  # by entry, wishes, account rules, tiers and required parameters


class Entry(Generic[C]):
    """One model: its board, its endpoints' traits, and what can be said of requests ahead of time, which is all but their needs."""

    __slots__ = (
        "_masks",
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

    def __init__(self, model: Model, board: Board[C], traits: Sequence[Traits], site: str, masks: Masks) -> None:
        """`masks` are kept for all entries of one catalog together."""
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
        self._masks = masks
        self._of_rules: dict[AccountRules, Plan[C]] = {}
        self._without_rules: Plan[C] | None = None  # of the commonest rules

    def plan(self, rules: AccountRules) -> Plan[C]:
        """For requests without wishes whose needs all endpoints suit. Raises NoEndpointMatches."""
        if rules is NO_RULES and self._without_rules is not None:
            return self._without_rules
        plan = self._of_rules.get(rules)
        if plan is None:
            if len(self._of_rules) >= RULES_MAX:
                self._of_rules.clear()
            plan = self._of_rules[rules] = self.board.plan(self._mask(rules, NO_WISHES, NO_NEEDS, ()))
        if rules is NO_RULES:
            self._without_rules = plan
        return plan

    def plan_for(self, needs: Needs, rules: AccountRules) -> Plan[C]:
        """For requests without wishes whose needs some endpoint may not suit. Raises NoEndpointMatches."""
        return self.board.plan(self._narrowed(self._mask(rules, NO_WISHES, NO_NEEDS, ()), needs))

    def plan_as_wished(self, wished: Wished, needs: Needs, rules: AccountRules, tiers: tuple[str, ...]) -> Plan[C]:
        """`tiers`: those that a variant opted into. Raises NoEndpointMatches."""
        if not wished.number:
            mask = self._mask(rules, wished.wishes, needs, tiers)
        else:
            key = (self, wished.number, rules, tiers, frozenset(needs.parameters) if wished.requires_parameters else _NONE)
            kept = self._masks.get(key)
            mask = self._masks.keep(key, self._mask(rules, wished.wishes, needs, tiers)) if kept is None else kept
        return self.board.plan(mask if self.suits_all(needs) else self._narrowed(mask, needs))

    def suits_all(self, needs: Needs) -> bool:
        """Whether no endpoint lacks anything that is needed: then there is nothing to filter."""
        if needs is NO_NEEDS:
            return True
        if needs.prompt_tokens > self.prompt_max or (needs.max_tokens or 0) > self.output_max:
            return False
        if not needs.modalities <= self.modalities:
            return False
        return needs.parameters.isdisjoint(FILTERING) or needs.parameters & FILTERING <= self.common

    def _mask(self, rules: AccountRules, wishes: Wishes, needs: Needs, tiers: Sequence[str]) -> int:
        """The endpoints that rules and wishes leave, as bits; of `needs` what wishes go by. Raises NoEndpointMatches."""
        if not self.traits:
            raise not_in_service(self.model.id, self.site)
        steps = in_turn([*rules_steps(rules), *wishes_steps(wishes, needs, tiers)])
        return narrow(self.traits, (1 << len(self.traits)) - 1, steps, model=self.model.id, site=self.site)

    def _narrowed(self, mask: int, needs: Needs) -> int:
        """Those of them that have what a request needs. Raises NoEndpointMatches."""
        return prefer(self.traits, narrow(self.traits, mask, needs_steps(needs), model=self.model.id, site=self.site), needs)
