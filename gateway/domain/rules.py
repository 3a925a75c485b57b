"""What an account allows to be done with its requests."""

from __future__ import annotations

import msgspec


class AccountRules(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an account allows. A request can only tighten it."""

    train_paid: bool = True  # endpoints may train on prompts, or their policy is not known
    train_free: bool = True  # the same for free ones
    zdr: bool = False  # only endpoints that retain nothing
    allowed: tuple[str, ...] = ()  # provider slugs; none: all
    ignored: tuple[str, ...] = ()


NO_RULES = AccountRules()
