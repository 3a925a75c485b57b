"""Journal files as edges write them, and what is in the store afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import sqlite3
from pathlib import Path
from typing import Any

from gateway.domain.generation import Generation
from gateway.domain.usage import Usage
from gateway.wire import records

NOON_MS = 1_764_072_000_000  # 2025-11-25, a Tuesday
_numbers = itertools.count(1)


def generation(account: str = "user_ann", nanos: int = 10, **fields: Any) -> Generation:
    """An exchange of `account` with an id of its own, paid from the account's lease."""
    given: dict[str, Any] = {
        "id": f"gen-1764072000-{next(_numbers):020}",
        "account_id": account,
        "key_digest": "digest-a",
        "created_at_ms": NOON_MS,
        "model": "acme/sage-1",
        "endpoint_id": "acme/sage-1@north",
        "provider": "north",
        "usage": Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=2, reasoning_tokens=1),
        "charged_nanos": nanos,
        "settles": (f"balance:{account}",),
    }
    return Generation(**{**given, **fields})


class Writer:
    """The journal of one edge, with its lock held until `die()`."""

    def __init__(self, folder: Path, incarnation: str, slot: int = 0) -> None:
        self.folder = folder
        self.incarnation = incarnation
        self._stem = f"edge-{slot}-{incarnation}"
        self._number = 0
        self._fd = -1
        folder.mkdir(parents=True, exist_ok=True)
        self.rotate()

    @property
    def name(self) -> str:
        return f"{self._stem}.{self._number}"

    @property
    def path(self) -> Path:
        return self.folder / self.name

    def rotate(self) -> None:
        self._number += 1
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.die()
        self._fd = fd

    def append(self, *generations: Generation) -> None:
        self.write(b"".join(records.encode(each) for each in generations))

    def write(self, data: bytes) -> None:
        assert os.write(self._fd, data) == len(data)

    def die(self) -> None:
        """As the kernel does it for a dead edge."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def rows(database: Path, sql: str) -> list[tuple[Any, ...]]:
    """What another process sees in the store."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        return db.execute(sql).fetchall()


def move_back(database: Path, ms: int, where: str = "TRUE") -> None:
    """Transactions so far into the past, which the append-only triggers do not let anybody else do."""
    with contextlib.closing(sqlite3.connect(database, timeout=10)) as db:
        [(trigger,)] = db.execute("SELECT sql FROM sqlite_schema WHERE name = 'transactions_keep_values'")
        db.execute("DROP TRIGGER transactions_keep_values")
        db.execute(f"UPDATE transactions SET created_at_ms = created_at_ms - ? WHERE {where}", (ms,))
        db.execute(trigger)
        db.commit()
