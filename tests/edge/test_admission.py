"""Leases asked for ahead of need, once for all who wait, and never for ever: admission against a control of the test's own."""

from __future__ import annotations

import pytest

from gateway.domain.catalog import Catalog, Endpoint, Model, Price
from gateway.domain.errors import GatewayError, InsufficientCredit, KeyLimitExceeded, StoreUnavailable
from gateway.domain.keys import KeyRecord
from gateway.edge.admission import AHEAD_HOLDS, REFUSAL_S, WAIT_S, Admission
from gateway.edge.quotes import Quote, quote
from gateway.edge.snapshots import Choice, choices_of
from gateway.ledger.book import Book, Hold
from gateway.link.messages import Back, Grant, Journaled, Recall, Standing, Want
from gateway.routing.router import Router
from gateway.settings import Limits, Routing
from gateway.wire.envelope import parse

BALANCE = "balance:user_ann"
LIMIT = "key:abc:"
MINUTE = 1_800_000_000  # unix time; a full minute, at which the clock here begins
UNLIMITED = Limits(free_requests_per_day=0, free_requests_per_minute=0, free_requests_per_day_credited=0, requests_per_minute_max=0)
KEY = KeyRecord(digest="abc", account_id="user_ann", name="one", label="sk")
LIMITED = KeyRecord(digest="abc", account_id="user_ann", name="one", label="sk", limit_nanos=10**9)


def choices(price: Price, **more: int) -> list[Choice]:
    endpoint = Endpoint(id="a/b@n", model_id="a/b", provider="n", tag="n", upstream_model="b", price=price, context_length=1000, **more)  # type: ignore[arg-type]
    model = Model(id="a/b", canonical_slug="a/b", name="b", context_length=1000, endpoints=(endpoint,))
    return choices_of(Catalog(revision="1", providers={}, models={"a/b": model}), Router(Routing()), lambda _: True)["a/b"]


def quoted(nanos: int) -> Quote:
    """A quote of exactly this much: the price is all in the request."""
    priced = choices(Price(prompt=0, completion=0, request=nanos * 1_000_000))
    found = quote(parse(b'{"model":"a/b","messages":[{"role":"user","content":"x"}]}', "chat"), priced)
    assert found.nanos == nanos
    return found


class Caller:
    """What one request was told."""

    def __init__(self) -> None:
        self.hold: Hold | None = None
        self.error: GatewayError | None = None

    def told(self, hold: Hold | None, error: GatewayError | None) -> None:
        assert self.hold is None and self.error is None, "told twice"
        self.hold, self.error = hold, error

    @property
    def waits(self) -> bool:
        return self.hold is None and self.error is None


class Edge:
    """Admission with its book, a clock, and what it says to control."""

    def __init__(self, limits: Limits = UNLIMITED) -> None:
        self.now = 1000.0
        self.said: list[Want | Back | Standing | Journaled] = []
        self.book = Book()
        self.admission = Admission(
            book=self.book, send=self.said.append, limits=limits, now=lambda: self.now, wall=lambda: MINUTE + self.now - 1000.0
        )
        self.admission.on_welcome()
        self.said.clear()

    def ask(self, nanos: int, key: KeyRecord = KEY) -> Caller:
        caller = Caller()
        self.admission.reserve(key, quoted(nanos), caller.told)
        return caller

    def wants(self) -> list[tuple[str, int]]:
        """What was asked for since the last look."""
        found = [(each.resource, each.at_least) for each in self.said if isinstance(each, Want)]
        self.said.clear()
        return found

    def grant(self, nanos: int, resource: str = BALANCE) -> None:
        self.admission.on_grant(Grant(resource, nanos))

    def refuse(self, free_nanos: int, resource: str = BALANCE) -> None:
        self.admission.on_grant(Grant(resource, 0, refused=True, free_nanos=free_nanos))

    def wait(self, seconds: float) -> None:
        """The loop's sweeps of so much time."""
        for _ in range(round(seconds)):
            self.now += 1.0
            self.admission.sweep()


@pytest.fixture
def edge() -> Edge:
    return Edge()


def test_many_who_wait_ask_once_and_are_all_served(edge: Edge) -> None:
    callers = [edge.ask(100) for _ in range(50)]
    (want,) = edge.said
    assert isinstance(want, Want) and (want.resource, want.at_least) == (BALANCE, 100) and want.demand >= AHEAD_HOLDS * 100
    edge.grant(5000)
    assert all(caller.hold is not None for caller in callers)


def test_a_lease_is_renewed_before_anybody_has_to_wait(edge: Edge) -> None:
    edge.ask(100)
    edge.grant(2000)
    edge.said.clear()
    served = 1
    while not (wants := edge.wants()):
        assert edge.ask(100).hold is not None
        served += 1
    assert wants == [(BALANCE, 0)] and edge.book.available(BALANCE) >= 900
    for _ in range(edge.book.available(BALANCE) // 100):  # they need not wait for the answer, and ask no second time
        assert edge.ask(100).hold is not None
    assert edge.wants() == []


def test_a_renewal_asks_for_what_is_spent_in_ten_seconds(edge: Edge) -> None:
    edge.grant(10**9)
    for _ in range(30):
        for _ in range(1000):
            caller = edge.ask(100)
            assert caller.hold is not None
            caller.hold.release()
        edge.wait(1)
    edge.admission.on_recall(BALANCE)
    edge.said.clear()
    edge.ask(100)
    (want,) = edge.said
    assert isinstance(want, Want) and 900_000 <= want.demand <= 1_100_000


def test_when_there_is_no_more_to_have_nobody_asks_again_and_again(edge: Edge) -> None:
    edge.ask(100)
    edge.grant(600)
    assert edge.wants() == [(BALANCE, 100), (BALANCE, 0)]
    edge.grant(0)
    assert edge.ask(100).hold is not None and edge.wants() == []
    edge.admission.on_funded(BALANCE)
    assert edge.ask(100).hold is not None and edge.wants() == [(BALANCE, 0)]
    edge.grant(0)
    edge.wait(REFUSAL_S + 1)
    assert edge.ask(100).hold is not None and edge.wants() == [(BALANCE, 0)]


def test_a_refusal_stands_for_what_it_covers_and_for_nothing_else(edge: Edge) -> None:
    first = edge.ask(500)
    edge.wants()
    edge.refuse(100)
    assert isinstance(first.error, InsufficientCredit)
    assert isinstance(edge.ask(500).error, InsufficientCredit) and isinstance(edge.ask(101).error, InsufficientCredit)
    assert edge.wants() == []
    assert edge.ask(100).waits and edge.wants() == [(BALANCE, 100)]
    edge.grant(100)
    assert edge.book.available(BALANCE) == 0


def test_what_is_free_is_asked_for_after_a_refusal_at_balance_zero(edge: Edge) -> None:
    edge.ask(500)
    edge.refuse(0)
    edge.wants()
    free = edge.ask(0)
    assert free.waits and edge.wants() == [(BALANCE, 0)]
    edge.grant(0)
    assert free.hold is not None


@pytest.mark.parametrize("free_nanos", [0, -5])
def test_what_is_free_and_refused_is_refused_without_asking_for_ever(edge: Edge, free_nanos: int) -> None:
    """An account below zero, or one that control does not know."""
    caller = edge.ask(0)
    assert edge.wants() == [(BALANCE, 0)]
    edge.refuse(free_nanos)
    assert isinstance(caller.error, InsufficientCredit)
    assert isinstance(edge.ask(0).error, InsufficientCredit) and edge.wants() == []
    edge.wait(REFUSAL_S + 1)
    assert edge.ask(0).waits and edge.wants() == [(BALANCE, 0)]


def test_a_refusal_is_forgotten_when_control_says_that_there_is_more(edge: Edge) -> None:
    edge.ask(500)
    edge.refuse(0)
    edge.admission.on_funded(BALANCE)
    edge.wants()
    assert edge.ask(500).waits and edge.wants() == [(BALANCE, 500)]


def test_a_control_that_is_silent_is_waited_for_only_so_long(edge: Edge) -> None:
    first = edge.ask(100)
    edge.wait(WAIT_S - 1)
    second = edge.ask(100)
    assert first.waits
    edge.wait(1)
    assert isinstance(first.error, StoreUnavailable) and first.error.retry_after_s and second.waits
    edge.grant(1000)  # late, and not lost
    assert second.hold is not None and edge.book.available(BALANCE) == 900


def test_a_store_that_is_away_is_503_at_once_and_not_the_callers_fault(edge: Edge) -> None:
    caller = edge.ask(100)
    edge.admission.on_grant(Grant(BALANCE, 0, unavailable=True))
    assert isinstance(caller.error, StoreUnavailable)
    assert edge.ask(100).waits


def test_without_control_what_is_leased_is_served_and_the_rest_is_503(edge: Edge) -> None:
    waiting = edge.ask(100)
    edge.admission.on_lost()
    assert isinstance(waiting.error, StoreUnavailable)
    assert isinstance(edge.ask(100).error, StoreUnavailable)
    edge.admission.on_welcome()
    again = edge.ask(100)
    edge.grant(300)
    edge.admission.on_lost()
    assert again.hold is not None and edge.ask(100).hold is not None
    edge.said.clear()
    edge.admission.on_welcome()
    assert edge.said == [Standing(granted={BALANCE: 300})]


def test_a_key_with_a_limit_draws_from_both_or_from_none(edge: Edge) -> None:
    caller = edge.ask(100, LIMITED)
    assert edge.wants() == [(BALANCE, 100)]
    edge.grant(1000)
    assert caller.waits and edge.wants() == [(LIMIT, 100)] and edge.book.available(BALANCE) == 1000
    edge.grant(150, LIMIT)
    assert caller.hold is not None and caller.hold.resources == (BALANCE, LIMIT)
    assert (edge.book.available(BALANCE), edge.book.available(LIMIT)) == (900, 50)
    caller.hold.settle(150)
    short = edge.ask(100, LIMITED)
    edge.refuse(0, LIMIT)
    assert isinstance(short.error, KeyLimitExceeded) and edge.book.available(BALANCE) == 850
    assert edge.ask(100).hold is not None  # the account's other keys


def test_what_is_unused_goes_back_when_recalled_and_after_a_minute(edge: Edge) -> None:
    caller = edge.ask(100)
    edge.grant(1000)
    edge.said.clear()
    edge.admission.on_recall(BALANCE)
    assert edge.said == [Back(resource=BALANCE, nanos=900)]
    edge.grant(500)
    assert caller.hold is not None
    caller.hold.settle(40)
    edge.said.clear()
    edge.wait(62)
    assert edge.said == [Back(resource=BALANCE, nanos=560)]


def test_a_lease_of_a_window_that_is_over_goes_back_and_is_forgotten_once_nothing_holds_it(edge: Edge) -> None:
    over, held = "key:abc:2020-03-04", "key:abc:2020-03-05"
    edge.book.granted(over, 700, edge.now)
    edge.book.granted(held, 500, edge.now)
    hold = edge.book.hold((held,), 200, edge.now)
    edge.now += 61.0
    edge.admission.sweep()
    assert edge.book.standing() == {held: 500}
    assert [message for message in edge.said if isinstance(message, Back)] == [Back(resource=over, nanos=700)]
    hold.settle(200)
    edge.admission.sweep()
    assert edge.book.standing() == {}
    assert [message for message in edge.said if isinstance(message, Back)][1:] == [Back(resource=held, nanos=300)]


def test_a_hold_covers_the_dearest_endpoint_and_a_token_for_every_byte() -> None:
    """However short its prompt seems: no tokenizer makes more of it than this."""
    body = b'{"model":"a/b","max_tokens":7,"messages":[{"role":"user","content":"%b"}]}' % ("\U0001f99c" * 50).encode()
    found = quote(parse(body, "chat"), choices(Price(prompt=1_000_000, completion=3_000_000)))
    assert found.prompt_tokens >= 200 + 16 and found.nanos == found.prompt_tokens + 7 * 3
    assert quote(parse(body, "chat"), choices(Price(prompt=0, completion=1_000_000), max_completion_tokens=5)).nanos == 5


def test_a_recall_of_what_was_never_leased_is_answered(edge: Edge) -> None:
    edge.admission.on_recall(Recall("balance:nobody").resource)
    assert edge.said == [Back(resource="balance:nobody", nanos=0)]


def test_what_a_request_has_while_it_waits_for_the_rest_is_not_given_away(edge: Edge) -> None:
    """Edges whose requests need a balance and a key's limit would otherwise take one from each other while they wait for the other."""
    edge.grant(1000)
    caller = edge.ask(700, LIMITED)
    assert caller.waits and edge.wants() == [(LIMIT, 700)]
    edge.admission.on_recall(BALANCE)
    assert edge.said == [Back(resource=BALANCE, nanos=300)]
    edge.grant(700, LIMIT)
    assert caller.hold is not None and caller.hold.nanos == 700
    caller.hold.release()
    edge.said.clear()
    edge.admission.on_recall(BALANCE)
    assert edge.said == [Back(resource=BALANCE, nanos=700)]


def test_a_refusal_is_of_what_was_given_back_meanwhile_as_well(edge: Edge) -> None:
    edge.grant(300)
    caller = edge.ask(1000)
    edge.admission.on_recall(BALANCE)
    edge.refuse(free_nanos=800)
    assert isinstance(caller.error, InsufficientCredit)
    edge.said.clear()
    assert edge.ask(750).waits and edge.wants() == [(BALANCE, 750)]  # there may be that much
