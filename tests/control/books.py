"""A store with two accounts, a folder of journals, and bookkeepers on them."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

from gateway.control.bookkeeper import Bookkeeper
from gateway.control.leases import releaser
from gateway.control.store.sqlite import SqliteStore
from gateway.link.messages import Committed
from gateway.log import Log
from tests.control.journaling import rows

USD = 1_000_000_000


class Books:
    """What one control after another finds."""

    def __init__(self, folder: Path, store: SqliteStore) -> None:
        self.database = folder / "gateway.db"
        self.journal = folder / "journal"
        self.store = store
        self.joined: set[str] = set()
        self.committed: list[tuple[str, Committed]] = []
        self.refused: list[str] = []
        self.released: list[str] = []
        reader, self.log_fd = os.pipe()
        os.set_blocking(reader, False)
        self._log_reader = io.FileIO(reader)

    def keeper(self) -> Bookkeeper:
        """As a control that has just started."""
        give_back = releaser(self.store)

        async def release(incarnation: str) -> None:
            await give_back(incarnation)
            self.released.append(incarnation)

        return Bookkeeper(
            store=self.store,
            folder=self.journal,
            release=release,
            is_joined=self.joined.__contains__,
            on_committed=lambda incarnation, committed: self.committed.append((incarnation, committed)),
            on_refused=self.refused.append,
            log=Log("test", fd=self.log_fd),
        )

    def logged(self) -> list[dict[str, Any]]:
        """Log lines since the last look."""
        return [json.loads(line) for line in (self._log_reader.read(1 << 20) or b"").splitlines()]

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        return rows(self.database, sql)

    async def close(self) -> None:
        await self.store.close()
        self._log_reader.close()
        os.close(self.log_fd)
