"""Wishes that callers repeat: read once, and what follows from them alone is kept.

An application sends the same `provider` object with each request. What is kept of one it might never send again is bounded
by number and length, and what is kept for it (`Kept`) by number, so that no variety of wishes takes more than some MB.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import count
from typing import TypeVar

import msgspec

from gateway.routing.wishes import NO_WISHES, SortBy, Wishes, read_wishes, routed

KNOWN_MAX = 1024
KNOWN_BYTES_MAX = 512  # of JSON; longer ones are read each time, and nothing is kept for them
KEPT_MAX = 4096

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(dict[K, V]):
    """What was worked out before. Full, it begins anew: all of it can be worked out again."""

    def keep(self, key: K, value: V) -> V:
        if len(self) >= KEPT_MAX:
            self.clear()
        self[key] = value
        return value


class Wished:
    """Wishes, and what follows from them alone. `number` stands for them in keys of what is kept; 0: nothing is, they are seldom."""

    __slots__ = ("across_models", "alone", "has_thresholds", "number", "order", "requires_parameters", "sort", "wishes")

    def __init__(self, wishes: Wishes, number: int = 0) -> None:
        self.wishes = wishes
        self.number = number
        self.sort: SortBy | None = wishes.sort_by
        self.order = tuple(slug.casefold() for slug in wishes.order or ())
        self.across_models = wishes.across_models
        self.has_thresholds = wishes.has_thresholds
        self.requires_parameters = bool(wishes.require_parameters)
        self.alone = wishes.allow_fallbacks is False  # only the first one may serve


class KnownWishes:
    """Finds them by the caller's own bytes."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._none = Wished(NO_WISHES, next(self._numbers))
        self._known: dict[tuple[bytes, bool], Wished] = {}

    def __len__(self) -> int:
        return len(self._known)

    def find(self, raw: bytes | msgspec.Raw | None, route: str | None = None) -> Wished:
        """The wishes in a `provider` object, the deprecated `route` taken into account; None: there is none. Raises BadRequest."""
        if raw is None and route != "sort":
            return self._none
        given = bytes(raw) if raw is not None else b"{}"
        key = given, route == "sort"
        found = self._known.get(key)
        if found is None:
            wishes = routed(read_wishes(given), route)
            if len(given) > KNOWN_BYTES_MAX:
                return Wished(wishes)
            if len(self._known) >= KNOWN_MAX:
                del self._known[next(iter(self._known))]
            found = self._known[key] = Wished(wishes, next(self._numbers))
        return found
