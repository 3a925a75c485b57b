"""What an account allows to be done with its requests."""

from __future__ import annotations

import msgspec


class AccountRules(msgspec.Struct, frozen=True, omit_defaults=True, cache_hash=True):
    """What an account allows. A request can only tighten it. Where nobody said, `NO_RULES` is meant, that very object."""

    train_paid: bool = False  # endpoints may train on prompts, or their policy is not known
    train_free: bool = False  # the same for free ones
    publish_free: bool = False  # free endpoints may publish prompts; others never may
    zdr: bool = False  # only endpoints that retain nothing
    log_prompts: bool = False  # requests and answers are kept for the account's own review, for a discount
    allowed: tuple[str, ...] = ()  # provider slugs, or tags such as "north/fp8"; none: all
    ignored: tuple[str, ...] = ()


NO_RULES = AccountRules()


class RulesChange(msgspec.Struct, frozen=True, kw_only=True):
    """What is to become of an account's rules; UNSET ones stay as they are."""

    train_paid: bool | msgspec.UnsetType = msgspec.UNSET
    train_free: bool | msgspec.UnsetType = msgspec.UNSET
    publish_free: bool | msgspec.UnsetType = msgspec.UNSET
    zdr: bool | msgspec.UnsetType = msgspec.UNSET
    log_prompts: bool | msgspec.UnsetType = msgspec.UNSET
    allowed: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    ignored: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET

    def applied_to(self, rules: AccountRules) -> AccountRules:
        changes = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not msgspec.UNSET}
        changed = msgspec.structs.replace(rules, **changes)
        return NO_RULES if changed == NO_RULES else changed
