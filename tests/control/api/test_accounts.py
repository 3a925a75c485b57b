"""Signing up, in and out; whose page may ask; guessing; and what remains of a deleted account."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from gateway.control.api import hashing
from gateway.control.api.accounts import ATTEMPTS_AT_ACCOUNT, CALLER_HEADER, SIGN_INS_AT_ACCOUNT, SIGN_UPS_FROM_ADDRESS
from gateway.control.api.attempts import Attempts
from gateway.control.erasure import Erasure
from gateway.control.passwords import hash_password
from gateway.control.store.management import FORFEIT_BOOK
from gateway.domain.errors import RateLimited
from gateway.domain.keys import digest
from gateway.domain.money import NANOS_PER_USD
from gateway.domain.sessions import session_name
from gateway.log import Log
from tests.control.api.premises import DAY, PASSWORD, Browser, Premises, opened, spent

NEW_HASH = hash_password("another horse battery")
SESSION, ACCOUNT = "/api/v1/session", "/api/v1/account"


async def test_WEB_01_the_cookie_is_hard_to_steal_and_new_at_each_sign_in(premises: Premises, tmp_path: Path) -> None:
    browser = await premises.browser()
    attributes = {part.strip().lower() for part in browser.set_cookie.split(";")[1:]}
    assert browser.set_cookie.startswith("__Host-session=")
    assert {"secure", "httponly", "samesite=lax", "path=/"} <= attributes and not any(part.startswith("domain") for part in attributes)
    first = browser.cookie
    assert len(first) >= 43
    assert first.encode() not in b"".join(file.read_bytes() for file in tmp_path.glob("gateway.db*"))
    await browser.sign_in()
    assert browser.cookie != first
    await browser.ask("GET", SESSION)
    await browser.ask("GET", SESSION, 401, headers={"Cookie": f"__Host-session={first}"})


async def test_a_session_may_do_what_a_management_key_may(premises: Premises) -> None:
    browser = await premises.browser()
    assert (await browser.ask("GET", SESSION))["data"]["email"] == "ada@example.com"
    assert (await browser.ask("GET", "/api/v1/credits"))["data"]["total_credits"] == 25
    made = await browser.ask("POST", "/api/v1/keys", 201, json={"name": "mine"})
    await browser.ask("DELETE", f"/api/v1/keys/{made['data']['hash']}")
    await browser.ask("GET", "/api/v1/key", 401)  # a session is no key


async def test_a_session_ends_by_signing_out_by_idleness_and_by_age(premises: Premises) -> None:
    browser = await premises.browser()
    cookie = browser.cookie
    assert (await browser.ask("DELETE", SESSION)) == {"signed_out": True}
    assert browser.cookie == ""
    await browser.ask("GET", SESSION, 401, headers={"Cookie": f"__Host-session={cookie}"})
    idle = await premises.browser()
    premises.now += 7 * DAY
    await idle.ask("GET", SESSION, 401)
    used = await premises.browser()
    for _ in range(5):
        premises.now += 5.9 * DAY
        await used.ask("GET", SESSION)
    premises.now += 0.5 * DAY
    await used.ask("GET", SESSION, 401)  # 30 days after it began


async def test_a_new_password_ends_all_other_sessions(premises: Premises) -> None:
    here, elsewhere = await premises.browser(), await premises.browser()
    body = {"password": PASSWORD, "new_password": "another horse battery"}
    await here.ask("PATCH", ACCOUNT, 403, json={**body, "password": "wrong"})
    answered = await here.ask("PATCH", ACCOUNT, json=body)
    here.csrf_token = answered["data"]["csrf_token"]
    await here.ask("GET", SESSION)
    await elsewhere.ask("GET", SESSION, 401)
    await Browser(premises).ask("POST", SESSION, 401, json={"email": "ada@example.com", "password": PASSWORD})
    await premises.browser(password="another horse battery")


STRANGE: list[tuple[dict[str, str], dict[str, Any]]] = [
    ({"Origin": "https://evil.example"}, {}),
    ({"Origin": "null"}, {}),
    ({"Sec-Fetch-Site": "cross-site"}, {}),
    ({"Sec-Fetch-Site": "same-site"}, {}),
    ({"Sec-Fetch-Site": "none"}, {}),
    ({"Content-Type": "text/plain"}, {"data": b"{}"}),
    ({"Content-Type": "application/x-www-form-urlencoded"}, {"data": b"name=x"}),
    ({"Content-Type": "multipart/form-data; boundary=x"}, {"data": b"--x--"}),
    ({"X-CSRF-Token": ""}, {}),
    ({"X-CSRF-Token": "0" * 64}, {}),
]


@pytest.mark.parametrize(("headers", "sent"), STRANGE)
async def test_WEB_02_other_sites_change_nothing(premises: Premises, headers: dict[str, str], sent: dict[str, Any]) -> None:
    browser = await premises.browser()
    before = await premises.store.list_keys("user_ada")
    for route in premises.routes:
        if route.method == "GET" or route.access in ("public", "key"):
            continue
        if route.access == "visitor" and "X-CSRF-Token" in headers:
            continue  # nobody is signed in yet, so nobody has a token
        body = sent or {"json": {"name": "x", "email": "n@example.com", "password": PASSWORD, "new_password": PASSWORD}}
        path = (route.bases[0] + route.path).replace("{hash}", digest(premises.ada))
        error = (await browser.ask(route.method, path, 403, headers=headers, **body))["error"]
        assert error["code"] == 403, path
    assert await premises.store.list_keys("user_ada") == before and not premises.changed
    assert await premises.store.account_by_email("n@example.com") is None
    await browser.ask("GET", SESSION)


async def test_the_origin_is_the_configured_one_whatever_host_is_claimed(tmp_path: Path) -> None:
    async with opened(tmp_path, public_url="https://ai.example/base") as premises:
        credentials = {"email": "ada@example.com", "password": PASSWORD}
        for origin, host, status in (
            ("https://ai.example", "ai.example", 200),
            ("https://evil.example", "evil.example", 403),  # WEB-07: a forged Host does not make a page ours
            ("http://ai.example", "ai.example", 403),
        ):
            sent = {"Origin": origin, "Host": host}
            async with premises.http.post(SESSION, json=credentials, headers=sent) as answer:
                assert answer.status == status


async def test_signing_up_makes_an_account_that_can_sign_in(tmp_path: Path) -> None:
    async with opened(tmp_path, signup_usd="0.25") as premises:
        answered = await Browser(premises).ask("POST", ACCOUNT, 201, json={"email": " New@Example.com ", "password": PASSWORD})
        assert answered["data"]["email"] == "new@example.com"
        browser = await premises.browser("new@example.com")
        assert (await browser.ask("GET", "/api/v1/credits"))["data"] == {"total_credits": 0.25, "total_usage": 0.0}
        credits = await premises.store.credits((await browser.ask("GET", SESSION))["data"]["account_id"])
        assert credits.purchased_nanos == 0  # a gift is no purchase
        assert (await browser.ask("GET", "/api/v1/keys"))["data"] == []


async def test_sign_up_can_be_closed_for_all_but_the_operator(tmp_path: Path) -> None:
    async with opened(tmp_path, signup=False) as premises:
        for email in ("new@example.com", "ada@example.com"):  # known or not
            refused = await Browser(premises).ask("POST", ACCOUNT, 403, json={"email": email, "password": PASSWORD})
            assert refused["error"]["message"].startswith("Sign-up is closed here")
        assert await premises.store.account_by_email("new@example.com") is None
        await premises.browser()  # whoever has an account uses it
        async with premises.http.get("/auth") as answer:
            assert '<body class="closed">' in await answer.text()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("email", value) for value in (None, 5, "", "a", "a@", "@b.c", "a b@c.d", "x" * 300, "ä@b.c")),
        *(("password", value) for value in (None, 5, "", "short", "x" * 1025, "ä" * 600)),
    ],
)
async def test_bad_sign_ups_name_the_field(premises: Premises, field: str, value: object) -> None:
    body = {"email": "new@example.com", "password": PASSWORD, field: value}
    error = (await Browser(premises).ask("POST", ACCOUNT, 400, json=body))["error"]
    assert error["message"].startswith(f"{field}: ")


async def test_AUT_09_a_known_and_an_unknown_address_are_told_the_same_in_the_same_time(premises: Premises) -> None:
    took: dict[str, list[float]] = {"ada@example.com": [], "nobody@example.com": []}
    bodies = set()
    for round_ in range(5):
        for email, times in took.items():
            sent = {"email": email, "password": f"wrong horse {round_}"}
            began = time.monotonic()
            bodies.add(str(await Browser(premises).ask("POST", SESSION, 401, json=sent)))
            times.append(time.monotonic() - began)
    assert len(bodies) == 1
    known, unknown = (median(times) for times in took.values())
    assert known / 3 < unknown < known * 3  # not the time of an answer without hashing; the machine's noise is larger than 5 ms
    ups = [
        await Browser(premises).ask("POST", ACCOUNT, 201, json={"email": email, "password": "yet another horse"})
        for email in ("ada@example.com", "zoe@example.com")
    ]
    assert ups[0]["data"]["message"] == ups[1]["data"]["message"]
    await premises.browser()  # and ada's password is still hers


async def test_AUT_09_guessing_is_throttled_per_account_also_all_at_once(premises: Premises) -> None:
    async def guess(number: int) -> int:
        async with premises.http.post(
            SESSION, json={"email": "ada@example.com", "password": f"guess {number}"}, headers={CALLER_HEADER: f"10.0.0.{number}"}
        ) as answer:
            if answer.status == 429:
                assert 0 < int(answer.headers["Retry-After"]) <= 900
            return answer.status

    statuses = await asyncio.gather(*(guess(number) for number in range(100)))
    assert statuses.count(401) <= ATTEMPTS_AT_ACCOUNT and statuses.count(401) + statuses.count(429) == 100
    async with premises.http.post(SESSION, json={"email": "ada@example.com", "password": PASSWORD}) as answer:
        assert answer.status == 429  # the right one is not tried either
    await premises.browser("eve@example.com")  # others are not locked out


def test_attempts_are_counted_in_a_window_and_kept_for_a_bounded_number_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    attempts = Attempts(most=2, window_s=10.0, now=lambda: clock[0])
    for _ in range(2):
        attempts.take("a")
    with pytest.raises(RateLimited) as refused:
        attempts.take("a")
    assert refused.value.retry_after_s == 10.0
    attempts.take("b")  # another name
    attempts.give_back("a")
    attempts.take("a")
    clock[0] = 10.0
    attempts.take("a")
    monkeypatch.setattr("gateway.control.api.attempts.NAMES_MAX", 3)
    for name in "cdefg":
        attempts.take(name)
    assert len(attempts._counts) <= 3


async def test_many_sign_ins_from_one_address_are_no_guessing(premises: Premises) -> None:
    for _ in range(ATTEMPTS_AT_ACCOUNT + 3):
        await premises.browser()


async def test_a_deleted_account_leaves_its_money_in_the_books_and_nothing_personal(premises: Premises, tmp_path: Path) -> None:
    told = ("http_referer", "title", "user_agent", "session_id")
    personal: dict[str, Any] = {**dict.fromkeys(told, "https://secret.example"), "external_user": "u-77"}
    await premises.journal(
        *(spent(premises.ada, number, **personal) for number in range(3)),
        spent(premises.eve, 50, account="user_eve", **personal),
    )  # fmt: skip
    browser = await premises.browser()
    browser_secret = browser.cookie
    await browser.ask("DELETE", ACCOUNT, 403, json={"password": "wrong"})
    assert await browser.ask("DELETE", ACCOUNT, json={"password": PASSWORD}) == {"deleted": True}
    gone = {digest(premises.ada), digest(premises.ada_management), session_name(digest(browser_secret))}
    assert {changed for changed, record in premises.changed if record is None} == gone
    assert premises.deleted == 1
    for secret in (premises.ada, premises.ada_management):
        await premises.ask("GET", "/api/v1/credits", secret, 401)
    await browser.ask("GET", SESSION, 401)
    await Browser(premises).ask("POST", SESSION, 401, json={"email": "ada@example.com", "password": PASSWORD})
    assert await premises.store.balance("user_ada") == 0
    assert await premises.store.balance(FORFEIT_BOOK) == int(23.5 * NANOS_PER_USD)
    report = await premises.store.verify_ledger()
    assert report.ok and report.generations == 4

    erasure = Erasure(
        store=premises.store, erase_content=premises.content.delete_all, log=Log("test", fd=-1), now=lambda: premises.now.timestamp()
    )
    assert (await erasure.work() or 0) > 3000
    # A stream that ended after its account: its journal is read later.
    await premises.journal(spent(premises.ada, 9, usd=0.25, **personal))
    premises.now += DAY
    assert await erasure.work() is None
    assert await premises.store.erasures() == {}
    erased, kept = [await premises.store.generation(f"gen-1764031697-{number:020}") for number in (9, 50)]
    assert erased is not None and (erased.http_referer, erased.external_user, erased.charged_nanos) == ("", "", NANOS_PER_USD // 4)
    assert kept is not None and kept.external_user == "u-77"
    assert (await premises.store.verify_ledger()).ok
    with sqlite3.connect(tmp_path / "gateway.db") as db:
        dump = "\n".join(db.iterdump())
    assert "ada@example.com" not in dump and dump.count(b"u-77".hex().upper()) == 1

    again = Browser(premises)
    await again.ask("POST", ACCOUNT, 201, json={"email": "ada@example.com", "password": PASSWORD})
    await again.sign_in()
    assert (await again.ask("GET", "/api/v1/credits"))["data"]["total_credits"] == 0  # lost is lost


async def test_erasing_goes_on_after_a_restart_in_small_steps_past_what_is_others(premises: Premises) -> None:
    for number in range(0, 70, 10):
        others = [spent(premises.eve, number + place, account="user_eve", title="Mine") for place in range(1, 10)]
        await premises.journal(spent(premises.ada, number, title="Hush"), *others)
    await premises.store.delete_account("user_ada", now_s=0, erase_until_s=0)
    after: str | None = ""
    steps = 0
    while after is not None:
        after = await premises.store.erase_generations("user_ada", after, 3)
        steps += 1
    assert steps == 3
    found = [await premises.store.generation(f"gen-1764031697-{number:020}") for number in range(70)]
    assert [one.title for one in found if one is not None] == ["" if number % 10 == 0 else "Mine" for number in range(70)]


async def test_a_password_that_is_changed_while_the_old_one_is_checked_opens_no_session(
    premises: Premises, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sign-in has proven the old password, and is about to open its session, when the new one comes into force."""
    store = premises.store
    open_session = store.open_session

    async def open_late(*session: Any, **more: Any) -> bool:
        await store.set_password("user_ada", NEW_HASH)
        return await open_session(*session, **more)

    monkeypatch.setattr(store, "open_session", open_late)
    late = Browser(premises)
    await late.ask("POST", SESSION, 401, json={"email": "ada@example.com", "password": PASSWORD})
    monkeypatch.undo()
    assert not late.cookie
    await premises.browser(password="another horse battery")


@pytest.mark.parametrize(
    ("address", "is_one"),
    [
        ("2001:db8:0:1:{0:x}::{0:x}", True),  # one caller has all of these
        ("::ffff:10.0.0.1", True),
        ("2001:db8:0:{0:x}::1", False),
        ("::ffff:10.0.0.{0}", False),
        ("10.0.1.{0}", False),
    ],
)
async def test_AUT_09_sign_ups_are_throttled_by_what_one_caller_has_of_addresses(premises: Premises, address: str, is_one: bool) -> None:
    async def sign_up(number: int) -> int:
        body = {"email": f"new{number}@example.com", "password": "1234567"}  # too short, which is found out after it was counted
        async with premises.http.post(ACCOUNT, json=body, headers={CALLER_HEADER: address.format(number)}) as answer:
            return answer.status

    statuses = [await sign_up(number) for number in range(1, SIGN_UPS_FROM_ADDRESS + 1)]
    assert set(statuses) == {400}
    assert await sign_up(99) == (429 if is_one else 400)


async def test_sessions_are_opened_at_a_bounded_pace(premises: Premises, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "is_password", lambda password, stored: True)
    for _ in range(SIGN_INS_AT_ACCOUNT):
        await premises.browser()
    async with premises.http.post(SESSION, json={"email": "ada@example.com", "password": PASSWORD}) as answer:
        assert answer.status == 429 and int(answer.headers["Retry-After"]) > 0
    await premises.browser("eve@example.com")
