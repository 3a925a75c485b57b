"""The breaker ejects on errors alone, lets single probes find out, and lets everybody come back."""

from __future__ import annotations

from gateway.routing.breaker import STEADY_S, Breaker, BreakerRules
from gateway.routing.pace import PLATEAU_S, Pace

RULES = BreakerRules(failures=5, error_share=0.5, attempts_min=20, open_s=5.0, open_s_max=30.0)


def failing(breaker: Breaker, now_s: float, times: int = 5) -> None:
    for number in range(times):
        breaker.failed(1000 + number, now_s, attempts=number + 1, failed=number + 1)


def probe_fails(breaker: Breaker, now_s: float, attempt: int) -> None:
    assert breaker.admits_probe(now_s)
    breaker.began(attempt)
    assert breaker.failed(attempt, now_s, attempts=1, failed=1)


def test_five_failures_in_a_row_eject_and_one_success_between_does_not() -> None:
    breaker = Breaker(RULES)
    failing(breaker, 0.0, 4)
    breaker.succeeded(1, 0.0)
    failing(breaker, 0.0, 4)
    assert breaker.admits(0.0)
    failing(breaker, 0.0, 1)
    assert not breaker.admits(0.0)


def test_one_failure_in_a_hundred_stays_in_and_sixty_do_not() -> None:
    breaker = Breaker(RULES)
    assert not breaker.failed(1, 0.0, attempts=100, failed=1)
    breaker.succeeded(2, 0.0)
    assert breaker.failed(3, 0.0, attempts=100, failed=60)


def test_two_failures_of_three_are_no_statistic() -> None:
    breaker = Breaker(RULES)
    assert not breaker.failed(1, 0.0, attempts=3, failed=2)


def test_one_probe_at_a_time_after_the_ejection() -> None:
    breaker = Breaker(RULES)
    failing(breaker, 0.0)
    assert not breaker.admits_probe(4.9)
    assert breaker.admits_probe(5.0)
    breaker.began(7)
    assert not breaker.admits_probe(5.0)
    assert not breaker.admits(5.0)
    assert breaker.succeeded(7, 5.5)
    assert breaker.admits(5.5)


def test_a_probe_without_a_verdict_lets_the_next_one_go() -> None:
    breaker = Breaker(RULES)
    failing(breaker, 0.0)
    breaker.began(7)
    breaker.told_nothing(7)
    assert breaker.admits_probe(5.0)


def test_an_old_attempt_that_ends_well_heals_nothing() -> None:
    breaker = Breaker(RULES)
    failing(breaker, 0.0)
    assert not breaker.succeeded(3, 1.0)
    assert not breaker.admits(1.0)


def test_ejection_grows_with_repetition_up_to_its_bound_and_is_forgotten_after_a_steady_minute() -> None:
    breaker = Breaker(RULES)
    failing(breaker, 0.0)
    now_s, lengths = 5.0, []
    for attempt in range(1, 6):
        probe_fails(breaker, now_s, attempt)
        lengths.append(breaker.ejected_until_s - now_s)
        now_s = breaker.ejected_until_s
    assert lengths == [10.0, 20.0, 30.0, 30.0, 30.0]
    breaker.began(99)
    assert breaker.succeeded(99, now_s)
    now_s += STEADY_S + 1
    failing(breaker, now_s)
    assert breaker.ejected_until_s - now_s == 5.0


def test_failures_in_panic_do_not_lengthen_the_ejection() -> None:
    breaker = Breaker(RULES)
    failing(breaker, 0.0)
    for attempt in range(1, 50):
        breaker.began(attempt)
        breaker.failed(attempt, 1.0, attempts=1, failed=1)
    assert breaker.admits_probe(5.0)


def test_of_two_retry_afters_the_longer_deadline_wins() -> None:
    breaker = Breaker(RULES)
    breaker.throttled(1, 0.0, 60.0)
    breaker.throttled(2, 0.1, 1.0)
    assert not breaker.admits(59.9)
    assert not breaker.admits_probe(59.9)
    assert breaker.admits(60.0)


def test_a_retry_after_of_a_century_is_not_believed() -> None:
    breaker = Breaker(RULES)
    breaker.throttled(1, 0.0, 3e9)
    assert breaker.admits(3600.0)


def test_a_429_without_a_time_rests_the_endpoint_for_longer_each_time() -> None:
    breaker = Breaker(RULES)
    breaker.throttled(1, 0.0, None)
    assert not breaker.admits(0.9)
    assert breaker.admits(1.0)
    breaker.throttled(2, 1.0, None)
    assert not breaker.admits(2.9)
    assert breaker.admits(3.0)
    breaker.succeeded(3, 3.0)
    breaker.throttled(4, 4.0, None)
    assert breaker.admits(5.0)


def test_the_pace_stays_under_a_limit_that_was_met_and_tries_again_later() -> None:
    pace = Pace()
    assert all(pace.take(now_s / 100) for now_s in range(100))
    pace.met_limit(1.0, 10.0)
    taken = sum(pace.take(1.0 + step / 100) for step in range(1000))
    assert 80 <= taken <= 96  # ten seconds at 85 to 94 % of ten a second, and half a second's burst
    assert pace.per_s(1.0 + PLATEAU_S) == 10.0
    assert pace.per_s(1.0 + 2 * PLATEAU_S) > 11.0
    assert pace.per_s(1.0 + 10 * PLATEAU_S) == float("inf")
