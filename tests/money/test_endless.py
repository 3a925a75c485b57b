"""LED-03: the most a request can cost is always known, since a model has a ceiling or at least a context length: so nothing is overshot."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from gateway.domain.money import format_usd
from tests.conftest import eventually
from tests.edge.test_hang_ups import leave
from tests.money.shop import Account, Shop, nanos, opened, sim, stored
from tests.provider_caller import Caller
from tests.timing import again_if_untimely, in_time

CEILING = 8192  # completion tokens, of `acme/plain`
MOST_NANOS = CEILING * 2000  # and the prompt
STREAMS, PAID = 20, 2
CANCELLED_S = 0.5


@again_if_untimely
async def test_led_03_endless_streams_without_max_tokens_cost_no_more_than_was_held(tmp_path: Path) -> None:
    async with opened(tmp_path / str(len(list(tmp_path.iterdir())))) as shop:
        credit = PAID * MOST_NANOS + MOST_NANOS // 2
        account = await shop.new_account("endless@example.com", format_usd(credit))
        left = await asyncio.gather(*(_stream(shop, account) for _ in range(STREAMS)))
        admitted = [at for at in left if at is not None]
        assert len(admitted) == PAID  # all others were told that it does not suffice: 402
        calls = [entry for entry in shop.good.books.entries if entry.stream]
        assert len(calls) == PAID
        await eventually(lambda: all(entry.cancelled for entry in calls))
        charged: list[int] = []
        async with asyncio.timeout(10.0):
            while len(charged) < PAID:
                charged = [each.charged_nanos for each in stored(shop.gateway).values() if each.account_id == account.id]
                await asyncio.sleep(0.05)
        assert all(MOST_NANOS <= each <= MOST_NANOS + 1000 * 1000 for each in charged)  # to the ceiling, and not beyond
        told = await shop.get("credits", account)
        assert nanos(told["total_credits"]) - nanos(told["total_usage"]) == credit - sum(charged) >= 0
        assert (await shop.verify())["ok"]
        for entry, at in zip(sorted(entry.cancelled or 0.0 for entry in calls), sorted(admitted), strict=True):
            in_time(entry - at, CANCELLED_S, at_least=-CANCELLED_S)


async def _stream(shop: Shop, account: Account) -> float | None:
    """One endless stream, read past the ceiling and left; when. None: refused."""
    async with shop.asking("acme/plain", account, stream=True, **sim(tokens=100_000_000)) as caller:
        status, _ = await caller.head()
        if status != 200:
            assert status == 402
            return None
        await _read(caller, CEILING + 500)
        leave(caller, "close")
        return time.monotonic()


async def _read(caller: Caller, events: int) -> None:
    seen = 0
    async with asyncio.timeout(30.0):
        while seen < events:
            seen += (await caller.chunk()).count(b'"content":" ')
