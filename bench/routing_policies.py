"""Who chooses in the simulated world: simple policies, ours, and an oracle that knows the truth."""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Callable
from itertools import accumulate

import msgspec

from bench.routing_world import Policy, World
from gateway.domain.catalog import Endpoint, Model, Price
from gateway.routing.breaker import BreakerRules
from gateway.routing.live import Changes, Live
from gateway.routing.plan import Board, Seat
from gateway.settings import Routing

Make = Callable[[World, random.Random], Policy]


class Simple:
    """What the simple policies have in common: they learn nothing unless they say so."""

    name = ""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world = world
        self.rng = rng
        self.here: list[int] = []
        self.prices: dict[int, float] = {}
        self.flips: list[float] = []

    def catalog(self, prices: dict[int, float], now_s: float) -> None:
        self.prices = prices
        self.here = list(prices)

    def choose(self, now_s: float) -> int:
        raise NotImplementedError

    def began(self, endpoint: int, now_s: float) -> int:
        return 0

    def first(self, endpoint: int, attempt: int, now_s: float) -> None:
        pass

    def ended(self, endpoint: int, attempt: int, now_s: float, tokens: int, gen_s: float) -> None:
        pass

    def failed(self, endpoint: int, attempt: int, now_s: float, retry_after_s: float | None) -> None:
        pass


class RandomChoice(Simple):
    name = "random"

    def choose(self, now_s: float) -> int:
        return self.rng.choice(self.here)


class RoundRobin(Simple):
    name = "round robin"
    _turn = 0

    def choose(self, now_s: float) -> int:
        self._turn += 1
        return self.here[self._turn % len(self.here)]


class PriceInverseSquare(Simple):
    """The contract's default balance. An endpoint that failed within 30 s goes last."""

    name = "price^-2"

    def __init__(self, world: World, rng: random.Random) -> None:
        super().__init__(world, rng)
        self._failed_at: dict[int, float] = {}

    def choose(self, now_s: float) -> int:
        stable = [i for i in self.here if now_s - self._failed_at.get(i, -math.inf) > 30.0] or self.here
        sums = list(accumulate(self.prices[i] ** -2 for i in stable))
        return stable[bisect(sums, self.rng.random() * sums[-1])]

    def failed(self, endpoint: int, attempt: int, now_s: float, retry_after_s: float | None) -> None:
        self._failed_at[endpoint] = now_s


class _Learner(Simple):
    """A moving average of the time to first token, decaying over 10 s; a failure counts as 5 s."""

    def __init__(self, world: World, rng: random.Random) -> None:
        super().__init__(world, rng)
        self.average: dict[int, tuple[float, float]] = {}  # endpoint -> (mean, told at)
        self.inflight: dict[int, int] = {}
        self._begun: dict[int, float] = {}
        self._serial = 0

    def began(self, endpoint: int, now_s: float) -> int:
        self._serial += 1
        self._begun[self._serial] = now_s
        self.inflight[endpoint] = self.inflight.get(endpoint, 0) + 1
        return self._serial

    def first(self, endpoint: int, attempt: int, now_s: float) -> None:
        self._learn(endpoint, now_s - self._begun.pop(attempt), now_s)

    def ended(self, endpoint: int, attempt: int, now_s: float, tokens: int, gen_s: float) -> None:
        self.inflight[endpoint] -= 1

    def failed(self, endpoint: int, attempt: int, now_s: float, retry_after_s: float | None) -> None:
        self.inflight[endpoint] -= 1
        del self._begun[attempt]
        self._learn(endpoint, 5.0, now_s)

    def _learn(self, endpoint: int, took_s: float, now_s: float) -> None:
        mean, told_at_s = self.average.get(endpoint, (took_s, now_s))
        weight = max(0.05, 1 - math.exp(-(now_s - told_at_s) / 10.0))
        self.average[endpoint] = (mean + weight * (took_s - mean), now_s)


class LeastLatency(_Learner):
    """The lowest average; a twentieth of requests goes anywhere, or it would never learn."""

    name = "least latency"

    def choose(self, now_s: float) -> int:
        if self.rng.random() < 0.05:
            return self.rng.choice(self.here)
        return min(self.here, key=lambda i: self.average.get(i, (0.0, 0.0))[0])


class TwoChoices(_Learner):
    """Of two random ones that with the lower average x calls under way, as Finagle's and Envoy's peak EWMA do."""

    name = "P2C EWMA"

    def choose(self, now_s: float) -> int:
        a, b = self.rng.choice(self.here), self.rng.choice(self.here)
        return a if self._cost(a) <= self._cost(b) else b

    def _cost(self, i: int) -> float:
        return self.average.get(i, (0.0, 0.0))[0] * (self.inflight.get(i, 0) + 1)


class Oracle(Simple):
    """Knows the true means of this moment."""

    name = "oracle"

    def choose(self, now_s: float) -> int:
        bests = self.world.bests(now_s)
        return min(self.here, key=lambda i: self.world.expected(i, now_s, bests))


class Named(msgspec.Struct, frozen=True):
    """A choice of the product, with its number in the simulated world."""

    model: Model
    endpoint: Endpoint
    number: int


class Ours(Simple):
    """The product's own code, from figures to choice."""

    name = "ours"

    def __init__(self, world: World, rng: random.Random) -> None:
        super().__init__(world, rng)
        self.settings = Routing()
        self._changes = Changes()
        self._lives: dict[int, Live] = {}
        self.board: Board[Named] | None = None
        self._leader = -1

    def catalog(self, prices: dict[int, float], now_s: float) -> None:
        super().catalog(prices, now_s)
        endpoints = {i: _endpoint(i, usd) for i, usd in prices.items()}
        model = Model(id="a/m", canonical_slug="a/m", name="m", endpoints=tuple(endpoints.values()), context_length=8192)
        seats = [Seat(k, Named(model, endpoints[i], i), self._live(i)) for k, i in enumerate(endpoints)]
        before, settings = self.board, self.settings
        self.board = Board(
            seats, self._changes, weights=self.world.weights, exploration_share=settings.exploration_share, ramp_s=settings.ramp_s
        )
        if before is not None:
            self.board.inherit(before)

    def _live(self, i: int) -> Live:
        live = self._lives.get(i)
        if live is None:
            live = self._lives[i] = Live(str(i), BreakerRules(), outage_s=self.settings.outage_s, changes=self._changes)
        return live

    def choose(self, now_s: float) -> int:
        assert self.board is not None
        order = self.board.all.choose(now_s, self.rng.random)
        leader = self.board.all.leader()
        number = leader.choice.number if leader is not None else -1
        if number != self._leader:
            self._leader = number
            self.flips.append(now_s)
        return order[0].number if order else self.here[0]

    def began(self, endpoint: int, now_s: float) -> int:
        return self._lives[endpoint].begin(now_s, stream=True)

    def first(self, endpoint: int, attempt: int, now_s: float) -> None:
        self._lives[endpoint].first_content(attempt, now_s)

    def ended(self, endpoint: int, attempt: int, now_s: float, tokens: int, gen_s: float) -> None:
        self._lives[endpoint].succeeded(attempt, now_s, tokens=tokens, gen_s=gen_s)

    def failed(self, endpoint: int, attempt: int, now_s: float, retry_after_s: float | None) -> None:
        if retry_after_s is not None:
            self._lives[endpoint].throttled(attempt, now_s, retry_after_s)
        else:
            self._lives[endpoint].failed(attempt, now_s)


def _endpoint(i: int, usd: float) -> Endpoint:
    nanos_per_mtok = int(usd * 1e9)
    price = Price(prompt=nanos_per_mtok, completion=nanos_per_mtok)
    return Endpoint(id=f"a/m@{i}", model_id="a/m", provider=f"p{i}", tag=f"p{i}", upstream_model="m", price=price, context_length=8192)


POLICIES: dict[str, Make] = {
    make.name: make for make in (RandomChoice, RoundRobin, PriceInverseSquare, LeastLatency, TwoChoices, Ours, Oracle)
}
SIMPLE = tuple(name for name in POLICIES if name not in (Ours.name, Oracle.name))
