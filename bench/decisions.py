"""What it costs to decide who may serve, with wishes and without: the selection stage of the edge, for endpoints that all have traffic."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from statistics import median

from gateway.domain.catalog import Catalog, DataPolicy, Endpoint, Model, Price, Provider
from gateway.domain.keys import KeyRecord
from gateway.edge.selection import select
from gateway.edge.snapshots import Choice, choices_of
from gateway.routing.router import Router
from gateway.settings import Routing
from gateway.wire.envelope import Envelope, parse

ENDPOINTS = 8
TARGET_US = 10.0
PER_S = 2000.0  # decisions a second of the router's own clock: traffic is shared out anew as often as it would be
BATCH = 200  # as long as 0.1 s of that clock
MODELS = ("acme/large", "acme/small")
KEY = KeyRecord(digest="d", account_id="user", name="bench", label="sk")
WISHES: dict[str, dict[str, object]] = {
    "none": {},
    "sort by price": {"provider": {"sort": "price"}},
    "sort by latency": {"provider": {"sort": {"by": "latency", "partition": "model"}}},
    "sort by throughput": {"provider": {"sort": "throughput"}},
    ":nitro": {"model": "acme/large:nitro"},
    ":floor": {"model": "acme/large:floor"},
    "order": {"provider": {"order": ["p3", "p4"]}},
    "only": {"provider": {"only": ["p1", "p2"]}},
    "ignore": {"provider": {"ignore": ["p1"]}},
    "data_collection": {"provider": {"data_collection": "deny"}},
    "zdr": {"provider": {"zdr": True}},
    "quantizations": {"provider": {"quantizations": ["fp8"]}},
    "require_parameters": {"provider": {"require_parameters": True}},
    "max_price": {"provider": {"max_price": {"prompt": 5}}},
    "preferred_max_latency": {"provider": {"preferred_max_latency": {"p90": 2}}},
    "preferred speed that some miss": {"provider": {"preferred_max_latency": {"p50": 0.4}}},
    "two models": {"models": [MODELS[1]]},
    "two models, sorted": {"models": [MODELS[1]], "provider": {"sort": "price"}},
    "two models, sorted together": {"models": [MODELS[1]], "provider": {"sort": {"by": "price", "partition": "none"}}},
}


def decisions_us(batches: int) -> dict[str, float]:
    """By wish, the median of so many batches, in microseconds: the wishes are read, and the endpoints put in order."""
    router, clock = _router(), [1000.0]
    envelopes = {name: _envelope(fields) for name, fields in WISHES.items()}
    _traffic(router, clock)
    took: dict[str, list[float]] = {name: [] for name in WISHES}
    for _ in range(batches):
        for name, envelope in envelopes.items():
            took[name].append(_batch_us(lambda at_s, envelope=envelope: select(envelope, KEY, "", router, at_s), clock))  # type: ignore[misc]
    return {name: median(values) for name, values in took.items()}


def _batch_us(decide: Callable[[float], object], clock: list[float]) -> float:
    now_s = clock[0]
    began = time.perf_counter_ns()
    for step in range(BATCH):
        decide(now_s + step / PER_S)
    took_us = (time.perf_counter_ns() - began) / BATCH / 1000
    clock[0] = now_s + BATCH / PER_S
    return took_us


def _envelope(fields: dict[str, object]) -> Envelope:
    body = {"model": MODELS[0], "messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 64, "seed": 1, **fields}
    return parse(json.dumps(body).encode(), "chat")


def _router() -> Router[Choice]:
    providers = {
        f"p{number}": Provider(
            slug=f"p{number}",
            name=f"P{number}",
            base_url="http://127.0.0.1:1/v1",
            data=DataPolicy(trains=False, retains=number % 2 == 1, zdr=number % 2 == 0),
        )
        for number in range(ENDPOINTS)
    }
    models = {name: _model(name) for name in MODELS}
    catalog = Catalog(revision="bench", providers=providers, models=models)
    router: Router[Choice] = Router(Routing())
    router.replace(catalog, choices_of(catalog, router, lambda endpoint: True))
    return router


def _model(name: str) -> Model:
    endpoints = tuple(
        Endpoint(
            id=f"{name}@p{number}",
            model_id=name,
            provider=f"p{number}",
            tag=f"p{number}",
            upstream_model="m",
            price=Price(prompt=(10 + number) * 10**8, completion=(10 + number) * 10**8),
            context_length=8192,
            quantization="fp8" if number % 2 else "bf16",
            supported_parameters=("max_tokens", "seed"),
        )
        for number in range(ENDPOINTS)
    )
    return Model(id=name, canonical_slug=name, name=name, endpoints=endpoints, context_length=8192)


def _traffic(router: Router[Choice], clock: list[float]) -> None:
    """Half a minute of it to each endpoint."""
    rng = random.Random(1)
    for _ in range(60):
        for model in router.catalog.models.values():
            for number, endpoint in enumerate(model.endpoints):
                live = router.live(endpoint)
                attempt, first_s = live.begin(clock[0], stream=True), (0.3 + number / 50) * rng.lognormvariate(0, 0.2)
                live.first_content(attempt, clock[0] + first_s, 100)
                live.succeeded(attempt, clock[0] + first_s + 1.0, tokens=50, gen_s=1.0)
        clock[0] += 0.5
