"""The load generators count what they should: answers, events, errors."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from bench import wrk
from bench.behaviour import Behaviour
from bench.children import cpu_by_process
from bench.load import Paced, Target, closed_loop
from bench.probe import Wrong, probe
from bench.provider import Provider
from bench.rounds import Sample
from bench.subjects import request_body
from bench.summary import table


def target_of(provider: Provider, *, stream: bool = False, sim: str = "") -> Target:
    url = provider.url + "/v1/chat/completions"
    return Target(url=url, body=request_body("sage-1", stream, sim, 64), stream=stream, headers={"X-Load": "1"})


@pytest.mark.parametrize("framing", ["chunked", "length"])
@pytest.mark.parametrize("stream", [False, True])
async def test_closed_loop_counts_what_the_books_count(stream: bool, framing: str) -> None:
    async with Provider() as provider:
        sim = f"framing={framing}"
        report = await closed_loop(target_of(provider, stream=stream, sim=sim), connections=4, seconds=0.2)
        await provider.wait_for(lambda books: books.open_connections == 0)
        made = len(provider.books.entries)
    assert report.errors == 0
    assert 0 < made - 4 <= report.requests <= made  # one a connection may be on its way at the end
    assert 0 < report.latency_ms_p50 <= report.latency_ms_p99 <= report.latency_ms_max
    if stream:
        assert report.requests * 20 <= (report.events or 0) <= made * 20


@pytest.mark.parametrize("fault", ["status=500", "reset_after_events=3", "error_event_after=4", "refuse=true"])
async def test_closed_loop_calls_bad_answers_errors(fault: str) -> None:
    async with Provider() as provider:
        report = await closed_loop(target_of(provider, stream=True, sim=fault), connections=1, seconds=0.1)
    assert report.requests == 0
    assert report.errors > 0


async def test_paced_streams_are_counted_event_by_event() -> None:
    async with Provider() as provider:
        sim = "tokens=1000000;tokens_per_s=500"
        target = target_of(provider, stream=True, sim=sim)
        body = json.loads(target.body) | {"max_tokens": 1_000_000}
        whole = Target(url=target.url, body=json.dumps(body).encode(), stream=True)
        async with Paced(whole, streams=3) as paced:
            await provider.wait_for(lambda books: min(entry.completion_tokens for entry in books.entries) > 20)
            made = sum(entry.completion_tokens + 1 for entry in provider.books.entries)  # and the role chunk
            async with asyncio.timeout(5):
                while paced.events < made:
                    await asyncio.sleep(0.001)
            assert paced.errors == 0
        await provider.wait_for(lambda books: all(entry.cancelled for entry in books.entries))
        assert paced.events <= sum(entry.completion_tokens + 1 for entry in provider.books.entries)


async def test_wrk_reports_requests_and_statuses(tmp_path: Path) -> None:
    if not wrk.is_installed():
        pytest.skip("wrk is not installed (Debian package wrk)")
    async with Provider() as provider:
        good = await wrk.run_wrk(target_of(provider, stream=True), connections=2, seconds=1, core=None, folder=tmp_path)
        assert good.requests > 0
        assert good.errors == 0
        assert ("X-Load", "1") in provider.books.entries[-1].headers
        bad = await wrk.run_wrk(target_of(provider, sim="status=500"), connections=1, seconds=1, core=None, folder=tmp_path)
        assert bad.errors == bad.requests > 0


async def test_probe_refuses_wrong_answers() -> None:
    async with Provider(behaviour=Behaviour(tokens=2)) as provider:
        assert await probe(target_of(provider), text=" the river", tokens=2) == 0
        assert await probe(target_of(provider, stream=True), text=" the river", tokens=2) == 6
        for sim in ("tokens=3", "usage=none", "framing=close", "status=500"):
            with pytest.raises(Wrong):
                await probe(target_of(provider, stream=True, sim=sim), text=" the river", tokens=2)


def test_request_has_its_size() -> None:
    assert len(request_body("sage-1", True, "", 64)) == 1024
    assert len(request_body("bench/sage-1", False, "tokens=3", 64)) == 1024


def test_table_takes_ratios_round_by_round() -> None:
    rates = {"envoy": (100.0, 200.0, 400.0), "gateway": (150.0, 200.0, 200.0)}
    samples = [
        Sample(kind="json", subject=name, round=number, per_s=rate, cpu_us=10.0, cpu_us_by_process={}, errors=0)
        for name, own in rates.items()
        for number, rate in enumerate(own)
    ]
    row = table(samples).splitlines()[-1].split()
    assert row[:3] == ["gateway", "200", "150-200"]
    assert row[-2] == "1.00"  # the median of 1.5, 1.0 and 0.5


async def test_cpu_of_a_process_grows_with_its_work() -> None:
    process = await asyncio.create_subprocess_exec("sh", "-c", "while :; do :; done")
    try:
        async with asyncio.timeout(10):
            while cpu_by_process(process.pid).get("sh", 0.0) < 0.02:
                await asyncio.sleep(0.01)
    finally:
        process.kill()
        await process.wait()
