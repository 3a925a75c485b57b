"""Windows of limits that are over leave the store: looked at when control starts and once an hour."""

from __future__ import annotations

import asyncio
import time

from gateway.control.store import Store
from gateway.domain.errors import StoreUnavailable
from gateway.log import Log, exception_fields

PERIOD_S = 3600.0


async def forget_windows(store: Store, log: Log) -> None:
    """Until cancelled."""
    while True:
        try:
            if count := await store.forget_windows(time.time()):
                log.info("windows_forgotten", count=count)
        except StoreUnavailable as error:
            log.warning("windows_kept", reason=str(error)[:200])
        except Exception as error:  # noqa: BLE001 - the task's outermost edge: an hour later it is tried again
            log.error("windows_failed", **exception_fields(error))
        await asyncio.sleep(PERIOD_S)
