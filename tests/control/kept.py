"""A content store with its intake on a real file, rules that a test sets, and everything that was counted and logged."""

from __future__ import annotations

import collections
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gateway.control.content.intake import ContentIntake
from gateway.control.content.store import ContentStore
from gateway.domain.content_keys import ContentKey
from gateway.domain.errors import StoreUnavailable
from gateway.domain.rules import AccountRules
from gateway.link.messages import Content
from gateway.log import Log

NEW, OLD, LOST = (ContentKey(bytes([number]) * 32) for number in (1, 2, 3))
NOW_MS = 1_764_031_697_000


def said(number: int, account: str = "user_ann", text: str = "", **more: Any) -> Content:
    """What an edge tells of its `number`-th exchange, with `text` in the request and in the answer."""
    given: dict[str, Any] = {
        "generation_id": f"gen-1764031697-{number:020}",
        "account_id": account,
        "created_at_ms": NOW_MS + number,
        "request": json.dumps({"model": "acme/sage-1", "messages": [{"role": "user", "content": f"ask {text}"}]}).encode(),
        "answer": json.dumps({"choices": [{"index": 0, "message": {"content": f"answer {text}"}}]}).encode(),
    }
    return Content(**{**given, **more})


class Kept:
    """`log_prompts` is on for the accounts in `logging`; `rules_fail` has the ledger's store not answer."""

    def __init__(self, folder: Path, keys: Sequence[ContentKey] = (NEW,), *, total_bytes_max: int = 1 << 30) -> None:
        self.path = folder / "data" / "content.sqlite"
        self.logging = {"user_ann", "user_bob"}
        self.rules_fail = False
        self.now_s = NOW_MS / 1000
        self.stored = 0
        self.dropped: collections.Counter[str] = collections.Counter()
        reader, self._log_fd = os.pipe()
        os.set_blocking(reader, False)
        self._log_reader = io.FileIO(reader)
        self.log = Log("test", fd=self._log_fd)
        self.store = ContentStore(self.path, keys, total_bytes_max=total_bytes_max, now=lambda: self.now_s)
        self.intake = ContentIntake(
            store=self.store, rules=self._rules, on_stored=self._on_stored, on_dropped=self._on_dropped, log=self.log
        )  # fmt: skip

    async def take(self, *contents: Content) -> None:
        """As edges send them, until they are written or dropped."""
        for content in contents:
            self.intake.offer(content)
        await self.intake.write_all()

    async def close(self) -> None:
        """Once, however often it is asked for."""
        if self._log_reader.closed:
            return
        await self.store.close()
        os.close(self._log_fd)
        self._log_reader.close()

    def logged(self) -> list[dict[str, Any]]:
        """Log lines since the last look."""
        return [json.loads(line) for line in (self._log_reader.read(1 << 20) or b"").splitlines()]

    def on_disk(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.path.parent.iterdir()} if self.path.parent.exists() else {}

    async def _rules(self, account_id: str) -> AccountRules:
        if self.rules_fail:
            raise StoreUnavailable("The store did not answer")
        return AccountRules(log_prompts=account_id in self.logging)

    def _on_stored(self) -> None:
        self.stored += 1

    def _on_dropped(self, reason: str) -> None:
        self.dropped[reason] += 1
