"""The scorer, from figures alone: what is dear, slow or failing gets less; noise changes little, a real change all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.figures import NOTHING, Counts, Figures
from gateway.routing.scorer import FAILURE_COST, Estimate, Weights, estimate, score, shares, shares_by_price

WEIGHTS = Weights()
USD = 10**9


def served(calls: int, first_s: float = 0.3, *, failed: int = 0, rate: float = 50.0) -> Counts:
    return Counts(
        ok=calls,
        failed=failed,
        firsts=calls,
        first_us=int(calls * first_s * 1e6),
        answers=calls,
        tokens=calls * 100,
        gen_us=int(calls * 100 / rate * 1e6),
    )


def figures(now: Counts, short: Counts, minute: Counts, long: Counts, in_a_row: int = 0) -> Figures:
    return Figures((now, short, minute, long), failures_in_a_row=in_a_row)


def first_s(*windows: Counts) -> float:
    found = estimate(Figures((windows[0], windows[1], windows[2], windows[3]))).first_s
    assert found is not None
    return found


def test_nothing_seen_is_nothing_known() -> None:
    unseen = estimate(Figures())
    assert (unseen.first_s, unseen.token_s, unseen.known) == (None, None, False)
    assert unseen.failure < 0.05


def test_a_quiet_endpoint_is_judged_by_minutes() -> None:
    assert first_s(served(2, 0.5), served(5, 0.4), served(40, 0.32), served(200, 0.3)) == pytest.approx(0.3)


def test_one_that_just_became_slow_is_judged_by_seconds() -> None:
    assert first_s(served(5, 3.0), served(40, 0.6), served(600, 0.32), served(3000, 0.3)) == pytest.approx(3.0)


def test_one_that_just_healed_is_judged_by_seconds_too() -> None:
    assert first_s(served(4, 0.3), served(4, 0.3), served(6, 2.0), served(30, 3.0)) == pytest.approx(0.3)


def test_a_slow_drift_is_followed_by_the_minute() -> None:
    assert first_s(NOTHING, NOTHING, served(600, 0.45), served(3000, 0.3)) == pytest.approx(0.45)


def test_two_failures_in_a_row_of_one_that_never_fails_are_no_accident() -> None:
    long = served(500)
    assert estimate(figures(NOTHING, served(20), served(100), long, in_a_row=1)).failure < 0.01
    assert estimate(figures(NOTHING, served(20), served(100), long, in_a_row=2)).failure > 0.6


def test_two_failures_in_a_row_of_one_that_often_fails_are_one() -> None:
    often = served(400, failed=100)
    assert estimate(figures(NOTHING, NOTHING, NOTHING, often, in_a_row=2)).failure == pytest.approx(0.2, abs=0.02)


def test_ups_06_a_fast_failure_never_looks_like_speed() -> None:
    fails_at_once = Figures((Counts(failed=5), Counts(failed=20), Counts(failed=20), Counts(failed=20)), failures_in_a_row=20)
    serves = figures(served(5), served(20), served(20), served(20))
    bad, good = score([USD, USD], [estimate(fails_at_once), estimate(serves)], WEIGHTS)
    assert estimate(fails_at_once).first_s is None
    assert bad.cost > 5 * good.cost


seconds = st.floats(min_value=0.01, max_value=30.0)
estimates = st.builds(
    Estimate, first_s=seconds | st.none(), token_s=seconds | st.none(), failure=st.floats(0.001, 1.0), known=st.booleans()
)
endpoints = st.lists(st.tuples(st.integers(0, 100 * USD), estimates), min_size=1, max_size=8)


@given(endpoints)
def test_costs_start_at_one_and_failing_is_never_cheaper(given_endpoints: list[tuple[int, Estimate]]) -> None:
    prices = [price for price, _ in given_endpoints]
    for scored in score(prices, [each for _, each in given_endpoints], WEIGHTS):
        assert scored.cost >= 1.0 - 1e-9
        assert min(scored.price_ratio, scored.first_ratio, scored.token_ratio) >= 1.0
        if scored.estimate.failure > 0.999:
            assert scored.cost >= FAILURE_COST * 0.99


@given(endpoints, st.integers(1, 50 * USD))
def test_a_higher_price_never_lowers_a_cost(given_endpoints: list[tuple[int, Estimate]], dearer: int) -> None:
    prices = [price for price, _ in given_endpoints]
    known = [each for _, each in given_endpoints]
    raised = [prices[0] + dearer, *prices[1:]]
    before, after = score(prices, known, WEIGHTS), score(raised, known, WEIGHTS)
    if len(prices) > 1:
        assert after[0].cost / after[1].cost >= before[0].cost / before[1].cost * (1 - 1e-9)


@given(st.lists(st.floats(1.0, 1000.0), min_size=1, max_size=8), st.data())
def test_shares_add_up_and_a_lower_cost_never_gets_less(costs: list[float], data: st.DataObject) -> None:
    incumbent = data.draw(st.none() | st.integers(0, len(costs) - 1))
    found = shares(costs, [1.0] * len(costs), incumbent)
    assert sum(found) == pytest.approx(1.0)
    by_cost = sorted((cost, -share) for i, (cost, share) in enumerate(zip(costs, found, strict=True)) if i != incumbent)
    assert [-share for _, share in by_cost] == sorted((-share for _, share in by_cost), reverse=True)


def test_a_challenger_must_be_clearly_better() -> None:
    assert shares([1.0, 0.995], [1.0, 1.0], incumbent=0)[0] > 0.5
    assert shares([1.0, 0.9], [1.0, 1.0], incumbent=0)[0] < 0.2


def test_while_only_prices_are_known_the_balance_is_the_contracts() -> None:
    found = shares_by_price([1 * USD, 3 * USD], [0.004, 0.004])
    assert found[0] / found[1] == pytest.approx(9.0, rel=0.01)


def test_weights_of_zero_ignore_what_they_weigh() -> None:
    slow, quick = Estimate(9.0, 0.01, 0.01, True), Estimate(0.1, 0.01, 0.01, True)
    by_price = score([USD, 2 * USD], [slow, quick], Weights(price=1.0, latency=0.0, throughput=0.0))
    assert by_price[0].cost < by_price[1].cost
    by_speed = score([USD, 2 * USD], [slow, quick], Weights(price=0.0, latency=1.0, throughput=0.0))
    assert by_speed[0].cost > by_speed[1].cost
    assert all(each.cost >= 1.0 for each in score([USD, 2 * USD], [slow, quick], Weights(0.0, 0.0, 0.0)))


def test_a_free_endpoint_wins_by_price() -> None:
    free, paid = score([0, USD], [Estimate(known=True), Estimate(known=True)], WEIGHTS)
    assert free.cost < paid.cost < float("inf")
