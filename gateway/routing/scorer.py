"""From figures to shares: how good each endpoint of a model is, and how much traffic it should get. No clock, no I/O.

1. `estimate` reads an endpoint's figures: each is the mean over the longest window that no shorter one contradicts.
   So a quiet endpoint is judged by minutes, and one that just broke by seconds.
2. `cost` weighs price, time to first token and time per token, each as a multiple of the best endpoint's, and adds what
   a failure costs times its likelihood: an endpoint that fails fast is never quick, it is dear. 1.0 is best at everything.
3. `shares` gives nearly all traffic to the endpoints whose cost is nearly the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, sqrt

import msgspec

from gateway.routing.figures import NOTHING, Counts, Figures

FAILURE_COST = 10.0  # what a failed attempt costs, where a perfect answer costs 1
KNOWN_SAMPLES = 5  # whole answers before an endpoint's speed is believed
SURPRISE = 1.4  # times 1/sqrt(samples), in log: where a shorter window contradicts; first-token times vary by half
SURPRISE_SIGMAS = 3.0  # the same for shares of failures
CHANCE = 1e-3  # a run of failures, or of successes, that is less likely than this means that something has changed
SHARPNESS = 24.0  # an endpoint 3 % dearer gets half the share, one 10 % dearer a tenth
SHARE_MIN = 0.02  # under this part of the best one's share an endpoint is only a fallback
LOYALTY = 0.01  # how much better a challenger must be before traffic turns: noise must not flip it to and fro
RAMP_LEAST = 0.1
STAND_IN_TIMES = 2.0  # how much dearer one may be that stands in while a better one grows in
AVERSION = 4.0  # two failures in a row leave a hundredth
PRICE_FLOOR = 1_000_000.0  # nanos per million tokens, 0.001 USD: keeps ratios to a free endpoint finite
PRIOR_ATTEMPTS, PRIOR_FAILED = 5.0, 0.02  # small: who was called little must not look worse than who was called much


class Weights(msgspec.Struct, frozen=True):
    """From `[routing]`: what price and speed count for."""

    price: float = 2.0
    latency: float = 1.0
    throughput: float = 0.5


class Estimate(msgspec.Struct, frozen=True):
    """One endpoint, as far as figures tell. None: too little is known."""

    first_s: float | None = None  # seconds to the first token
    token_s: float | None = None  # seconds per output token
    failure: float = 0.004  # likelihood that the next attempt fails
    known: bool = False  # enough was served to judge its speed


UNSEEN = Estimate()
FIRSTS = tuple(Counts._fields.index(name) for name in ("firsts", "first_us", "firsts"))
TOKENS = tuple(Counts._fields.index(name) for name in ("answers", "gen_us", "tokens"))


class Scored(msgspec.Struct, frozen=True):
    """One endpoint's standing among others. Ratios are to the best one's, 1.0 and up."""

    cost: float
    price_ratio: float
    first_ratio: float
    token_ratio: float
    estimate: Estimate

    @property
    def reason(self) -> str:
        speed = f"first token x{self.first_ratio:.2f}, per token x{self.token_ratio:.2f}" if self.estimate.known else "speed unknown"
        return f"cost {self.cost:.2f}: price x{self.price_ratio:.2f}, {speed}, fails {self.estimate.failure:.1%}"


def estimate(figures: Figures) -> Estimate:
    windows = figures.windows
    longest = windows[-1]
    if longest is NOTHING:
        return UNSEEN
    first_s = _mean(windows, *FIRSTS)
    token_s = _mean(windows, *TOKENS)
    known = longest.answers >= KNOWN_SAMPLES  # whole ones: who is fast to the first token may be slow after it
    return Estimate(first_s, token_s, _failure(windows, figures.failures_in_a_row, figures.successes_in_a_row), known)


def _mean(windows: Sequence[Counts], samples: int, total: int, divisor: int) -> float | None:
    """Seconds. The places of samples, of the sum in microseconds and of what it is divided by are in each window, the shortest first."""
    longest = windows[-1]
    if not longest[total] or not longest[divisor]:
        return None
    mean = longest[total] / longest[divisor]
    for window in windows[-2::-1]:
        number = window[samples]
        if number < 2 or not window[total] or not window[divisor]:
            continue
        own = window[total] / window[divisor]
        if own != mean and abs(log(own / mean)) > SURPRISE / sqrt(number):
            mean = own
    return mean / 1e6


def _failure(windows: Sequence[Counts], failures_in_a_row: int, successes_in_a_row: int) -> float:
    longest = windows[-1]
    ok, failed, throttled = longest[:3]
    share = (failed + throttled + PRIOR_FAILED) / (ok + failed + throttled + PRIOR_ATTEMPTS)
    for window in windows[-2::-1]:
        ok, failed, throttled = window[:3]
        bad = failed + throttled
        attempts = ok + bad
        off = abs(bad - attempts * share)
        if off > SURPRISE_SIGMAS / 2 and attempts >= 2 and off > SURPRISE_SIGMAS * sqrt(attempts * share * (1 - share) + 0.25):
            share = (bad + PRIOR_FAILED) / (attempts + 2 * PRIOR_FAILED)
    run = failures_in_a_row or successes_in_a_row
    if run < 2:
        return min(share, 1.0)
    bad_before = max(0, longest.attempts - longest.ok - failures_in_a_row)
    before = (bad_before + PRIOR_FAILED) / (max(bad_before, longest.attempts - run) + PRIOR_ATTEMPTS)
    if failures_in_a_row and before**run < CHANCE:  # no bad luck any more
        share = run / (run + 1)
    elif successes_in_a_row and (1 - before) ** run < CHANCE:  # nor this good luck
        share = PRIOR_FAILED / (run + PRIOR_ATTEMPTS)
    return min(share, 1.0)


def score(prices: Sequence[int], estimates: Sequence[Estimate], weights: Weights) -> list[Scored]:
    """Every endpoint against the best of them, in the order given. `prices`: blended, in nanos per million tokens.

    What is unknown of an endpoint's speed is taken to be as the others' on average.
    """
    cheapest = min(prices) + PRICE_FLOOR
    firsts = _ratios([each.first_s for each in estimates])
    tokens = _ratios([each.token_s for each in estimates])
    scored = []
    for price, first_ratio, token_ratio, each in zip(prices, firsts, tokens, estimates, strict=True):
        price_ratio = (price + PRICE_FLOOR) / cheapest
        quality = quality_of(price_ratio, first_ratio, token_ratio, weights)
        dearer = max(0.0, FAILURE_COST - quality)
        scored.append(Scored(quality + each.failure * dearer, price_ratio, first_ratio, token_ratio, each))
    return scored


def quality_of(price_ratio: float, first_ratio: float, token_ratio: float, weights: Weights) -> float:
    """What an answer costs, as a multiple of the best in everything."""
    total = weights.price + weights.latency + weights.throughput
    if not total:
        return 1.0
    return (weights.price * price_ratio + weights.latency * first_ratio + weights.throughput * token_ratio) / total


def _ratios(values: list[float | None]) -> list[float]:
    known = [value for value in values if value is not None]
    if not known:
        return [1.0] * len(values)
    best = max(min(known), 1e-6)
    usual = sum(known) / len(known)
    return [max(1.0, (value if value is not None else usual) / best) for value in values]


def shares(costs: Sequence[float], ramps: Sequence[float], incumbent: int | None) -> list[float]:
    """How much traffic each endpoint gets; sums to 1, 0 for mere fallbacks. `ramps`: 0-1, how far each has grown in.

    One that still grows gets no more than its ramp and twice a fair share, if others that are nearly as good can take the rest.
    """
    loyal = [cost * (1 - LOYALTY) if i == incumbent else cost for i, cost in enumerate(costs)]
    found = _spread(loyal)
    if min(ramps) >= 1.0:  # as nearly always
        return found
    caps = [1.0 if ramp >= 1.0 else min(max(ramp, RAMP_LEAST), 2 / len(costs)) for ramp in ramps]
    excess = sum(max(0.0, share - cap) for share, cap in zip(found, caps, strict=True))
    if excess <= 0:
        return found
    best = min(costs)
    grown = [i for i, cap in enumerate(caps) if cap == 1.0 and costs[i] <= STAND_IN_TIMES * best]
    if not grown:
        return found
    found = [min(share, cap) for share, cap in zip(found, caps, strict=True)]
    for i, part in zip(grown, _spread([loyal[i] for i in grown]), strict=True):
        found[i] += excess * part
    return found


def _spread(costs: Sequence[float]) -> list[float]:
    best = min(costs)
    weights = [(best / cost) ** SHARPNESS for cost in costs]
    weights = [weight if weight >= SHARE_MIN else 0.0 for weight in weights]
    total = sum(weights)
    return [weight / total for weight in weights]


def shares_by_price(prices: Sequence[int], failures: Sequence[float]) -> list[float]:
    """While no speed is known: the contract's balance, 1 / price squared, away from who fails."""
    cheapest = min(prices) + PRICE_FLOOR
    weights = [
        (cheapest / (price + PRICE_FLOOR)) ** 2 * max(1 - failure, 0.01) ** AVERSION
        for price, failure in zip(prices, failures, strict=True)
    ]
    total = sum(weights)
    return [weight / total for weight in weights]
