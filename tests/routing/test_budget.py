"""Retries cannot multiply load (UPS-04), yet a lone call finds its fallback; a first token has its time; hedges have their budget."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.budget import HEDGE_S_MIN, HEDGES_SAVED, HedgeBudget, RetryBudget, backoff_s, first_token_limit_s, hedge_after_s
from gateway.routing.figures import Percentiles


def budgets(edges: int, share: float = 0.2, per_s: float = 10.0) -> list[RetryBudget]:
    return [RetryBudget(share=share, per_s=per_s, edges=edges, attempts_max=6, now_s=0.0) for _ in range(edges)]


@pytest.mark.parametrize("edges", [1, 4, 16])
def test_ups_04_all_attempts_stay_within_a_fifth_and_ten_a_second_over_all_edges(edges: int) -> None:
    fleet, granted = budgets(edges), 0
    for request in range(2000):  # 100 a second for 20 s, each wanting five retries
        budget = fleet[request % edges]
        budget.request()
        granted += sum(budget.take(request / 100) for _ in range(5))
    assert granted <= 0.2 * 2000 + 10 * 20 + edges * 5  # the last term: every edge keeps a lone call's fallbacks ready
    assert granted >= 0.95 * 0.2 * 2000


def test_a_lone_call_gets_every_fallback_it_may_have() -> None:
    for budget in budgets(8):
        for second in range(1, 100, 20):
            budget.request()
            assert all(budget.take(float(second)) for _ in range(5))


def test_idle_time_is_not_saved_up() -> None:
    (budget,) = budgets(1)
    granted = 0
    while budget.take(100_000.0):
        granted += 1
    assert granted <= 10


def test_a_budget_of_nothing_grants_nothing() -> None:
    budget = RetryBudget(share=0.0, per_s=0.0, edges=1, attempts_max=6, now_s=0.0)
    budget.request()
    assert not budget.take(50.0)


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_backoff_is_full_jitter_and_bounded(retry: int, chance: float) -> None:
    assert 0 <= backoff_s(retry, lambda: chance) <= 1.0


def test_backoff_doubles_on_average() -> None:
    rng = random.Random(1)
    means = [sum(backoff_s(retry, rng.random) for _ in range(2000)) / 2000 for retry in range(3)]
    assert means[1] == pytest.approx(2 * means[0], rel=0.1)
    assert means[2] == pytest.approx(2 * means[1], rel=0.1)


P99_OF_FIVE = Percentiles(0.5, 1.0, 2.0, 5.0)
QUICK = Percentiles(0.1, 0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("percentiles", "mean_tokens", "prompt_tokens", "reasoning", "limit_s"),
    [
        (None, 0.0, 100, False, 15.0),  # cold
        (P99_OF_FIVE, 100.0, 100, False, 10.0),
        (P99_OF_FIVE, 100.0, 10, False, 10.0),  # a short prompt gets no less
        (P99_OF_FIVE, 100.0, 1000, False, 100.0),  # a long one in proportion
        (P99_OF_FIVE, 0.0, 1000, False, 10.0),  # sizes never told
        (QUICK, 100.0, 100, False, 3.0),  # never under 3 s
        (QUICK, 100.0, 100, True, 120.0),  # reasoning is never cut under two minutes
        (None, 0.0, 100, True, 120.0),
    ],
)
def test_the_first_token_limit_follows_the_endpoints_own_p99(
    percentiles: Percentiles | None, mean_tokens: float, prompt_tokens: int, reasoning: bool, limit_s: float
) -> None:
    assert first_token_limit_s(percentiles, mean_tokens, prompt_tokens=prompt_tokens, reasoning=reasoning) == limit_s


# Hedges

steps = st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9), st.floats(0, 1)), max_size=60)


@given(st.decimals("0.000000001", "100", places=9), steps)
def test_at_no_moment_more_is_spent_on_hedges_than_their_share_of_what_came_in(
    percent: object, steps: list[tuple[int, int, float]]
) -> None:
    """Also while some are under way for which the most is taken, of which a part comes back."""
    budget, earned, spent = HedgeBudget(str(percent)), 0, Fraction(0)
    share = Fraction(str(percent)) / 100
    for charged, most, used in steps:
        budget.earn(charged, 10**12)
        earned += charged
        if budget.take(most):
            assert spent + most <= share * earned
            budget.give_back(most - int(most * used))
            spent += int(most * used)
    left = share * earned - spent
    assert left >= 0
    assert budget.take(int(left)) and not budget.take(1)  # nothing was lost to rounding


def test_a_hedge_budget_begins_empty_and_saves_for_ten() -> None:
    budget = HedgeBudget("50")
    assert not budget.take(1)
    for _ in range(1000):
        budget.earn(1000, 700)
    assert budget.take(HEDGES_SAVED * 700) and not budget.take(1)


def test_what_cheap_requests_may_save_takes_nothing_from_what_a_dear_one_has_saved() -> None:
    budget = HedgeBudget("100")
    budget.earn(50_000, 10_000)
    budget.earn(10, 10)
    assert budget.take(50_000) and not budget.take(1)


@pytest.mark.parametrize(
    ("percentiles", "mean_tokens", "prompt_tokens", "after_s"),
    [
        (None, 0.0, 100, 0.0),  # unknown
        (Percentiles(1.0, 1.0, 1.0, 1.0), 100.0, 100, 1.5),  # where all take the same time
        (Percentiles(0.1, 0.5, 1.0, 8.0), 100.0, 100, 2.0),
        (Percentiles(0.1, 0.5, 1.0, 8.0), 100.0, 10, 2.0),  # a short prompt gets no less
        (Percentiles(0.1, 0.5, 1.0, 8.0), 100.0, 300, 6.0),  # a long one in proportion
        (Percentiles(0.001, 0.001, 0.001, 0.001), 0.0, 100, HEDGE_S_MIN),
    ],
)
def test_a_stream_is_slow_after_its_endpoints_p95(
    percentiles: Percentiles | None, mean_tokens: float, prompt_tokens: int, after_s: float
) -> None:
    assert hedge_after_s(percentiles, mean_tokens, prompt_tokens=prompt_tokens) == pytest.approx(after_s)


@pytest.mark.parametrize("draw", [lambda rng: rng.lognormvariate(-1, 0.8), lambda rng: rng.expovariate(3.0)])
def test_the_p95_between_p90_and_p99_is_the_true_one_within_a_tenth(draw: Callable[[random.Random], float]) -> None:
    rng = random.Random(3)
    drawn = sorted(draw(rng) for _ in range(20_000))
    percentiles = Percentiles(*(drawn[int(share * len(drawn))] for share in (0.5, 0.75, 0.9, 0.99)))
    assert hedge_after_s(percentiles, 0.0, prompt_tokens=0) == pytest.approx(drawn[19_000], rel=0.1)
