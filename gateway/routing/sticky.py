"""Which endpoint holds whose prompt in its cache: for ten minutes after a success it is asked first."""

from __future__ import annotations

from collections.abc import Hashable

TTL_S = 600.0
ENTRIES_MAX = 50_000  # some 15 MB; the oldest go first


class Stickiness:
    """Endpoint ids by (account, model, conversation). What belongs to one account is never found by another: it is in the key."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[str, float]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: Hashable, now_s: float) -> str | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry[1] <= now_s:
            del self._entries[key]
            return None
        return entry[0]

    def remember(self, key: Hashable, endpoint_id: str, now_s: float) -> None:
        """After a success; every one renews it."""
        entries = self._entries
        entries.pop(key, None)
        if len(entries) >= ENTRIES_MAX:
            del entries[next(iter(entries))]
        entries[key] = (endpoint_id, now_s + TTL_S)
