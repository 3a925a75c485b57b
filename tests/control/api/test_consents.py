"""OAuth with PKCE: a consent, its code, and the key that is taken for it once."""

from __future__ import annotations

import base64
import datetime
import hashlib
from typing import Any

import pytest
from openrouter import operations

from gateway.control.api.consents import CODES_PER_MINUTE
from gateway.domain.keys import digest
from gateway.domain.money import NANOS_PER_USD
from tests.control.api.premises import Premises

CODES, KEYS = "/api/v1/auth/keys/code", "/api/v1/auth/keys"
VERIFIER = "a-verifier-that-only-the-application-knows-43-or-more"
S256 = base64.urlsafe_b64encode(hashlib.sha256(VERIFIER.encode()).digest()).rstrip(b"=").decode()
CALLBACK = "https://app.example/back?x=1"


async def consent(premises: Premises, /, status: int = 200, **body: Any) -> Any:
    answered = await premises.ask("POST", CODES, premises.ada_management, status, json=body)
    return answered["data"]["id"] if status == 200 else answered["error"]


async def take(premises: Premises, status: int = 200, **body: Any) -> Any:
    answered = await premises.ask("POST", KEYS, None, status, json=body)
    return answered if status == 200 else answered["error"]


@pytest.mark.parametrize(("method", "challenge"), [("S256", S256), ("plain", VERIFIER), (None, VERIFIER)])
async def test_a_key_is_taken_once_by_whoever_can_prove_the_challenge(premises: Premises, method: str | None, challenge: str) -> None:
    asked: dict[str, Any] = {"code_challenge": challenge, **({"code_challenge_method": method} if method else {})}
    code = await consent(
        premises, callback_url=CALLBACK, limit=5, usage_limit_type="monthly", expires_at="2027-01-01T00:00:00Z", key_label="My app", **asked
    )
    body = await take(premises, code=code, code_verifier=VERIFIER, code_challenge_method=method)
    operations.ExchangeAuthCodeForAPIKeyResponse.model_validate(body)
    assert body["user_id"] == "user_ada"
    key = await premises.store.find_key(digest(body["key"]))
    assert key is not None and premises.changed[-1] == (key.digest, key.record())
    assert (key.name, key.limit_nanos, key.limit_reset, key.management) == ("My app", 5 * NANOS_PER_USD, "monthly", False)
    assert key.expires_at_s == datetime.datetime(2027, 1, 1, tzinfo=datetime.UTC).timestamp()
    again = await take(premises, 403, code=code, code_verifier=VERIFIER)
    assert again["message"] == "Invalid code or code_verifier"


async def test_without_a_challenge_the_code_is_enough(premises: Premises) -> None:
    code = await consent(premises, callback_url="http://localhost:3000/cb")
    key = await premises.store.find_key(digest((await take(premises, code=code))["key"]))
    assert key is not None and key.name == "localhost:3000"


async def test_a_verifier_whose_challenge_was_taken_off_on_the_way_takes_no_key(premises: Premises) -> None:
    code = await consent(premises, callback_url=CALLBACK)
    for method in ({}, {"code_challenge_method": "S256"}):
        refused = await take(premises, 403, code=code, code_verifier=VERIFIER, **method)
        assert refused["message"] == "Invalid code or code_verifier"
    code = await consent(premises, callback_url=CALLBACK)
    assert (await take(premises, code=code, code_verifier=""))["user_id"] == "user_ada"  # as clients without one send it


async def test_a_signed_in_person_consents_and_a_headless_application_shows_a_challenge(premises: Premises) -> None:
    browser = await premises.browser()
    body = await browser.ask("POST", CODES, json={"code_challenge": S256, "code_challenge_method": "S256"})
    operations.CreateAuthKeysCodeResponse.model_validate(body)
    assert (await take(premises, code=body["data"]["id"], code_verifier=VERIFIER))["user_id"] == "user_ada"
    assert (await consent(premises, 400))["message"].startswith("code_challenge: ")


async def test_a_wrong_proof_spends_the_code_and_a_late_one_comes_too_late(premises: Premises) -> None:
    asked: dict[str, Any] = {"callback_url": CALLBACK, "code_challenge": S256, "code_challenge_method": "S256"}
    proofs: tuple[dict[str, Any], ...] = ({}, {"code_verifier": "wrong"}, {"code_verifier": S256})
    for proof in proofs:
        code = await consent(premises, **asked)
        assert (await take(premises, 403, code=code, **proof))["message"] == "Invalid code or code_verifier"
        await take(premises, 403, code=code, code_verifier=VERIFIER)
    code = await consent(premises, **asked)
    premises.now += datetime.timedelta(seconds=600)
    assert (await take(premises, 403, code=code, code_verifier=VERIFIER))["message"] == "The code has expired"
    code = await consent(premises, **asked)
    other = await take(premises, 400, code=code, code_verifier=VERIFIER, code_challenge_method="plain")
    assert other["message"].startswith("code_challenge_method: ")
    for method in ("S512", 5):
        assert (await take(premises, 400, code="x", code_challenge_method=method))["message"].startswith("code_challenge_method: ")
    await take(premises, 403, code="made-up")
    assert (await take(premises, 400))["message"] == "code: is required"
    async with premises.http.get(KEYS) as answer:
        assert answer.status == 405
    assert premises.changed == []


@pytest.mark.parametrize(
    "callback",
    [
        "", "x", "http://app.example/", "javascript:alert(1)", "ftp://localhost/", "https://", "https://user@app.example/", "//app.example",
        "http://localhost.evil.example/", "http://127.0.0.1.evil.example/", "https://app.example\\@evil.example/", "https://app.example/\n",
        "https:///x", "http://169.254.169.254/", "http://[::1", "https://app.example:99999/", "data:text/html,x", 5, None,
    ],
)  # fmt: skip
async def test_WEB_07_callbacks_are_https_or_this_machine(premises: Premises, callback: Any) -> None:
    assert (await consent(premises, 400, callback_url=callback))["message"].startswith("callback_url: ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("code_challenge", "short"), ("code_challenge", ""), ("code_challenge", "ä" * 43), ("code_challenge_method", "S512"),
        ("limit", -1), ("limit", "much"), ("usage_limit_type", "hourly"), ("expires_at", "2020-01-01T00:00:00Z"), ("key_label", ""),
        ("key_label", "a\nb"),
    ],
)  # fmt: skip
async def test_bad_consents_name_the_field(premises: Premises, field: str, value: Any) -> None:
    body: dict[str, Any] = {"callback_url": CALLBACK, "code_challenge": S256, "code_challenge_method": "S256", field: value}
    assert (await consent(premises, 400, **body))["message"].startswith(f"{field}: ")


async def test_the_page_holds_nothing_of_the_request_and_no_inline_script(premises: Premises) -> None:
    async with premises.http.get("/auth?callback_url=javascript:alert(1)&key_label=<script>") as answer:
        page = await answer.text()
        assert answer.content_type == "text/html"
        assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
    assert "alert" not in page.replace('id="alert" role="alert"', "") and page.count("<script") == 1 and "onclick" not in page
    for name, kind in (("auth.js", "text/javascript"), ("plain.css", "text/css")):
        async with premises.http.get(f"/pages/{name}") as answer:
            assert (answer.status, answer.content_type) == (200, kind)
    await premises.ask("GET", "/pages/..%2f__init__.py", None, 404)


async def test_consents_are_given_at_a_persons_pace(premises: Premises) -> None:
    for _ in range(CODES_PER_MINUTE):
        await consent(premises, callback_url=CALLBACK)
    assert (await consent(premises, 429, callback_url=CALLBACK))["metadata"]["error_type"] == "rate_limit_exceeded"
