"""LED-03: no stream is paid for beyond what was held for it, and a provider that knows no end is not listened to without end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gateway.domain.money import format_usd
from gateway.edge.bounds import EVENTS_PER_TOKEN, MORE_TOKENS
from tests.conftest import eventually
from tests.edge.stage import ROLE, SSE_HEAD, RawCall, chunk, event
from tests.edge.test_hang_ups import leave
from tests.money.shop import PLAIN, Account, Shop, nanos, opened, priced, sim, stored
from tests.provider_caller import Caller, datas
from tests.timing import again_if_untimely, in_time

pytestmark = pytest.mark.asyncio(loop_scope="module")

CEILING = 8192  # completion tokens, of `acme/plain`
MOST_NANOS = CEILING * 2000  # and the prompt
STREAMS, PAID = 20, 2
CANCELLED_S = 0.5
SWEPT_S = 2.5  # two looks at all streams, whenever this one began


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    async with opened(tmp_path_factory.mktemp("endless")) as running:
        yield running
        assert (await running.verify())["ok"]


class Endless:
    """A provider that sends one event on and on, `events_per_s` of them; `left_at` is when its connection was closed."""

    def __init__(self, told: bytes, *, events_per_s: int) -> None:
        self._block = chunk(told * max(1, events_per_s // 20))
        self.left_at = 0.0

    async def __call__(self, call: RawCall) -> None:
        await call.write(SSE_HEAD, chunk(event(ROLE)))
        left = asyncio.ensure_future(call.left())
        while not left.done():
            call.writer.write(self._block)
            await asyncio.wait((left,), timeout=0.05)
        self.left_at = left.result()


async def read_all(shop: Shop, model: str, **asked: Any) -> tuple[str, list[Any], float]:
    """A stream read to its end: its generation, its events, and when that was."""
    async with shop.asking(model, stream=True, **asked) as caller:
        status, headers = await caller.head()
        assert status == 200
        body = b""
        async with asyncio.timeout(20.0):
            while data := await caller.chunk():
                body += data
        return headers["x-generation-id"], datas(body), time.monotonic()


@pytest.mark.parametrize("told", ["an event a token", "usage in each event", "usage without our count of events"])
@again_if_untimely
async def test_led_03_a_provider_that_goes_on_past_max_tokens_is_cut_off(shop: Shop, told: str) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 400 if told.startswith("usage w") else 9}
    # Far fewer events than the usage says that there are tokens, or none that says anything of usage.
    endless = {
        "an event a token": Endless(event({"content": "go on"}), events_per_s=2000),
        "usage in each event": Endless(event({"content": "go on"}, usage=usage), events_per_s=2000),
        "usage without our count of events": Endless(event({"content": "go on"}, usage=usage), events_per_s=20),
    }[told]
    shop.raw.script = endless
    generation, events, ended_at = await read_all(shop, "acme/raw", max_tokens=10)
    last = events[-1]  # and no [DONE] after it
    assert (last["error"]["code"], last["error"]["metadata"]["error_type"]) == (402, "payment_required")
    assert last["choices"][0]["finish_reason"] == "error" and "10 completion tokens" in last["error"]["message"]
    await eventually(lambda: bool(endless.left_at))
    in_time(endless.left_at - ended_at, CANCELLED_S, at_least=-CANCELLED_S)
    record = await shop.record(generation)
    assert record.usage is not None and (record.error, record.finish_reason, record.status) == ("overrun", "error", 402)
    assert record.usage.completion_tokens == 10 and record.usage.estimated
    assert record.charged_nanos == priced(PLAIN, {"prompt": record.usage.prompt_tokens, "completion": 10})
    assert [each.outcome for each in record.attempts] == ["overrun"]
    assert nanos((await shop.generation(generation))["total_cost"]) == record.charged_nanos
    logged = await asyncio.to_thread(shop.gateway.logged, "exchange", generation=generation)
    assert (logged["status"], logged["error"], logged["fault"]) == (402, "overrun", "upstream")


@pytest.mark.parametrize("what", ["letter by letter", "reasoning beside its limit", "a count of more than asked"])
async def test_led_03_an_honest_provider_is_not_cut_off(shop: Shop, what: str) -> None:
    """It sends more events than tokens were asked for, or tells of more, and is looked at more than once before it ends."""
    asked: dict[str, Any] = {"max_tokens": 100}
    said, count = event({"content": "x"}), EVENTS_PER_TOKEN * 100 + MORE_TOKENS - 100
    if what.startswith("reason"):
        said, count = event({"reasoning": "x"}), CEILING
        asked["reasoning"] = {"effort": "high"}
    elif what.startswith("a count"):
        said, count = event({"content": "x"}, usage={"prompt_tokens": 3, "completion_tokens": 110}), 50

    async def script(call: RawCall) -> None:
        await call.write(SSE_HEAD, chunk(event(ROLE)), chunk(said * count))
        await asyncio.sleep(SWEPT_S)  # while it thinks
        await call.write(chunk(event({"content": "."})), chunk(event({}, finish="stop")), chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n")

    shop.raw.script = script
    generation, events, _ = await read_all(shop, "acme/raw", **asked)
    assert events[-1] == "[DONE]"
    record = await shop.record(generation)
    assert (record.error, record.finish_reason) == ("", "stop")


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
