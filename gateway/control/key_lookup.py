"""Who an edge's caller is: the owner of a key, or of a session that a browser's cookie names."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable

from gateway.control.store import Store
from gateway.control.store.management import TOUCH_S, Session
from gateway.domain.errors import StoreUnavailable
from gateway.domain.keys import KeyRecord
from gateway.domain.rules import AccountRules
from gateway.domain.sessions import session_digest, session_name

SESSION_LABEL = "session"  # in the log, where keys have theirs


class KeyLookup:
    """Answers edges, with what `told` makes of a record. Sessions that they ask about are in use, which `run` writes down: no
    answer waits for that.

    `now` is unix time.
    """

    def __init__(self, *, store: Store, told: Callable[[KeyRecord], KeyRecord], now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._told = told
        self._now = now
        self._used: dict[str, int] = {}  # digest of a session -> when
        self._any_used = asyncio.Event()

    async def find(self, names: Iterable[str]) -> dict[str, KeyRecord]:
        """By digest of a key and by name of a session; what is not there has no record. Raises StoreUnavailable."""
        names = list(names)
        digests = [digest for digest in map(session_digest, names) if digest is not None]
        found = await self._store.find_keys(name for name in names if session_digest(name) is None) if len(digests) < len(names) else {}
        if digests:
            for digest, (session, rules) in (await self._store.find_sessions(digests)).items():
                if (record := self._in_use(session, rules)) is not None:
                    found[session_name(digest)] = record
        return {name: self._told(record) for name, record in found.items()}

    async def run(self) -> None:
        """Tell the store which sessions are in use. One that could not be told is told at the next use."""
        while True:
            await self._any_used.wait()
            self._any_used.clear()
            used, self._used = self._used, {}
            for digest, used_at_s in used.items():
                with contextlib.suppress(StoreUnavailable):
                    await self._store.touch_session(digest, used_at_s)

    def _in_use(self, session: Session, rules: AccountRules) -> KeyRecord | None:
        """None: it is over."""
        now_s = int(self._now())
        if session.ends_at_s <= now_s:
            return None
        if session.used_at_s + TOUCH_S <= now_s:
            self._used[session.digest] = now_s
            self._any_used.set()
        return KeyRecord(
            digest="",
            account_id=session.account_id,
            name="",
            label=SESSION_LABEL,
            expires_at_s=session.ends_at_s,
            rules=rules,
            session=True,
        )
