"""The bench's own arithmetic and loads say what is so."""

from __future__ import annotations

import os
import re
import time

import aiohttp
import msgspec
import pytest

from bench import micro, overload, soak
from bench import open_loop as open_loop_module
from bench.behaviour import Behaviour
from bench.books import Entry
from bench.chart import bars
from bench.compare import compare, permutation_p
from bench.load import Target
from bench.machine import Machine
from bench.open_loop import open_loop
from bench.provider import Provider
from bench.rounds import Sample
from bench.subjects import request_body
from bench.summary import ratios
from gateway.domain.generation import Generation

MACHINE = Machine(cpu="", cores=2, subject_core=0, load_core=1, kernel="", python="", packages={}, commit="", load_average_1m=0.0)


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


@pytest.mark.parametrize(("kind", "there", "elsewhere"), [("json", "answer rewrite", "splice"), ("sse", "splice", "answer rewrite")])
async def test_stages_sum_to_the_whole_and_are_all_there(kind: str, there: str, elsewhere: str) -> None:
    found = await micro.measure(kind, requests=20, runs=40)
    assert found.missing == []
    assert sum(found.stages.values()) == pytest.approx(found.whole, rel=0.1)
    assert {"parse", "hold", "journal write", "known head", "intake", there} <= set(found.stages)
    assert elsewhere not in found.stages
    assert found.stages[micro.REST] < 0.4 * found.whole  # the stages are those of the whole path


def test_soak_finds_money_that_differs() -> None:
    entry = Entry(sequence=1, model="m", answer_id="a", stream=False, prompt_tokens=10, completion_tokens=2, started=0.0, finished=1.0)
    right = Generation(id="gen-1", account_id="u", key_digest="d", created_at_ms=1, model="m", upstream_id="a", charged_nanos=1800)
    assert soak.differences({"a": entry}, [right]) == []
    assert "charged twice" in soak.differences({"a": entry}, [right, right])[0]
    assert "not in the ledger" in soak.differences({"a": entry}, [])[0]
    assert "does not know" in soak.differences({}, [right])[0]
    assert "made 1800" in soak.differences({"a": entry}, [msgspec.structs.replace(right, charged_nanos=1801)])[0]


def test_soak_finds_what_grows() -> None:
    level = [20, 22, 21, 19, 20] * 10
    assert soak.grown(level) == 0
    assert soak.grown([each + place for place, each in enumerate(level)]) > 25
    looks = [soak.Look(at_s=float(second), rss_mib={"edge": 40 + second / 60, "control": 50.0}, fds=1, tasks=1) for second in range(120)]
    assert soak.slope_mib(looks) == {"edge": pytest.approx(1.0), "control": pytest.approx(0.0)}
    steady = [(ended / 10, 0.01) for ended in range(1000)]
    assert soak.p99_by_window(steady) == pytest.approx([10.0] * soak.WINDOWS)
    assert soak.p99_by_window([*steady, *[(99.0, 0.5)] * 10])[-1] == pytest.approx(500.0)


def offer(times: float, goodput: float, p99_ms: float, *, bare: int = 0, core: float = 1.0) -> overload.Offer:
    return overload.Offer(
        times=times, due_per_s=times * 1000, sent_per_s=1000, goodput_per_s=goodput, refused_per_s=times * 1000 - goodput,
        accepted_ms_p50=p99_ms, accepted_ms_p99=p99_ms, refused_ms_p99=1, unsent=0, bare=bare, broken=0, late_ms_p99=1,
        cpu_us={"gateway.edge": core * 1000},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("loaded", "promise"),
    [
        (offer(5, 810, 590), None),
        (offer(5, 790, 590), "goodput is 79%"),
        (offer(2, 890, 590), "goodput is 89%"),
        (offer(2, 500, 590, core=0.5), None),  # the machine gave it half of its core: so it could do half
        (offer(2, 950, 610), "p99 of accepted requests is 610 ms, not 600"),
        (offer(2, 950, 590, bare=1), "1 refusals without Retry-After"),
    ],
)
def test_overload_tells_which_promise_is_broken(loaded: overload.Offer, promise: str | None) -> None:
    found = overload.Overload(
        date="", command=[], machine=MACHINE, capacity_per_s=1000, capacity_per_cpu_s=1000, tokens=1, ttft_ms=1,
        offers=[offer(0.2, 200, 300, core=0.2), loaded],
    )  # fmt: skip
    lines = overload.broken_promises(found)
    assert [promise in line for line in lines] == [True] if promise else lines == []


async def test_overload_counts_what_could_not_be_sent_and_what_was_refused() -> None:
    """Two connections at a provider that takes 200 ms can ask ten times a second; the rest is not sent, and a 429 needs a Retry-After."""
    async with Provider(behaviour=Behaviour(ttft_ms=200, tokens=2)) as provider:
        target = Target(url=provider.url + "/v1/chat/completions", body=request_body("sage-1", True, "", 64), stream=True)
        slow = await overload.offered(target, times=1, rate_per_s=100, connections=2, seconds=0.5, pid=os.getpid())
        provider.set_behaviour(Behaviour(status=429, retry_after="1"))
        readable = await overload.offered(target, times=1, rate_per_s=100, connections=2, seconds=0.1, pid=os.getpid())
        provider.set_behaviour(Behaviour(status=429))
        bare = await overload.offered(target, times=1, rate_per_s=100, connections=2, seconds=0.1, pid=os.getpid())
    assert set(slow.statuses) == {"200"} and slow.unsent > 50 and slow.accepted_ms_p50 >= 199
    assert set(readable.statuses) == {"429"} and readable.bare == 0 and readable.refused_per_s > 0
    assert bare.bare == bare.statuses["429"] > 0


async def test_delayed_answers_that_are_kept_ready_keep_their_rhythm_and_have_ids_of_their_own() -> None:
    async with Provider(behaviour=Behaviour(headers_delay_ms=20, ttft_ms=60, tokens=3)) as provider:
        ids = set()
        for _ in range(2):
            began = time.monotonic()
            async with aiohttp.ClientSession() as session:
                url, body = provider.url + "/v1/chat/completions", request_body("sage-1", True, "", 64)
                async with session.post(url, data=body) as answer:
                    head_s = time.monotonic() - began
                    text = await answer.text()
            assert head_s + 0.001 >= 0.02 and head_s < time.monotonic() - began
            assert time.monotonic() - began + 0.001 >= 0.08
            assert text.endswith("data: [DONE]\n\n")
            ids.update(re.findall(r'"id":"([^"]+)"', text))
        assert len(ids) == 2 == len(provider.books.entries)
        assert {entry.completion_tokens for entry in provider.books.entries} == {3}
