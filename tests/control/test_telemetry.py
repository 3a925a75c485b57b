"""Fleet totals: whole, never falling, cheap to show."""

from __future__ import annotations

import random
import time
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from gateway.control import telemetry as telemetry_module
from gateway.control.telemetry import Telemetry
from gateway.control.totals import render, sum_up
from gateway.domain.metrics import METRICS, HistogramSample, Samples
from gateway.edge.telemetry import Telemetry as EdgeTelemetry
from gateway.log import Log

REQUESTS = "gateway_requests_total"


def parts(path: Path, control: str = "control-1", supervisor: str = "supervisor-1") -> Telemetry:
    telemetry = Telemetry(path / "telemetry", incarnation=control, supervisor=supervisor, log=Log("test"))
    telemetry.load()
    return telemetry


def requests(count: float, inflight: float = 0) -> Samples:
    lag = HistogramSample([int(count)] + [0] * len(METRICS["gateway_loop_lag_seconds"].buckets), count / 10)
    return Samples(
        numbers={REQUESTS: {("chat", "200"): count}, "gateway_inflight_requests": {(): inflight}},
        histograms={"gateway_loop_lag_seconds": {("edge",): lag}},
    )


def figures(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def total(text: bytes, name: str = REQUESTS) -> float:
    return sum(value for (sample, _), value in figures(text).items() if sample == name)


async def test_totals_are_the_sum_of_the_living_and_the_dead(tmp_path: Path) -> None:
    telemetry = parts(tmp_path)
    for edge, count in (("a", 3), ("b", 4)):
        telemetry.joined(edge)
        telemetry.report(edge, requests(count, inflight=2))
    shown = await telemetry.scrape()
    assert total(shown) == 7
    assert total(shown, "gateway_inflight_requests") == 4
    assert total(shown, "gateway_edges") == 2
    telemetry.left("a")  # not known dead: stays counted, its gauges do not
    shown = await telemetry.scrape()
    assert (total(shown), total(shown, "gateway_inflight_requests")) == (7, 2)
    telemetry.joined("a")  # it was alive and goes on counting
    telemetry.report("a", requests(5))
    assert total(await telemetry.scrape()) == 9
    telemetry.reaped("b")  # dead, but its link may still hold its last report
    telemetry.report("b", requests(6))
    telemetry.left("b")
    assert total(await telemetry.scrape()) == 11
    assert total(await telemetry.scrape(), "gateway_loop_lag_seconds_count") >= 11


async def test_nothing_falls_over_restarts_of_edges_and_control(tmp_path: Path) -> None:
    rng = random.Random(7)
    telemetry, control, highest = parts(tmp_path), 1, 0.0
    alive: dict[str, float] = {}
    counted_by_the_dead, born = 0.0, 0
    for _ in range(300):
        step = rng.random()
        if step < 0.2 or not alive:
            born += 1
            alive[f"edge-{born}"] = 0
            telemetry.joined(f"edge-{born}")
        elif step < 0.7:
            edge = rng.choice(list(alive))
            alive[edge] += rng.randint(1, 9)
            telemetry.report(edge, requests(alive[edge]))
        elif step < 0.8:
            edge = rng.choice(list(alive))
            counted_by_the_dead += alive.pop(edge)
            for end in rng.sample([telemetry.left, telemetry.reaped], 2):
                end(edge)
        elif step < 0.9:
            shown = total(await telemetry.scrape())
            assert shown >= highest
            highest = shown
        else:  # control is killed, whatever it had not shown yet; edges join the next one and report all again
            control += 1
            await telemetry.save()
            telemetry = parts(tmp_path, f"control-{control}")
            for edge, count in alive.items():
                telemetry.joined(edge)
                telemetry.report(edge, requests(count))
    assert total(await telemetry.scrape()) == counted_by_the_dead + sum(alive.values())


async def test_a_control_killed_right_after_a_scrape_begins_with_what_it_showed(tmp_path: Path) -> None:
    telemetry = parts(tmp_path)
    telemetry.joined("a")
    telemetry.report("a", requests(5))
    telemetry.count("gateway_catalog_reloads_total", "ok")
    telemetry.supervisor_started({"edge": 2, "control": 1})
    before = figures(await telemetry.scrape())
    after = figures(await parts(tmp_path, "control-2").scrape())
    counters = {key: value for key, value in before.items() if METRICS.get(key[0]) is None or METRICS[key[0]].kind != "gauge"}
    assert all(after[key] >= value for key, value in counters.items())
    assert total(await parts(tmp_path, "control-3").scrape(), "gateway_edges") == 0


async def test_supervisor_figures_are_totals_of_each_supervisor(tmp_path: Path) -> None:
    telemetry = parts(tmp_path)
    for edges in (1, 2, 2):  # cumulative, said again to each new control
        telemetry.supervisor_started({"edge": edges})
    assert total(await telemetry.scrape(), "gateway_process_starts_total") == 2
    telemetry = parts(tmp_path, "control-2", "supervisor-2")  # the whole gateway was started anew
    telemetry.supervisor_started({"edge": 1})
    assert total(await telemetry.scrape(), "gateway_process_starts_total") == 3


async def test_processes_kept_apart_are_bounded(tmp_path: Path) -> None:
    telemetry = parts(tmp_path)
    for number in range(3 * telemetry_module.GONE_MAX):
        telemetry.joined(f"edge-{number}")
        telemetry.report(f"edge-{number}", requests(1))
        telemetry.left(f"edge-{number}")
    assert len(telemetry._processes) == telemetry_module.GONE_MAX
    telemetry.joined("edge-0")  # retired long ago: its figures are in the sum already
    telemetry.report("edge-0", requests(1))
    assert total(await telemetry.scrape()) == 3 * telemetry_module.GONE_MAX


async def test_what_is_not_in_the_table_is_left_out(tmp_path: Path) -> None:
    telemetry = parts(tmp_path)
    telemetry.joined("a")
    telemetry.report(
        "a",
        Samples(
            numbers={"gateway_unknown_total": {(): 1}, REQUESTS: {("only one label",): 1}, "gateway_overhead_seconds": {(): 1}},
            histograms={"gateway_overhead_seconds": {(): HistogramSample([1, 2], 1)}, REQUESTS: {(): HistogramSample([1], 1)}},
        ),
    )
    assert total(await telemetry.scrape()) == 0
    assert b"unknown" not in await telemetry.scrape()


async def test_a_file_that_cannot_be_read_or_written_does_not_stop_metrics(tmp_path: Path) -> None:
    (tmp_path / "telemetry").write_bytes(b"\xffgarbage")
    telemetry = parts(tmp_path)
    telemetry.joined("a")
    telemetry.report("a", requests(5))
    (tmp_path / "telemetry.draft").mkdir()
    assert total(await telemetry.scrape()) == 5


def test_names_and_types_are_those_of_the_table() -> None:
    text = render(sum_up([requests(1)], [])).decode()
    for metric in METRICS.values():
        assert f"# HELP {metric.name} " in text
    assert "# TYPE gen_ai_client_token_usage untyped" in text
    assert 'gateway_requests_total{code="200",route="chat"} 1.0' in text
    assert text.count('le="+Inf"') == 1


def test_five_thousand_series_render_within_100_ms() -> None:
    bounds = len(METRICS["gen_ai_server_request_duration_seconds"].buckets) + 1
    samples = Samples(
        numbers={"gateway_attempts_total": {(f"p{i}", f"acme/m{i}", "ok"): float(i) for i in range(2500)}},
        histograms={
            "gen_ai_server_request_duration_seconds": {(f"p{i}", f"acme/m{i}"): HistogramSample([1] * bounds, 1.0) for i in range(115)},
        },
    )
    took_s = []
    for _ in range(5):
        started_s = time.perf_counter()
        text = render(sum_up([samples], [samples, samples]))
        took_s.append(time.perf_counter() - started_s)
    assert text.count(b"\n") > 5000
    assert min(took_s) < 0.1  # the best of five: other processes of this machine are not what is measured


async def test_an_edge_tells_only_what_changed_and_control_shows_all(tmp_path: Path) -> None:
    """Whatever is counted in between, control's figures are the edge's; a control that has just started is told everything."""
    rng = random.Random(3)
    edge = EdgeTelemetry()
    calls: dict[tuple[str, ...], float] = {("north",): 2.0}
    edge.gauge("gateway_inflight_attempts", lambda: dict(calls))
    models = [f"acme/m{number}" for number in range(20)]
    seconds = [edge.histogram("gen_ai_server_request_duration_seconds", "north", model) for model in models]
    tokens = [edge.counter("gen_ai_client_token_usage", "north", model, "input") for model in models]
    control = parts(tmp_path)
    control.joined("a")
    control.report("a", edge.changed())
    for step in range(60):
        for number in rng.sample(range(20), rng.choice((0, 1, 5))):
            tokens[number].add(rng.randint(1, 9))
            seconds[number].observe(rng.choice((0.01, 0.3, 40.0)))
        calls.pop(rng.choice([("north",), ("south",)]), None)
        calls[rng.choice([("north",), ("south",)])] = float(step)
        if rng.random() < 0.5:
            edge.fold()
        if rng.random() < 0.1:
            control = parts(tmp_path / str(step), "control-2")
            control.joined("a")
            edge.joined()
        told = edge.changed()
        assert len(told.numbers.get("gen_ai_client_token_usage", {})) <= 5 or told.whole
        control.report("a", told)
        shown = figures(await control.scrape())
        for number, model in enumerate(models):
            of_model = {key: value for key, value in shown.items() if ("model", model) in key[1]}
            read = [value for (name, _), value in of_model.items() if name == "gen_ai_client_token_usage"]
            assert read == [tokens[number].value]
            counts = [value for (name, _), value in of_model.items() if name == "gen_ai_server_request_duration_seconds_count"]
            assert counts == [float(sum(seconds[number].counts))]
        inflight = {key[1][0][1]: value for key, value in shown.items() if key[0] == "gateway_inflight_attempts"}
        assert inflight == {labels[0]: value for labels, value in calls.items()}  # a label that is gone from a gauge is not shown
    assert edge.changed().histograms == {} and edge.changed().numbers == {}
