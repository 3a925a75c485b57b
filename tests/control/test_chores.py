"""Chores are carried out at once and then once an hour, and no failure ends them."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from gateway.control import chores
from gateway.control.chores import hourly
from gateway.control.store.sqlite.database import translated
from gateway.domain.errors import StoreUnavailable
from gateway.log import Log


async def _locked() -> None:
    with translated():
        raise sqlite3.OperationalError("database is locked")


async def _closed() -> None:
    raise StoreUnavailable("The store is closed")


async def _mistaken() -> None:
    raise KeyError("x")


async def _well() -> None:
    pass


@pytest.mark.parametrize(
    ("chore", "retry", "event", "told"),
    [
        (_well, False, None, {}),
        (_locked, True, "chore_put_off", {"reason": "database is locked"}),
        (_closed, True, "chore_put_off", {"reason": "The store is closed"}),
        (_mistaken, False, "chore_failed", {}),
    ],
)
async def test_a_chore_has_its_next_hour_and_after_a_store_that_was_away_its_next_minute(
    chore: Callable[[], Awaitable[None]], retry: bool, event: str | None, told: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    calls = 0

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise asyncio.CancelledError

    async def counted() -> None:
        nonlocal calls
        calls += 1
        await chore()

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with _log() as (log, read):
        with contextlib.suppress(asyncio.CancelledError):
            await hourly("sweep", counted, log)
        lines = read()
    assert (calls, waits) == (3, 3 * [chores.RETRY_S if retry else chores.PERIOD_S])
    assert [line["event"] for line in lines] == ([event] * 3 if event else [])
    assert all(line["chore"] == "sweep" and line.items() >= told.items() for line in lines)


@contextlib.contextmanager
def _log() -> Iterator[tuple[Log, Callable[[], list[dict[str, Any]]]]]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with io.FileIO(reader) as pipe, io.FileIO(writer, "w"):
        yield Log("test", fd=writer), lambda: [json.loads(line) for line in (pipe.read(1 << 16) or b"").splitlines()]
