"""Which store the settings name, opened."""

from __future__ import annotations

from gateway.config import sqlite_path
from gateway.control.store import Store
from gateway.control.store.sqlite import SqliteStore
from gateway.domain.errors import StoreUnavailable
from gateway.settings import Settings


async def open_store(settings: Settings, *, wait_s: float = 0) -> Store:
    """The store, up to date and ours alone; to be closed by the caller.

    Raises StoreLocked when another process has it open for longer than `wait_s`, StoreUnavailable.
    """
    if not settings.store.url.startswith("sqlite:"):
        raise StoreUnavailable("store.url: this version keeps its store in SQLite; write sqlite:///PATH")
    return await SqliteStore.open(sqlite_path(settings), wait_s=wait_s)
