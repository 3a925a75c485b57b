"""An account's requests a minute as its edge counts them: asked for ahead, taken at once, and no wall while control is silent."""

from __future__ import annotations

import pytest

from gateway.domain.catalog import Price
from gateway.domain.errors import GatewayError, RateLimited, StoreUnavailable
from gateway.edge.admission import RATE_WAIT_S, REFUSAL_S
from gateway.edge.limited import rate_limited
from gateway.edge.quotes import quote
from gateway.edge.responses import error_headers
from gateway.ledger.book import FreeHold
from gateway.link.messages import Back, Grant, Want
from gateway.settings import Limits
from gateway.wire.envelope import parse
from tests.edge.test_admission import BALANCE, KEY, MINUTE, UNLIMITED, Caller, Edge, choices

RATES = Limits(free_requests_per_day=40, free_requests_per_day_credited=90)
DAY = "free-day:user_ann:2027-01-15"
FREE = choices(Price(prompt=0, completion=0))


def paid(after: int = 0) -> str:
    """The rate's name so many minutes from the first one here."""
    return f"paid-minute:user_ann:{MINUTE // 60 + after}"


def free_minute(after: int = 0) -> str:
    return f"free-minute:user_ann:{MINUTE // 60 + after}"


@pytest.fixture
def edge() -> Edge:
    edge = Edge(RATES)
    edge.grant(10**9)
    return edge


def at_once(edge: Edge, nanos: int = 100) -> bool:
    """Whether the shortest way serves."""
    hold = edge.admission.hold_at_once(KEY, nanos, edge.now)
    if hold is not None:
        hold.release()
    return hold is not None


def ask_free(edge: Edge) -> Caller:
    caller = Caller()
    body = b'{"model":"a/b","messages":[{"role":"user","content":"x"}]}'
    edge.admission.reserve(KEY, quote(parse(body, "chat"), FREE), caller.told)
    return caller


def refused(error: GatewayError | None, limit: int, end_s: int) -> bool:
    assert isinstance(error, RateLimited), error
    headers = {"X-RateLimit-Limit": str(limit), "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(end_s * 1000)}
    assert error.metadata == {"headers": headers, "provider_name": None}
    return set(headers.items()) < set(error_headers(error))


def test_a_lease_of_a_rate_serves_its_number_and_is_asked_for_more_before_it_is_used_up(edge: Edge) -> None:
    first = edge.ask(100)
    assert first.waits and edge.wants() == [(paid(), 1)]
    edge.grant(40, paid())
    assert first.hold is not None
    served = 1
    while at_once(edge):
        served += 1
    assert served == 32 and edge.wants() == []
    assert edge.ask(100).hold is not None and edge.wants() == [(paid(), 0)]
    edge.admission.on_grant(Grant(paid(), 0))  # there is no more: what is left is served the short way
    while at_once(edge):
        served += 1
    assert served == 39 and edge.ask(100).waits
    assert edge.wants() == [(paid(), 1)]


def test_a_refusal_says_when_the_minute_ends_and_stands_for_a_moment(edge: Edge) -> None:
    edge.now += 12.0
    first = edge.ask(100)
    edge.wants()
    edge.admission.on_grant(Grant(paid(), 0, refused=True, limit=60))
    assert refused(first.error, 60, MINUTE + 60)
    assert (
        first.error is not None
        and first.error.retry_after_s == 48.0
        and first.error.message == "Rate limit exceeded: 60 requests per minute."
    )
    assert refused(edge.ask(100).error, 60, MINUTE + 60) and edge.wants() == []
    edge.now += REFUSAL_S
    assert edge.ask(100).waits and edge.wants() == [(paid(), 1)]


def test_credit_that_comes_makes_a_refusal_of_requests_be_asked_again(edge: Edge) -> None:
    edge.ask(100)
    edge.admission.on_grant(Grant(paid(), 0, refused=True, limit=60))
    edge.wants()
    edge.admission.on_funded(BALANCE)
    assert edge.ask(100).waits and edge.wants() == [(paid(), 1)]


def test_the_next_minute_is_leased_before_it_begins_and_nobody_waits_for_it(edge: Edge) -> None:
    edge.ask(100)
    edge.grant(1000, paid())
    for _ in range(300):
        assert at_once(edge)
    edge.wants()
    edge.wait(50)
    ahead = [each for each in edge.said if isinstance(each, Want) and each.resource == paid(1)]
    assert [each.at_least for each in ahead] == [0] and ahead[0].demand >= 32
    edge.grant(200, paid(1))
    edge.wait(9)
    assert edge.book.available(paid()) == 1000 - 301  # of a minute that lasts nothing goes back
    edge.wait(1)
    edge.said.clear()
    assert edge.ask(100).hold is not None and at_once(edge)
    assert edge.book.available(paid(1)) == 198 and edge.wants() == []


def test_who_asked_for_nothing_this_minute_is_leased_nothing_of_the_next(edge: Edge) -> None:
    edge.ask(100)
    edge.grant(1000, paid())
    edge.wait(50)
    edge.grant(200, paid(1))
    edge.said.clear()
    edge.wait(70)
    assert [each for each in edge.said if isinstance(each, Want)] == []


def test_rates_of_minutes_that_are_over_are_forgotten_and_nothing_is_said_of_them(edge: Edge) -> None:
    for minute in range(10):
        edge.ask(100)
        edge.grant(20, paid(minute))
        edge.wait(60)
    assert sum(name.startswith("paid-minute:") for name in edge.book.standing()) <= 4
    edge.wait(180)
    assert [name for name in edge.book.standing() if name != BALANCE] == []
    assert [each.resource for each in edge.said if isinstance(each, Back) and each.resource != BALANCE] == []


def test_money_that_is_short_takes_no_request(edge: Edge) -> None:
    edge.ask(100)
    edge.grant(5, paid())
    assert edge.book.available(paid()) == 4
    edge.admission.on_recall(BALANCE)
    poor = edge.ask(100)
    edge.refuse(0)
    assert poor.error is not None and poor.error.http_status == 402 and edge.book.available(paid()) == 4


def test_no_rate_holds_anybody_up_whose_control_is_silent_lost_or_has_no_store(edge: Edge) -> None:
    waiting = edge.ask(100)
    edge.wait(RATE_WAIT_S)
    assert waiting.hold is not None and edge.ask(100).hold is not None  # the second at once
    edge.admission.on_grant(Grant(paid(), 0, refused=True, limit=1))  # it speaks again
    assert isinstance(edge.ask(100).error, RateLimited)
    edge.now += REFUSAL_S
    waiting = edge.ask(100)
    edge.admission.on_grant(Grant(paid(), 0, unavailable=True))
    assert waiting.hold is not None
    edge.admission.on_welcome()
    waiting = edge.ask(100)
    edge.admission.on_lost()
    assert waiting.hold is not None and edge.ask(100).hold is not None
    assert isinstance(edge.ask(10**12).error, StoreUnavailable)  # but money


def test_what_is_free_counts_against_the_day_and_the_minute_and_only_if_it_was_served(edge: Edge) -> None:
    first = ask_free(edge)
    assert edge.wants() == [(free_minute(), 1)]
    edge.grant(10, free_minute())
    assert first.waits and edge.wants() == [(DAY, 1)]
    edge.grant(15, DAY)
    hold = first.hold
    assert hold is not None and hold.resources == (BALANCE, DAY)
    assert (edge.book.available(DAY), edge.book.available(free_minute()), edge.book.available(paid())) == (14, 9, 0)
    hold.release()
    assert (edge.book.available(DAY), edge.book.available(free_minute())) == (15, 10)
    served = ask_free(edge).hold
    assert isinstance(served, FreeHold)
    served.served = True
    served.settle(0)
    assert (edge.book.available(DAY), edge.book.available(free_minute())) == (14, 9)


def test_the_day_of_what_is_free_is_kept_also_while_control_is_away(edge: Edge) -> None:
    ask_free(edge)
    edge.grant(10, free_minute())
    edge.grant(1, DAY)
    edge.admission.on_lost()
    assert isinstance(ask_free(edge).error, StoreUnavailable)


@pytest.mark.parametrize(
    ("resource", "limit", "limits", "message"),
    [
        (DAY, 200, Limits(), "free-models-per-day. Add 10 credits to unlock 1000 free model requests per day"),
        (DAY, 1000, Limits(), "free-models-per-day-high-balance."),
        (DAY, 200, Limits(free_requests_per_day_credited=0), "free-models-per-day. Add 10 credits to unlock more free model requests"),
        (DAY, 200, Limits(free_requests_per_day_credited=100), "free-models-per-day."),
        (free_minute(), 20, Limits(), "free-models-per-min."),
        (paid(), 60, Limits(), "60 requests per minute."),
    ],
)
def test_a_refusal_names_the_limit_and_what_would_raise_it(resource: str, limit: int, limits: Limits, message: str) -> None:
    error = rate_limited(resource, limit, limits, MINUTE + 59.5)
    assert error.message == f"Rate limit exceeded: {message}"
    if resource != DAY:
        assert dict(error_headers(error))["Retry-After"] == "1"


def test_without_limits_nothing_is_counted() -> None:
    edge = Edge(UNLIMITED)
    edge.grant(10**9)
    assert at_once(edge) and at_once(edge, 0) and ask_free(edge).hold is not None
    assert edge.wants() == [] and edge.book.standing() == {BALANCE: 10**9}


def test_an_edge_that_leaves_gives_back_what_it_has_of_this_minute_and_the_next(edge: Edge) -> None:
    edge.ask(100)
    edge.grant(10, paid())
    edge.grant(5, paid(1))
    edge.said.clear()
    edge.admission.leave()
    assert edge.said == [Back(paid(), 9), Back(paid(1), 5)]
