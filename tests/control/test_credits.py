"""Credit that comes and goes other than by usage: one door, each change once, with its counter-entry."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.control.administration import Administration, NewAccount, NewCredits
from gateway.control.chores import DAY_MS
from gateway.control.content.store import ContentStore
from gateway.control.expiry import Expiry
from gateway.control.fees import purchase_fee_nanos
from gateway.control.store import Account, CreditChange, Credits, LeaseRow
from gateway.control.store.sqlite import SqliteStore
from gateway.domain.catalog import Catalog
from gateway.domain.errors import BadRequest, Conflict, NotFound
from gateway.domain.money import AMOUNT_NANOS_MAX, parse_usd
from gateway.link.runtime import ADMIN
from gateway.log import Log
from gateway.settings import Billing
from tests.control.books import USD, Books
from tests.control.journaling import Writer, generation, move_back
from tests.control.process import ControlProcess, write_config

NO_CATALOG = Catalog(revision="", providers={}, models={})
# Of an administration, what has nothing to do with credit.
PARTS: dict[str, Any] = {
    "catalog": lambda: NO_CATALOG,
    "content": ContentStore(Path("none"), (), total_bytes_max=1),
    "content_key_env": "KEY",
}

_references = itertools.count(1)


def change(kind: str, nanos: int, account: str = "user_ann", **fields: Any) -> CreditChange:
    given: dict[str, Any] = {"account_id": account, "kind": kind, "nanos": nanos, "reference": f"test:{next(_references)}"}
    return CreditChange(**{**given, **fields})


def entries(books: Books, reference: str) -> dict[str, int]:
    found = "FROM entries e JOIN transactions t ON t.number = e.transaction_number"
    return dict(books.rows(f"SELECT book, amount_nanos {found} WHERE t.reference = '{reference}'"))


@pytest.mark.parametrize(
    ("wish", "lines"),
    [
        (change("topup", 5 * USD), {"user_ann": 5 * USD, "gateway:funding": -5 * USD}),
        (change("topup", 5 * USD, fee_nanos=USD), {"user_ann": 5 * USD, "gateway:funding": -6 * USD, "gateway:fees": USD}),
        (change("grant", 3), {"user_ann": 3, "gateway:grants": -3}),
        (change("refund", -10 * USD), {"user_ann": -10 * USD, "gateway:funding": 10 * USD}),
        (change("adjustment", -11 * USD), {"user_ann": -11 * USD, "gateway:adjustments": 11 * USD}),
        (change("adjustment", 7), {"user_ann": 7, "gateway:adjustments": -7}),
    ],
    ids=lambda value: f"{value.kind}{value.nanos}" if isinstance(value, CreditChange) else "",
)
async def test_each_kind_has_its_counter_entry_and_counts_once_by_its_reference(
    books: Books, wish: CreditChange, lines: dict[str, int]
) -> None:
    made = await asyncio.gather(*(books.store.change_credit(wish) for _ in range(20)))
    assert sorted(each.exists for each in made) == [False] + [True] * 19
    assert {each.balance_nanos for each in made} == {10 * USD + wish.nanos} == {await books.store.balance("user_ann")}
    assert entries(books, wish.reference) == lines
    for other in (
        msgspec.structs.replace(wish, nanos=wish.nanos * 2),
        msgspec.structs.replace(wish, account_id="user_bob"),
    ):
        with pytest.raises(Conflict):
            await books.store.change_credit(other)
    assert await books.store.balance("user_bob") == 10 * USD
    assert (await books.store.verify_ledger()).ok


async def test_what_was_paid_for_is_told_apart_from_what_was_given(books: Books) -> None:
    for wish in (change("topup", 5, fee_nanos=2), change("grant", 100), change("refund", -1), change("adjustment", 1000)):
        await books.store.change_credit(wish)
    assert await books.store.credits("user_ann") == Credits(total_nanos=10 * USD + 1104, purchased_nanos=10 * USD + 4, used_nanos=0)


async def test_a_refund_after_spending_makes_the_balance_negative_but_is_never_more_than_was_paid(books: Books) -> None:
    Writer(books.journal, "a").append(generation(nanos=8 * USD))
    await books.keeper().read_all()
    assert (await books.store.change_credit(change("refund", -10 * USD))).balance_nanos == -8 * USD
    with pytest.raises(BadRequest, match="more than was paid"):
        await books.store.change_credit(change("refund", -1))


@pytest.mark.parametrize(
    "wish",
    [
        change("topup", -1), change("topup", 0), change("grant", -1), change("refund", 1), change("adjustment", 0),
        change("topup", 2**63), change("topup", 2**63 - 1), change("adjustment", -(2**63)), change("grant", AMOUNT_NANOS_MAX),
        change("topup", 1, fee_nanos=-1), change("topup", 1, fee_nanos=2**63), change("grant", 1, fee_nanos=1),
        change("topup", 1, reference=""), change("topup", 1, reference="x" * 201),
    ],
    ids=lambda wish: f"{wish.kind} {wish.nanos} {wish.fee_nanos} {len(wish.reference)}",
)  # fmt: skip
async def test_led_15_an_amount_out_of_range_or_of_the_wrong_sign_is_refused(books: Books, wish: CreditChange) -> None:
    with pytest.raises(BadRequest):
        await books.store.change_credit(wish)
    assert await books.store.balance("user_ann") == 10 * USD


async def test_credit_needs_an_account(books: Books) -> None:
    with pytest.raises(NotFound):
        await books.store.change_credit(change("grant", 1, account="user_none"))


_amounts = st.integers(-(2**64), 2**64) | st.integers(-(2**62) - 3, -(2**62) + 3) | st.integers(2**62 - 3, 2**62 + 3) | st.integers(-9, 9)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wishes=st.lists(st.tuples(st.sampled_from(["topup", "grant", "refund", "adjustment"]), _amounts, _amounts | st.just(0)), max_size=8))
def test_led_15_any_changes_keep_every_book_in_range(tmp_path_factory: pytest.TempPathFactory, wishes: list[tuple[str, int, int]]) -> None:
    folder = tmp_path_factory.mktemp("ledger")

    async def change_all() -> None:
        store = await SqliteStore.open(folder / "gateway.db")
        try:
            await store.create_account(Account(id="user_ann", email="ann", created_at_ms=1), [], topup_nanos=0)
            expected = 0
            for kind, nanos, fee in wishes:
                with contextlib.suppress(BadRequest):
                    await store.change_credit(change(kind, nanos, fee_nanos=fee))
                    expected += nanos
            assert abs(expected) <= AMOUNT_NANOS_MAX
            assert expected == await store.balance("user_ann")
            assert (await store.verify_ledger()).ok
        finally:
            await store.close()
        with contextlib.closing(sqlite3.connect(folder / "gateway.db")) as db:
            assert all(-(2**63) <= nanos < 2**63 for (nanos,) in db.execute("SELECT nanos FROM balances"))

    asyncio.run(change_all())


@pytest.mark.parametrize(
    ("usd", "fee"), [("10", "0.80"), ("14.54", "0.80"), ("14.55", "0.81"), ("100", "5.50"), ("100.01", "5.51"), ("0.000000001", "0.80")]
)
def test_the_fee_of_a_purchase_is_a_percentage_in_whole_cents_but_at_least_the_minimum(usd: str, fee: str) -> None:
    assert purchase_fee_nanos(parse_usd(usd), Billing()) == parse_usd(fee)
    assert purchase_fee_nanos(parse_usd(usd), Billing(purchase_fee_percent="0", purchase_fee_min_usd="0")) == 0


async def _drained() -> bool:
    return True


async def test_new_accounts_get_the_allowance_and_operators_may_book_the_fee(books: Books) -> None:
    administration = Administration(**PARTS, store=books.store, drained=_drained, billing=Billing(signup_usd="0.25"))
    account = (await administration.create_account(NewAccount(email="eve@example.com", usd="2"))).account_id
    assert await books.store.credits(account) == Credits(total_nanos=2 * USD + USD // 4, purchased_nanos=2 * USD)
    assert entries(books, f"signup:{account}") == {account: USD // 4, "gateway:grants": -USD // 4}
    plain = await administration.add_credits(NewCredits(account_id=account, usd="100"))
    assert msgspec.json.encode(plain) == b'{"balance_usd":102.25}'
    bought = await administration.add_credits(NewCredits(account_id=account, usd="100", with_fee=True))
    assert msgspec.json.encode(bought) == b'{"balance_usd":202.25,"fee_usd":5.5}'
    assert await books.store.balance("gateway:fees") == 5 * USD + USD // 2


async def test_a_ledger_that_differs_is_told_before_the_journals_have_drained(books: Books) -> None:
    async def never() -> bool:
        return False

    administration = Administration(**PARTS, store=books.store, drained=never, billing=Billing())
    assert (await administration.verify_ledger()).ok is None
    with contextlib.closing(sqlite3.connect(books.database)) as db:
        for nanos, ok in ((5, False), (-5, None)):
            db.execute("UPDATE balances SET nanos = nanos + ? WHERE book = 'user_ann'", (nanos,))
            db.commit()
            report = await administration.verify_ledger()
            assert report.ok is ok and bool(report.problems) is (ok is False)


def test_led_15_the_api_answers_400_to_amounts_that_do_not_fit(tmp_path: Path) -> None:
    near = [
        "9223372036.854775807",
        "9223372036.854775808",
        "4611686018.427387905",
        "1e30",
        "-0.01",
        "0.0000000001",
        "NaN",
        "Infinity",
        "1,5",
        "",
    ]
    with ControlProcess(write_config(tmp_path)) as control:

        async def ask_all() -> None:
            _, made, _ = await control.ask(ADMIN, "POST", "/accounts", {"email": "ann@example.com", "usd": "1"})
            account = made["account_id"]
            for usd in near:
                for path, body in (
                    ("/credits", {"account_id": account, "usd": usd}),
                    ("/accounts", {"email": "bob@example.com", "usd": usd}),
                    ("/keys", {"account_id": account, "name": "k", "limit": usd}),
                ):
                    status, answer, _ = await control.ask(ADMIN, "POST", path, body)
                    assert (status, answer["error"]["code"]) == (400, 400), (path, usd, answer)
            full, over = "4611686017.427387904", "0.000000001"  # with the 1 USD that is there: exactly the range
            assert (await control.ask(ADMIN, "POST", "/credits", {"account_id": account, "usd": full}))[0] == 200
            assert (await control.ask(ADMIN, "POST", "/credits", {"account_id": account, "usd": over}))[0] == 400
            assert (await control.ask(ADMIN, "GET", "/ledger/verify"))[1]["ok"] is True

        asyncio.run(ask_all())


# Expiry. Time passes by moving what is there into the past.


async def _bought(books: Books, days_ago: int, nanos: int, now_ms: int, kind: str = "topup") -> None:
    wish = change(kind, nanos)
    await books.store.change_credit(wish)
    [(posted_ms,)] = books.rows(f"SELECT created_at_ms FROM transactions WHERE reference = '{wish.reference}'")
    move_back(books.database, posted_ms - now_ms + days_ago * DAY_MS, f"reference = '{wish.reference}'")


def _expiry(books: Books, now_ms: int, days: int = 365) -> Expiry:
    return Expiry(store=books.store, days=days, log=Log("test", fd=books.log_fd), clock=lambda: now_ms / 1000)


async def test_credit_goes_a_year_after_it_came_and_the_oldest_is_used_first(books: Books) -> None:
    now_ms = 4_000_000_000_000  # a time at which the 10 USD of the fixture are old as well
    await _bought(books, 364, 3 * USD, now_ms)
    await _bought(books, 1, 2 * USD, now_ms, kind="grant")
    Writer(books.journal, "a").append(generation(nanos=6 * USD))
    await books.keeper().read_all()
    await books.store.change_credit(change("adjustment", -20 * USD, account="user_bob"))  # in debt: has nothing to lose
    assert await _expiry(books, now_ms, days=0).look() == 0  # 0: credit lives for ever
    assert await books.store.balance("user_ann") == 9 * USD
    assert await _expiry(books, now_ms).look() == 1
    assert await books.store.balance("user_ann") == 5 * USD  # of the old 10 USD 6 were used, and 4 go
    assert await _expiry(books, now_ms).look() == 0
    assert await _expiry(books, now_ms + DAY_MS - 1).look() == 0
    assert await _expiry(books, now_ms + DAY_MS + 1).look() == 1  # the next ones' year is over
    assert await books.store.balance("user_ann") == 2 * USD
    assert await books.store.balance("gateway:expired") == 7 * USD
    assert await books.store.balance("user_bob") == -10 * USD
    assert (await books.store.credits("user_ann")).total_nanos == 8 * USD
    assert [line["usd"] for line in books.logged() if line["event"] == "credit_expired"] == ["4", "3"]


async def test_what_edges_may_be_spending_goes_once_it_has_come_back(books: Books) -> None:
    now_ms = 4_000_000_000_000
    async with books.store.leasing() as book:
        await book.write([LeaseRow("balance:user_ann", "a", 3 * USD), LeaseRow("balance:user_ann", "b", USD)])
    assert await _expiry(books, now_ms).look() == 2
    assert await books.store.balance("user_ann") == 4 * USD
    edge, other = Writer(books.journal, "a"), Writer(books.journal, "b")
    edge.append(generation(nanos=2 * USD))
    edge.die()
    await books.keeper().read_all()
    assert books.released == ["a"]
    assert await _expiry(books, now_ms + 1).look() == 1
    assert await books.store.balance("user_ann") == USD  # which b may still spend
    other.die()
