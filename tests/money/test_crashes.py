"""Finished is charged, once, whoever dies (LED-06); and what could not be charged is not begun."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from gateway.domain.money import format_usd
from tests.conftest import eventually
from tests.money.shop import PLAIN, opened, priced, sim, stored
from tests.money.test_refusals import ASKED, HOLD_NANOS, SPENDS_IT_ALL

BACK_S = 10.0


async def test_led_06_a_killed_edge_charges_what_it_finished_once_and_leaves_the_rest_usable(tmp_path: Path) -> None:
    """Control is held still, so that the journal alone knows of 50 finished answers when the edge dies."""
    async with opened(tmp_path, settings={"server": {"hang_s": 0}}) as shop:
        account = await shop.new_account("eve@example.com", format_usd(100 * HOLD_NANOS))
        first = await shop.ask(account=account, **SPENDS_IT_ALL)  # the edge knows the key, and has a lease
        control, edge = shop.gateway.logged("process_ready", role="control")["child"], shop.edge.pid
        held = [shop.asking("acme/plain", stream=True, **sim(ttft_ms=60_000)) for _ in range(3)]
        for each in held:
            await each.__aenter__()
        await eventually(lambda: len(shop.good.books.entries) >= 4)
        os.kill(control, signal.SIGSTOP)
        answered = await asyncio.gather(*(shop.ask(account=account, stream=bool(n % 2), **SPENDS_IT_ALL) for n in range(40)))
        served = [each for each in (first, *answered) if each.status == 200]
        assert {each.status for each in answered} <= {200, 503} and len(served) > 10
        os.kill(edge, signal.SIGKILL)
        killed = time.monotonic()
        os.kill(control, signal.SIGCONT)
        for each in held:
            await each.__aexit__(None, None, None)
        while await shop.used(account) != len(served) * HOLD_NANOS:
            assert time.monotonic() - killed <= BACK_S
            await asyncio.sleep(0.05)
        ids = {each.headers["X-Generation-Id"] for each in served}
        assert ids == {found.id for found in stored(shop.gateway).values() if found.account_id == account.id and found.charged_nanos}
        # All that is left can be spent, to the last nano: nothing stays in the dead edge's lease.
        left = 100 - len(served)
        while (again := await shop.ask(account=account, **SPENDS_IT_ALL)).status != 200:
            assert time.monotonic() - killed <= BACK_S
        for _ in range(left - 1):
            again = await shop.ask(account=account, **SPENDS_IT_ALL)
            assert again.status == 200, again.body
        assert (await shop.ask(account=account, **ASKED)).status == 402
        assert time.monotonic() - killed <= BACK_S
        await shop.until_used(100 * HOLD_NANOS, account)
        assert (await shop.verify())["ok"]


async def test_led_06_streams_that_die_with_their_edge_are_charged_by_their_last_second(tmp_path: Path) -> None:
    """One token each 50 ms: what was made up to a second or so before the kill is charged, never more than was made."""
    async with opened(tmp_path) as shop:
        account = await shop.new_account("ivy@example.com", "1.00")
        assert (await shop.ask(account=account)).status == 200  # whole, so that it is not among those that die
        await shop.until_used(whole := priced(PLAIN, {"prompt": 2, "completion": 16}), account)
        edge = shop.edge.pid
        running = [shop.asking("acme/plain", account, stream=True, **sim(tokens=5000, tokens_per_s=20)) for _ in range(5)]
        callers = [await each.__aenter__() for each in running]
        began = time.monotonic()
        read = [asyncio.create_task(caller.reader.read()) for caller in callers]
        await asyncio.sleep(3.5)  # the streams' own time
        os.kill(edge, signal.SIGKILL)
        lived_s = time.monotonic() - began
        received = [(await each).count(b'"content":" ') for each in read]
        for each in running:
            await each.__aexit__(None, None, None)
        await eventually(lambda: sum(found.error == "edge_lost" for found in stored(shop.gateway).values()) == 5, BACK_S)
        lost = [found for found in stored(shop.gateway).values() if found.error == "edge_lost"]
        for found in lost:
            assert found.usage is not None and found.usage.estimated and found.streamed
            assert found.charged_nanos == priced(PLAIN, {"prompt": found.usage.prompt_tokens, "completion": found.usage.completion_tokens})
            assert 20 * (lived_s - 2.5) <= found.usage.completion_tokens <= max(received)
        assert await shop.used(account) == whole + sum(found.charged_nanos for found in lost)
        assert (await shop.verify())["ok"]
        assert not list((shop.gateway.folder / "journal").glob("running-*"))  # nothing of them is left to be charged again


@pytest.mark.parametrize("fsync", ["always", "never"])
async def test_every_way_to_sync_charges_alike(tmp_path: Path, fsync: str) -> None:
    async with opened(tmp_path, settings={"journal": {"fsync": fsync}}) as shop:
        answered = await asyncio.gather(*(shop.ask(stream=bool(n % 2), **sim(prompt_tokens=n, tokens=3)) for n in range(60)))
        assert {each.status for each in answered} == {200}
        wanted = sum(priced(PLAIN, {"prompt": n, "completion": 3}) for n in range(60))
        await shop.until_used(wanted)
        assert (await shop.verify())["ok"]


async def test_what_was_acknowledged_survives_the_death_of_all_with_fsync_always(tmp_path: Path) -> None:
    async with opened(tmp_path, settings={"journal": {"fsync": "always"}}) as shop:
        answered = await asyncio.gather(*(shop.ask(stream=bool(n % 2)) for n in range(20)))
        assert {each.status for each in answered} == {200}
        shop.gateway.signal(signal.SIGKILL)
        await eventually(lambda: not shop.gateway.processes())
        await asyncio.to_thread(shop.gateway.wait)
        await asyncio.to_thread(shop.gateway.start)
        await shop.until_used(20 * priced(PLAIN, {"prompt": 2, "completion": 16}))
        assert (await shop.verify())["ok"]


# A journal that cannot be written.


async def test_a_full_disk_is_503_for_new_work_and_no_provider_is_called(tmp_path: Path) -> None:
    """The edge's files may not grow any more, which is what a full disk looks like to it."""
    async with opened(tmp_path) as shop:
        assert (await shop.ask()).status == 200
        size = max(path.stat().st_size for path in (shop.gateway.folder / "journal").iterdir())
        shop.edge.rlimit(psutil.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
        begun = await shop.ask()  # the one whose record does not fit any more
        assert begun.status in (200, 503)
        await asyncio.to_thread(shop.gateway.logged, "journal_failed")
        called = shop.good.books.requests
        for stream in (False, True):
            refused = await shop.ask(stream=stream)
            assert (refused.status, refused.error["code"]) == (503, 503) and int(refused.headers["Retry-After"]) >= 1
        assert shop.good.books.requests == called
        assert (await shop.verify())["difference_nanos"] == 0


async def test_a_journal_that_is_too_far_behind_is_503_until_control_has_read_it(tmp_path: Path) -> None:
    async with opened(tmp_path, settings={"journal": {"bytes_max": 2000}, "server": {"hang_s": 0}}) as shop:
        assert (await shop.ask()).status == 200
        control = shop.gateway.logged("process_ready", role="control")["child"]
        os.kill(control, signal.SIGSTOP)
        try:
            statuses = [(await shop.ask()).status for _ in range(30)]
        finally:
            os.kill(control, signal.SIGCONT)
        assert statuses[0] == 200 and statuses[-1] == 503 and set(statuses) == {200, 503}
        served = 1 + statuses.count(200)
        async with asyncio.timeout(20.0):
            while (await shop.ask()).status != 200:
                await asyncio.sleep(0.05)
        await shop.until_used((served + 1) * priced(PLAIN, {"prompt": 2, "completion": 16}))


async def test_a_vanished_journal_folder_does_not_lose_what_is_open(tmp_path: Path) -> None:
    """The file that an edge writes has lost its name: control cannot read it, and says so instead of losing it silently."""
    async with opened(tmp_path) as shop:
        assert (await shop.ask()).status == 200
        await shop.until_used(priced(PLAIN, {"prompt": 2, "completion": 16}))
        shutil.move(shop.gateway.folder / "journal", shop.gateway.folder / "moved")
        try:
            answered = await shop.ask()
            assert answered.status in (200, 503)
        finally:
            shutil.move(shop.gateway.folder / "moved", shop.gateway.folder / "journal")
        charges = 1 + (answered.status == 200)
        await shop.until_used(charges * priced(PLAIN, {"prompt": 2, "completion": 16}))
