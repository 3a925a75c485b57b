"""What cannot be put on record: it takes neither credit nor the others' answers and marks with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio

from gateway.edge.exchange import InferenceExchange
from gateway.edge.journal import Journal
from gateway.edge.report import ExchangeReport
from gateway.edge.running import Running
from gateway.edge.settlement import Settlement
from gateway.ledger.book import Book
from gateway.log import Log
from tests.edge.stage import ROLE, SSE_HEAD, chunk, event, plain
from tests.money.shop import PLAIN, Shop, opened, priced

HUGE = "q" * 1_048_300  # fits an event, and with what is around it no record of the journal


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    async with opened(tmp_path_factory.mktemp("unsettled")) as running:
        yield running
        assert (await running.verify())["ok"]
        assert not [line for line in running.gateway.log if line["event"] in ("settlement_failed", "stream_not_marked")]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_finish_reason_without_measure_is_charged_like_any_other(shop: Shop, stream: bool) -> None:
    """The record keeps as much of the provider's word as it keeps of any other text that is not ours."""
    if stream:
        shop.raw.answers(
            SSE_HEAD, *map(chunk, (event(ROLE), event({"content": "a"}), event({}, finish=HUGE), b"data: [DONE]\n\n")), b"0\r\n\r\n"
        )
    else:
        choice = {"index": 0, "message": {"role": "assistant", "content": "aaaa"}, "finish_reason": HUGE}
        shop.raw.answers(plain(json.dumps({"id": "u", "model": "raw", "choices": [choice]}).encode()))
    before = await shop.used()
    answered = await shop.ask("acme/raw", stream=stream)
    assert answered.status == 200
    record = await shop.record(answered.headers["X-Generation-Id"])
    assert record.finish_reason == "stop" and record.native_finish_reason == "q" * 256
    assert record.charged_nanos == priced(PLAIN, {"prompt": 2, "completion": 1})
    await shop.until_used(before + record.charged_nanos)


class Noted:
    """Stands for the journal and the report: what they were told."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def append(self, lines: list[bytes], then: Callable[[], None]) -> None:
        self.lines += lines
        then()


def settlement(noted: Noted) -> Settlement:
    return Settlement(journal=cast(Journal, noted), report=cast(ExchangeReport, noted), charge_broken_streams=False, log=Log("test", fd=-1))


class Broken:
    """An exchange of which nothing can be told."""

    generation_id = "gen-1-x"
    error = None
    is_streaming = True

    def __init__(self, **members: Any) -> None:
        self.__dict__.update(members)
        self.abandoned = False

    @property
    def attempt(self) -> object:
        raise RuntimeError("a bug")

    def abandon(self) -> None:
        self.abandoned = True


async def test_what_cannot_be_settled_holds_nothing_any_more() -> None:
    book = Book()
    book.granted("balance:a", 100, 0.0)
    noted = Noted()
    broken = Broken(hold=book.hold(("balance:a",), 60, 0.0))
    ends = settlement(noted)
    ends.end(cast(InferenceExchange, broken))
    await asyncio.sleep(0)
    assert broken.abandoned and not noted.lines
    lease = book.lease("balance:a")
    assert lease is not None and (lease.held, lease.holds, lease.spent, lease.available) == (0, 0, 0, 100)


async def test_a_stream_that_cannot_be_marked_ends_neither_the_sweep_nor_the_next_one(tmp_path: Path) -> None:
    streams = [Broken(hold=None)] * 450  # more than one turn of the loop marks
    asked: list[int] = []

    def told() -> list[InferenceExchange]:
        asked.append(len(streams))
        return cast(list[InferenceExchange], streams)

    running = Running(tmp_path, slot=0, incarnation="a", settlement=settlement(Noted()), streams=told, log=Log("test", fd=-1))
    for _ in range(2):
        running.sweep()
        for _ in range(5):
            await asyncio.sleep(0)
    assert len(asked) == 2 and not list(tmp_path.iterdir())
