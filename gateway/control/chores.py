"""Chores: what control looks after when it starts and once an hour."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from gateway.domain.errors import StoreUnavailable
from gateway.log import Log, exception_fields

DAY_MS = 86_400_000  # by which chores tell what is old
PERIOD_S = 3600.0
RETRY_S = 60.0


async def hourly(name: str, chore: Callable[[], Awaitable[object]], log: Log) -> None:
    """Carry out `chore` at once and then once an hour, until cancelled.

    It may raise StoreUnavailable: then it is tried again in a minute. Whatever else it raises is logged, and it has its next hour.
    """
    while True:
        wait_s = PERIOD_S
        try:
            await chore()
        except StoreUnavailable as error:
            log.warning("chore_put_off", chore=name, reason=str(error.__cause__ or error)[:200])
            wait_s = RETRY_S
        except Exception as error:  # noqa: BLE001 - the task's outermost edge: an hour later it is tried again
            log.error("chore_failed", chore=name, **exception_fields(error))
        await asyncio.sleep(wait_s)
