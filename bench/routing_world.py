"""A world of simulated endpoints in virtual time, the eight scenarios, and what a choice in it costs.

Everything follows from a seed. The noise of a request is drawn before a policy is asked, so that all policies meet the same requests.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from gateway.routing.scorer import FAILURE_COST, Weights, quality_of

Course = Callable[[float], float]  # a quantity over time, in seconds since the start

RATE_PER_S = 10.0
DURATION_S = 300.0
TOKENS_MEAN = 120.0
NOISE = 0.35  # sigma of the logarithm, of first-token times; half of it of rates


class SimEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The truth about one endpoint."""

    name: str
    price: Course  # USD per million tokens, blended
    first_s: Course
    rate: Course  # tokens per second
    failing: Course  # likelihood of a failure
    here_from_s: float = 0.0
    limit_per_s: float | None = None  # more calls than this are 429
    capacity: float = 60.0  # calls at a time that double its first-token time


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    endpoints: tuple[SimEndpoint, ...]
    fault: tuple[float, float] | None = None  # when the first endpoint is ill
    changes_s: tuple[float, ...] = ()  # when prices or endpoints change: what the catalog would tell


class Policy(Protocol):
    """Who chooses. Endpoints are numbers; calls come in order of time."""

    name: str
    flips: list[float]  # when the endpoint with the largest share changed, as far as it knows

    def catalog(self, prices: dict[int, float], now_s: float) -> None: ...
    def choose(self, now_s: float) -> int: ...
    def began(self, endpoint: int, now_s: float) -> int: ...
    def first(self, endpoint: int, attempt: int, now_s: float) -> None: ...
    def ended(self, endpoint: int, attempt: int, now_s: float, tokens: int, gen_s: float) -> None: ...
    def failed(self, endpoint: int, attempt: int, now_s: float, retry_after_s: float | None) -> None: ...


class Run(msgspec.Struct):
    """What one policy did in one scenario with one seed."""

    loss: float = 0.0
    requests: int = 0
    failures: int = 0
    chosen: list[tuple[float, int]] = []  # (time, endpoint)
    evidence_s: float | None = None  # when the first sign of the fault could be seen
    flips: list[float] = []


class World:
    """The endpoints' state while one policy runs."""

    def __init__(self, scenario: Scenario, weights: Weights) -> None:
        self.scenario = scenario
        self.weights = weights
        self.inflight = [0] * len(scenario.endpoints)
        self._left = [endpoint.limit_per_s or 0.0 for endpoint in scenario.endpoints]
        self._filled_at = [0.0] * len(scenario.endpoints)

    def here(self, now_s: float) -> list[int]:
        return [i for i, endpoint in enumerate(self.scenario.endpoints) if now_s >= endpoint.here_from_s]

    def bests(self, now_s: float) -> tuple[float, float, float]:
        """The cheapest price, the shortest first-token time, the highest rate of those that are there."""
        here = [self.scenario.endpoints[i] for i in self.here(now_s)]
        return (
            min(endpoint.price(now_s) for endpoint in here),
            min(endpoint.first_s(now_s) for endpoint in here),
            max(endpoint.rate(now_s) for endpoint in here),
        )

    def first_s(self, i: int, now_s: float) -> float:
        endpoint = self.scenario.endpoints[i]
        return endpoint.first_s(now_s) * (1 + self.inflight[i] / endpoint.capacity)

    def throttles(self, i: int, now_s: float) -> bool:
        limit = self.scenario.endpoints[i].limit_per_s
        if limit is None:
            return False
        self._left[i] = min(limit, self._left[i] + (now_s - self._filled_at[i]) * limit)
        self._filled_at[i] = now_s
        return self._left[i] < 1.0

    def take(self, i: int) -> None:
        self._left[i] -= 1.0

    def expected(self, i: int, now_s: float, bests: tuple[float, float, float]) -> float:
        """The true mean loss of a choice."""
        if self.throttles(i, now_s):
            return FAILURE_COST
        endpoint = self.scenario.endpoints[i]
        quality = self.loss(endpoint.price(now_s), self.first_s(i, now_s), endpoint.rate(now_s), bests)
        failing = endpoint.failing(now_s)
        return (1 - failing) * quality + failing * FAILURE_COST

    def loss(self, price: float, first_s: float, rate: float, bests: tuple[float, float, float]) -> float:
        return quality_of(price / bests[0], first_s / bests[1], bests[2] / rate, self.weights)


def run(scenario: Scenario, make: Callable[[World, random.Random], Policy], seed: int, weights: Weights) -> Run:
    """One policy through one scenario."""
    arrivals, noise = random.Random(f"{scenario.name} {seed}"), random.Random(f"noise {seed}")
    world = World(scenario, weights)
    policy = make(world, random.Random(f"policy {seed}"))
    result = Run(chosen=[], flips=policy.flips)
    events: list[tuple[float, int, int, int, int, float]] = []  # time, order, what, endpoint, attempt, gen_s
    changes = [0.0, *scenario.changes_s, math.inf]
    now_s = order = 0
    at_s = 0.0
    while True:
        at_s += arrivals.expovariate(RATE_PER_S)
        if at_s >= DURATION_S:
            return result
        while events and events[0][0] <= at_s:
            _tell(heapq.heappop(events), policy, world)
        while changes[now_s] <= at_s:
            policy.catalog({i: scenario.endpoints[i].price(at_s) for i in world.here(at_s)}, at_s)
            now_s += 1
        factor_first, factor_rate, luck = noise.lognormvariate(-(NOISE**2) / 2, NOISE), noise.lognormvariate(0, NOISE / 2), noise.random()
        i = policy.choose(at_s)
        bests = world.bests(at_s)
        endpoint = scenario.endpoints[i]
        attempt = policy.began(i, at_s)
        result.requests += 1
        result.chosen.append((at_s, i))
        order += 1
        if world.throttles(i, at_s):
            result.failures += 1
            result.loss += FAILURE_COST
            world.inflight[i] += 1
            heapq.heappush(events, (at_s + 0.02, order, 2, i, attempt, 1.0))
            continue
        world.take(i)
        if luck < endpoint.failing(at_s):
            result.failures += 1
            result.loss += FAILURE_COST
            world.inflight[i] += 1
            heapq.heappush(events, (at_s + 0.02, order, 2, i, attempt, 0.0))
            if result.evidence_s is None and scenario.fault is not None and at_s >= scenario.fault[0] and i == 0:
                result.evidence_s = at_s + 0.02
            continue
        first_s, rate = world.first_s(i, at_s) * factor_first, endpoint.rate(at_s) * factor_rate
        result.loss += world.loss(endpoint.price(at_s), first_s, rate, bests)
        world.inflight[i] += 1
        gen_s = TOKENS_MEAN / rate
        heapq.heappush(events, (at_s + first_s, order, 0, i, attempt, 0.0))
        heapq.heappush(events, (at_s + first_s + gen_s, order, 1, i, attempt, gen_s))
        if result.evidence_s is None and scenario.fault is not None and at_s >= scenario.fault[0] and i == 0:
            result.evidence_s = at_s + min(first_s, 3 * endpoint.first_s(scenario.fault[0] - 1.0))


def _tell(event: tuple[float, int, int, int, int, float], policy: Policy, world: World) -> None:
    at_s, _, what, i, attempt, gen_s = event
    if what == 0:
        policy.first(i, attempt, at_s)
        return
    world.inflight[i] -= 1
    if what == 1:
        policy.ended(i, attempt, at_s, int(TOKENS_MEAN), gen_s)
    else:
        policy.failed(i, attempt, at_s, 1.0 if gen_s else None)


# The scenarios. The first endpoint is the one to which things happen.


def always(value: float) -> Course:
    return lambda _: value


def between(start_s: float, end_s: float, inside: float, outside: float) -> Course:
    return lambda t: inside if start_s <= t < end_s else outside


def _endpoint(
    name: str,
    price: float | Course,
    first_s: float | Course,
    rate: float | Course,
    failing: float | Course = 0.002,
    *,
    here_from_s: float = 0.0,
    limit_per_s: float | None = None,
) -> SimEndpoint:
    price, first_s, rate, failing = (value if callable(value) else always(value) for value in (price, first_s, rate, failing))
    return SimEndpoint(
        name=name, price=price, first_s=first_s, rate=rate, failing=failing, here_from_s=here_from_s, limit_per_s=limit_per_s
    )


_OTHERS = (
    _endpoint("even", 1.2, 0.40, 70.0),
    _endpoint("quick", 2.0, 0.20, 120.0),
    _endpoint("cheap", 0.9, 1.60, 30.0),
)


def scenarios() -> tuple[Scenario, ...]:
    ill = (100.0, 160.0)

    def slope(t: float) -> float:
        if t < 60 or t >= 260:
            return 0.3
        return 0.3 * (1 + 7 * (t - 60) / 120) if t < 180 else 0.3 * 8

    def war(phase: int) -> Course:
        return lambda t: (1.0, 1.6, 0.7, 1.3)[(int(t // 30) + phase) % 4]

    return (
        Scenario(
            name="steady",
            endpoints=(_endpoint("main", 1.0, 0.3, 80.0), *_OTHERS, _endpoint("twin", 1.0, 0.45, 75.0)),
        ),
        Scenario(
            name="brown-out",
            endpoints=(_endpoint("main", 1.0, between(*ill, 3.0, 0.3), between(*ill, 20.0, 80.0)), *_OTHERS),
            fault=ill,
        ),
        Scenario(name="slow ramp", endpoints=(_endpoint("main", 1.0, slope, 80.0), *_OTHERS), fault=(60.0, 260.0)),
        Scenario(name="rate-limit wall", endpoints=(_endpoint("main", 1.0, 0.3, 80.0, limit_per_s=4.0), *_OTHERS)),
        Scenario(name="liar", endpoints=(_endpoint("liar", 0.95, 0.1, 8.0), _endpoint("main", 1.0, 0.3, 80.0), *_OTHERS)),
        Scenario(
            name="flapping",
            endpoints=(_endpoint("main", 1.0, 0.3, 80.0, lambda t: 1.0 if t % 60 >= 55 else 0.002), *_OTHERS),
        ),
        Scenario(
            name="newcomer",
            endpoints=(_endpoint("new", 0.8, 0.25, 90.0, here_from_s=100.0), _endpoint("main", 1.0, 0.3, 80.0), *_OTHERS),
            changes_s=(100.0,),
        ),
        Scenario(
            name="price war",
            endpoints=tuple(_endpoint(f"p{i}", war(i), 0.3 + 0.05 * i, 80.0 - 5 * i) for i in range(4)),
            changes_s=tuple(float(t) for t in range(30, 300, 30)),
        ),
    )


def share_of(chosen: Sequence[tuple[float, int]], endpoint: int, start_s: float, end_s: float) -> float | None:
    """The share of an endpoint among the choices within a stretch of time; None: there were none."""
    within = [i for at_s, i in chosen if start_s <= at_s < end_s]
    return within.count(endpoint) / len(within) if within else None
