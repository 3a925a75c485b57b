"""The points of a cost curve are what they say."""

from __future__ import annotations

import argparse
import resource
from pathlib import Path

import pytest

from bench import gateway, scale
from bench.load import Target
from gateway.config import load_settings, read_catalog


@pytest.mark.parametrize(("endpoints", "rivals", "sizes"), [(1, 10, [1]), (10, 10, [10]), (25, 10, [10, 10, 5]), (30, 30, [30])])
def test_a_catalog_has_so_many_endpoints_and_each_model_is_asked_for(tmp_path: Path, endpoints: int, rivals: int, sizes: list[int]) -> None:
    (tmp_path / "gateway.toml").write_text(scale.SETTINGS)
    (tmp_path / "catalog.toml").write_text(scale.catalog_of("http://127.0.0.1:1", endpoints, rivals))
    environ = {gateway.KEY_VARIABLE: "bench"}
    catalog, problems = read_catalog(load_settings(tmp_path / "gateway.toml", environ), environ)
    assert problems == []
    assert [len(model.endpoints) for model in catalog.models.values()] == sizes
    target = Target(url="http://127.0.0.1:1/api/v1/chat/completions", body=b"")
    requests = list(scale.requests_of(target, ["key"], scale.models_of(endpoints, rivals)))
    assert len(requests) == len(sizes)
    for model, request in zip(catalog.models, requests, strict=True):
        assert f'"{model}"'.encode() in request


def wished(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**{"curves": ["streams", "keys"], "top": 1.0, "ends": False, **given})


def test_streams_end_where_descriptors_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.scale.resource.getrlimit", lambda which: (1024, 20_000))
    assert [number for curve, number in scale.plan(wished()) if curve == "streams"] == [1, 10, 100, 1000, 9936]
    monkeypatch.setattr("bench.scale.resource.getrlimit", lambda which: (1024, resource.RLIM_INFINITY))
    assert scale.plan(wished())[4] == ("streams", 10_000)
    assert scale.plan(wished(ends=True)) == [("streams", 1), ("streams", 10_000), ("keys", 1), ("keys", 1000), ("keys", 100_000)]
    assert scale.plan(wished(top=0.01))[-1] == ("keys", 1000)


def test_a_change_is_that_of_the_cost_of_a_request() -> None:
    points = [
        scale.Point(curve="keys", number=number, cpu_us=cost, rss_mib=1, setup_s=1)
        for number, cost in ((1, 90.0), (1000, 100.0), (100_000, 105.0))
    ]
    assert scale.changes(points) == {"keys": pytest.approx(0.05)}
    assert scale.changes(points[:2]) == {}
    assert scale.show(points).splitlines()[-1].split()[:4] == ["keys", "100,000", "105", "1.17"]
