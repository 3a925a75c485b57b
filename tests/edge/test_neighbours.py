"""A flood of one account waits behind itself: everybody else's requests go between."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

from tests.edge.stage import HELLO, Stage
from tests.money.shop import Account, opened
from tests.provider_caller import Caller

FLOOD = 400


def ask(caller: Caller, model: str, account: Account) -> None:
    body = {"model": model, "messages": HELLO, "max_tokens": 4}
    caller.send(body, "/api/v1/chat/completions", f"Authorization: Bearer {account.key}\r\n")


async def test_ovl_02_who_floods_waits_behind_himself(tmp_path: Path) -> None:
    async with opened(tmp_path) as shop, contextlib.AsyncExitStack() as stack:
        neighbour = await shop.new_account("neighbour@example.com", "1")
        stage = Stage(shop.gateway, shop.raw, shop.cheap, shop.good, shop.session)
        callers = [await stack.enter_async_context(stage.connected()) for _ in range(FLOOD + 1)]
        for caller in callers[:-1]:  # so that keys, credit and connections are at hand
            ask(caller, "acme/plain", shop.account)
        ask(callers[-1], "acme/tiny", neighbour)
        assert {(await caller.answer())[0] for caller in callers} == {200}
        before = shop.good.books.entries[-1].sequence
        shop.edge.send_signal(signal.SIGSTOP)
        try:
            for caller in callers[:-1]:
                ask(caller, "acme/plain", shop.account)
                await caller.writer.drain()
            await asyncio.sleep(0)
            ask(callers[-1], "acme/tiny", neighbour)
        finally:
            shop.edge.send_signal(signal.SIGCONT)
        assert {(await caller.answer())[0] for caller in callers} == {200}
        order = [entry.model for entry in shop.good.books.entries if entry.sequence > before]
        assert len(order) == FLOOD + 1
        (place,) = [at for at, model in enumerate(order) if model != order[0]]
        assert place < FLOOD / 2, place  # last come, and long not last served
