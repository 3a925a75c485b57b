"""Windows of limits that are over leave the store. Decides nothing but the time."""

from __future__ import annotations

import time

from gateway.control.store import Store
from gateway.log import Log


async def forget_windows(store: Store, log: Log) -> None:
    """Once. Raises StoreUnavailable."""
    if count := await store.forget_windows(time.time()):
        log.info("windows_forgotten", count=count)
