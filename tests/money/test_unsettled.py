"""What cannot be put on record: it takes neither credit nor the others' answers and marks with it."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import psutil  # type: ignore[import-untyped]
import pytest
import pytest_asyncio

from gateway.edge.exchange import InferenceExchange
from gateway.edge.journal import Journal
from gateway.edge.report import ExchangeReport
from gateway.edge.running import Running
from gateway.edge.settlement import Settlement
from gateway.ledger.book import Book
from gateway.log import Log
from gateway.settings import Billing
from tests.conftest import eventually
from tests.edge.stage import ROLE, SSE_HEAD, chunk, event, plain
from tests.money.shop import PLAIN, Shop, nanos, opened, priced, sim

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
    return Settlement(journal=cast(Journal, noted), report=cast(ExchangeReport, noted), billing=Billing(), log=Log("test", fd=-1))


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
    lease = book.leases.get("balance:a")
    assert lease is not None and (lease.held, lease.holds, lease.spent, lease.available) == (0, 0, 0, 100)


async def test_a_stream_that_cannot_be_marked_ends_neither_the_sweep_nor_the_next_one(tmp_path: Path) -> None:
    streams = [Broken(hold=None)] * 450  # more than one turn of the loop marks
    asked: list[int] = []

    def told() -> list[InferenceExchange]:
        asked.append(len(streams))
        return cast(list[InferenceExchange], streams)

    running = Running(
        tmp_path, slot=0, incarnation="a", settlement=settlement(Noted()), look_after=lambda _: None, streams=told, log=Log("test", fd=-1)
    )
    for _ in range(2):
        running.sweep()
        for _ in range(5):
            await asyncio.sleep(0)
    assert len(asked) == 2 and not list(tmp_path.iterdir())


async def test_a_disk_that_is_full_while_streams_are_marked_costs_no_stream_and_no_charge(tmp_path: Path) -> None:
    """The edge's files may not grow, which is what a full disk looks like to it: marks and records fail, the stream goes on."""
    async with opened(tmp_path) as shop:
        account = await shop.new_account("ivy@example.com", "1.00")
        edge = shop.edge
        async with shop.asking("acme/plain", account, stream=True, **sim(tokens=60, tokens_per_s=20)) as caller:
            status, headers = await caller.head()
            assert status == 200
            await eventually(lambda: list((shop.gateway.folder / "journal").glob("running-*")))
            edge.rlimit(psutil.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))
            await asyncio.to_thread(shop.gateway.logged, "running_streams_not_marked")
            assert not list((shop.gateway.folder / "journal").glob(".running-*"))
            body = b""
            while part := await caller.chunk():
                body += part
        assert body.endswith(b"data: [DONE]\n\n")
        edge.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        charge = nanos((await shop.generation(headers["x-generation-id"], account))["total_cost"])
        assert charge == priced(PLAIN, {"prompt": 2, "completion": 60})
        await eventually(lambda: not list((shop.gateway.folder / "journal").glob("running-*")))
        os.kill(edge.pid, signal.SIGKILL)  # nothing of the stream is left to be charged on top
        await asyncio.to_thread(shop.gateway.logged, "process_ended")
        async with asyncio.timeout(20.0):
            while (await shop.ask(account=account)).status != 200:
                await asyncio.sleep(0.05)
        await shop.until_used(charge + priced(PLAIN, {"prompt": 2, "completion": 16}), account)
        assert (await shop.verify())["ok"]
