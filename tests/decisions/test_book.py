"""A hold resolves once, and nothing is lost or made on the way (LED-04): the book against a reference of plain sums."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from gateway.ledger.book import Book, Hold, LeaseShort

BALANCE, LIMIT = "balance:ann", "key:abc:"
RESOURCES = ((BALANCE,), (BALANCE, LIMIT), (LIMIT,))


@dataclass
class Account:
    """The reference: one resource as a list of what happened."""

    grants: list[int] = field(default_factory=list)
    returns: list[int] = field(default_factory=list)
    charges: list[int] = field(default_factory=list)
    open: dict[int, int] = field(default_factory=dict)  # hold number -> nanos

    @property
    def available(self) -> int:
        return sum(self.grants) - sum(self.returns) - sum(self.charges) - sum(self.open.values())


class BookMachine(RuleBasedStateMachine):
    """Random grants, holds, settlements (less, equal, more), releases and returns."""

    holds: Bundle[tuple[int, Hold]] = Bundle("holds")

    @initialize()
    def begin(self) -> None:
        self.book = Book()
        self.accounts: dict[str, Account] = {}
        self.number = 0
        self.now = 0.0

    @rule(resource=st.sampled_from([BALANCE, LIMIT]), nanos=st.integers(0, 1000))
    def grant(self, resource: str, nanos: int) -> None:
        self.book.granted(resource, nanos, self.now)
        self.accounts.setdefault(resource, Account()).grants.append(nanos)

    @rule(target=holds, resources=st.sampled_from(RESOURCES), nanos=st.integers(0, 400))
    def hold(self, resources: tuple[str, ...], nanos: int) -> MultipleResults[tuple[int, Hold]] | tuple[int, Hold]:
        self.now += 1.0
        short = next((name for name in resources if name not in self.accounts or self.accounts[name].available < nanos), None)
        if short is not None:
            with pytest.raises(LeaseShort) as caught:
                self.book.hold(resources, nanos, self.now)
            lacking = nanos - self.accounts[short].available if short in self.accounts else nanos
            assert (caught.value.resource, caught.value.missing_nanos) == (short, lacking)
            return multiple()
        hold = self.book.hold(resources, nanos, self.now)
        self.number += 1
        for name in resources:
            self.accounts[name].open[self.number] = nanos
        return (self.number, hold)

    @rule(held=consumes(holds), part=st.integers(0, 200))
    def settle(self, held: tuple[int, Hold], part: int) -> None:
        """Less than was held, all of it, or twice as much."""
        number, hold = held
        nanos = hold.nanos * part // 100
        hold.settle(nanos)
        self.resolve(number, hold, nanos)

    @rule(held=consumes(holds))
    def release(self, held: tuple[int, Hold]) -> None:
        number, hold = held
        hold.release()
        self.resolve(number, hold, 0)

    def resolve(self, number: int, hold: Hold, nanos: int) -> None:
        for name in hold.resources:
            del self.accounts[name].open[number]
            self.accounts[name].charges.append(nanos)
        for again in (hold.release, lambda: hold.settle(nanos)):
            with pytest.raises(AssertionError):
                again()

    @rule(resource=st.sampled_from([BALANCE, LIMIT]))
    def give_back(self, resource: str) -> None:
        account = self.accounts.get(resource)
        returned = self.book.give_back(resource)
        assert returned == (max(0, account.available) if account else 0)
        if account:
            account.returns.append(returned)

    @rule(resource=st.sampled_from([BALANCE, LIMIT]))
    def forget(self, resource: str) -> None:
        account = self.accounts.get(resource)
        forgotten = self.book.forget(resource)
        if account is None or account.open:
            assert forgotten is None
        else:
            assert forgotten == max(0, account.available)
            del self.accounts[resource]

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "book"):
            return
        for resource in (BALANCE, LIMIT):
            account = self.accounts.get(resource)
            assert self.book.available(resource) == (account.available if account else 0)
        standing = {name: sum(account.grants) - sum(account.returns) for name, account in self.accounts.items()}
        assert self.book.standing() == standing and len(self.book) == len(standing)
        assert set(self.book.idle(self.now + 1)) == {name for name, account in self.accounts.items() if not account.open}


TestBook = BookMachine.TestCase
TestBook.settings = settings(max_examples=500, stateful_step_count=8, deadline=None)


@pytest.mark.soak
def test_led_04_a_book_and_its_model_agree_over_long_sequences() -> None:
    run_state_machine_as_test(BookMachine, settings=settings(max_examples=2000, stateful_step_count=50, deadline=None))


def test_a_hold_on_two_resources_takes_from_both_or_from_none() -> None:
    book = Book()
    book.granted(BALANCE, 100, 0.0)
    book.granted(LIMIT, 50, 0.0)
    with pytest.raises(LeaseShort) as short:
        book.hold((BALANCE, LIMIT), 60, 1.0)
    assert (short.value.resource, short.value.missing_nanos) == (LIMIT, 10)
    assert (book.available(BALANCE), book.available(LIMIT)) == (100, 50)


def test_what_an_answer_cost_beyond_its_hold_is_owed() -> None:
    book = Book()
    book.granted(BALANCE, 100, 0.0)
    book.hold((BALANCE,), 100, 1.0).settle(130)
    assert book.available(BALANCE) == -30 and book.give_back(BALANCE) == 0
    with pytest.raises(LeaseShort) as short:
        book.hold((BALANCE,), 0, 2.0)
    assert short.value.missing_nanos == 30


def test_what_may_be_charged_beyond_a_hold_is_what_its_leases_have_and_the_overshoot_once() -> None:
    book = Book()
    book.granted(BALANCE, 100, 0.0)
    book.granted(LIMIT, 80, 0.0)
    first, second = book.hold((BALANCE, LIMIT), 30, 0.0), book.hold((BALANCE,), 40, 0.0)
    assert (first.most(5), second.most(5)) == (30 + 30 + 5, 40 + 30 + 5)
    second.settle(second.most(5))
    assert book.available(BALANCE) == -5
    assert (first.most(5), first.most(0)) == (30, 30)  # its own is its own, and nobody overshoots twice
    first.settle(30)
    assert book.available(BALANCE) == -5


def test_nothing_may_be_held_where_control_has_said_yes_to_nothing() -> None:
    book = Book()
    with pytest.raises(LeaseShort):
        book.hold((BALANCE,), 0, 0.0)
    book.granted(BALANCE, 0, 0.0)
    book.hold((BALANCE,), 0, 0.0).release()


@pytest.mark.parametrize("served", [True, False])
def test_what_is_free_holds_one_of_each_quota_and_uses_it_up_only_if_it_was_served(served: bool) -> None:
    book = Book()
    book.granted(BALANCE, 0, 0.0)
    book.granted("free-day:ann:2026-11-25", 3, 0.0)
    rate = book.open("free-minute:ann:1", 0.0)
    rate.granted = 5
    hold = book.hold_free((BALANCE,), "free-day:ann:2026-11-25", rate, 0.0)
    day = book.leases.get("free-day:ann:2026-11-25")
    assert day is not None and hold.resources == (BALANCE, "free-day:ann:2026-11-25")
    assert (day.available, rate.available, hold.nanos) == (2, 4, 0)
    assert book.give_back("free-day:ann:2026-11-25") == 2  # what is held stays
    hold.served = served
    hold.settle(0)
    left = 0 if served else 1
    assert (day.available, rate.available) == (left, 4 + left)
    assert (day.holds, rate.holds, day.held, rate.held) == (0, 0, 0, 0)


def test_what_is_free_takes_nothing_where_one_of_its_leases_is_short() -> None:
    book = Book()
    book.granted("free-day:ann:2026-11-25", 1, 0.0)
    rate = book.open("free-minute:ann:1", 0.0)
    rate.granted = 5
    for balance, quota, short in (
        (BALANCE, "free-day:ann:2026-11-25", BALANCE),
        (BALANCE, "free-day:bob:2026-11-25", "free-day:bob:2026-11-25"),
    ):
        with pytest.raises(LeaseShort) as caught:
            book.hold_free((balance,), quota, rate, 0.0)
        assert caught.value.resource == short
    assert rate.available == 5 and book.available("free-day:ann:2026-11-25") == 1


def test_a_hold_grows_by_another_on_the_same_leases_and_settles_as_one() -> None:
    book = Book()
    for resource in ("balance:a", "balance:b"):
        book.granted(resource, 100, 0.0)
    hold, more, other = (book.hold((resource,), 30, 0.0) for resource in ("balance:a", "balance:a", "balance:b"))
    assert hold.add(more) and more.resolved and (hold.nanos, book.available("balance:a")) == (60, 40)
    assert not hold.add(other) and other.resolved and (hold.nanos, book.available("balance:b")) == (60, 100)
    hold.settle(45)
    assert book.available("balance:a") == 55 and book.idle(1.0) == ["balance:a", "balance:b"]
