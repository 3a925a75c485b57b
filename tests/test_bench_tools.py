"""The bench's own arithmetic and loads say what is so."""

from __future__ import annotations

import msgspec
import pytest

from bench import micro, soak
from bench import open_loop as open_loop_module
from bench.behaviour import Behaviour
from bench.books import Entry
from bench.chart import bars
from bench.compare import compare, permutation_p
from bench.load import Target
from bench.open_loop import open_loop
from bench.provider import Provider
from bench.rounds import Sample
from bench.subjects import request_body
from bench.summary import ratios
from gateway.domain.generation import Generation


def samples(**rates: list[float]) -> list[Sample]:
    return [
        Sample(kind="json", subject=name, round=number, per_s=rate, cpu_us=1e6 / rate, cpu_us_by_process={}, errors=0)
        for name, own in rates.items()
        for number, rate in enumerate(own)
    ]


def word(a: list[Sample], b: list[Sample]) -> str:
    return next(each.word for each in compare(a, b) if each.subject == "gateway" and each.measure.startswith("per_s"))


def test_verdict_sees_a_change_and_not_the_noise() -> None:
    calm = [100.0, 200.0, 400.0]  # the machine's own speed, from round to round
    before = samples(envoy=calm, gateway=[50.0, 101.0, 199.0])
    assert word(before, samples(envoy=[400.0, 100.0, 200.0], gateway=[199.0, 50.0, 101.0])) == "same"
    assert word(before, samples(envoy=calm, gateway=[60.0, 121.0, 239.0])) == "better"
    assert word(before, samples(envoy=calm, gateway=[40.0, 81.0, 160.0])) == "worse"
    assert word(before, samples(envoy=calm, gateway=[20.0, 120.0, 300.0])) == "unclear"


def test_permutation_test_counts_all_hands() -> None:
    assert permutation_p([1, 2, 3], [11, 12, 13]) == pytest.approx(0.1)  # 2 of 20
    assert permutation_p([1, 1], [1, 1]) == 1


def test_cpu_that_grows_is_worse() -> None:
    verdicts = compare(samples(gateway=[100.0, 101.0, 102.0]), samples(gateway=[50.0, 51.0, 52.0]))
    assert {(each.measure, each.word) for each in verdicts} == {("per_s", "worse"), ("cpu_us", "worse")}


def test_ratio_and_chart_are_of_the_gateway_to_each_peer() -> None:
    found = ratios(samples(envoy=[100.0, 100.0], litellm=[1.0, 1.0], gateway=[150.0, 150.0]))
    assert found == {"envoy": {"JSON, requests/s": 1.5}, "litellm": {"JSON, requests/s": 150.0}}
    drawn = bars("times", found)
    assert drawn.startswith("<svg") and ">150.00<" in drawn and ">litellm<" in drawn


async def test_open_loop_keeps_its_rate_and_counts_the_wait() -> None:
    """One connection and answers of 20 ms at 100 requests a second: a closed loop would ask half as often and see 20 ms."""
    async with Provider(behaviour=Behaviour(ttft_ms=20)) as provider:
        target = Target(url=provider.url + "/v1/chat/completions", body=request_body("sage-1", False, "", 64))
        report = await open_loop(target, rate_per_s=100, connections=1, seconds=0.4)
    assert (report.requests, report.errors) == (40, 0)
    assert report.latency_ms_max > 100  # the last was due at 0.4 s and answered after 0.8 s
    assert report.late_ms_p99 is not None and report.late_ms_p99 > 100


async def test_open_loop_tells_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_loop_module, "DRAIN_S_MAX", 0.1)  # for answers that no connection is left to ask for
    async with Provider(behaviour=Behaviour(status=500)) as provider:
        target = Target(url=provider.url + "/v1/chat/completions", body=request_body("sage-1", False, "", 64))
        report = await open_loop(target, rate_per_s=100, connections=2, seconds=0.1)
    assert report.requests == 0
    assert report.errors >= 2


async def test_stages_sum_to_the_whole_and_are_all_there() -> None:
    stages, whole, missing = await micro.measure("sse", requests=20, runs=1)
    assert missing == []
    assert sum(stages.values()) == pytest.approx(whole)
    assert {"parse", "hold", "journal write", "splice"} <= set(stages)
    assert "answer rewrite" not in stages  # is of whole answers


def test_soak_finds_money_that_differs() -> None:
    entry = Entry(sequence=1, model="m", answer_id="a", stream=False, prompt_tokens=10, completion_tokens=2, started=0.0, finished=1.0)
    right = Generation(id="gen-1", account_id="u", key_digest="d", created_at_ms=1, model="m", upstream_id="a", charged_nanos=1800)
    assert soak.differences({"a": entry}, [right]) == []
    assert "charged twice" in soak.differences({"a": entry}, [right, right])[0]
    assert "not in the ledger" in soak.differences({"a": entry}, [])[0]
    assert "does not know" in soak.differences({}, [right])[0]
    assert "made 1800" in soak.differences({"a": entry}, [msgspec.structs.replace(right, charged_nanos=1801)])[0]
