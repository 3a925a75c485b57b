"""The page on which a person consents to an application's key, in a real browser: what the person sees, and what becomes of it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import html
import secrets
from collections.abc import AsyncIterator
from urllib.parse import urlencode

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from bench.provider import Provider
from tests.conftest import MODEL, RunningGateway, StartGateway, eventually, render_catalog
from tests.pages.chromium import Chromium, Page, running_chromium
from tests.pages.site import serving

PASSWORD = "correct horse battery"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}

pytestmark = [pytest.mark.system("chromium"), pytest.mark.asyncio(loop_scope="module")]


class Application:
    """Somebody's program that wants a key: sends people to the consent page and is sent back a code."""

    def __init__(self, gateway: RunningGateway) -> None:
        self.gateway = gateway
        self.url = ""
        self.verifier = secrets.token_urlsafe(32)
        self.came_back: asyncio.Queue[dict[str, str]] = asyncio.Queue(10)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Application]:
        async def home(request: web.Request) -> web.Response:
            link = f'<a id="ask" href="{html.escape(self.consent_url())}">Get a key</a>'
            return web.Response(text=f"<title>Home</title>{link}", content_type="text/html")

        async def back(request: web.Request) -> web.Response:
            self.came_back.put_nowait(dict(request.query))
            return web.Response(text='<title>Back</title><p id="thanks">Thanks</p>', content_type="text/html")

        async with serving(web.get("/", home), web.get("/back", back)) as self.url:
            yield self

    def consent_url(self, **more: str) -> str:
        challenge = base64.urlsafe_b64encode(hashlib.sha256(self.verifier.encode()).digest()).rstrip(b"=").decode()
        asked = {"callback_url": f"{self.url}/back?state=7", "code_challenge": challenge, "code_challenge_method": "S256", **more}
        return f"{self.gateway.url}/auth?{urlencode(asked)}"

    async def exchange(self, code: str, verifier: str | None = None) -> tuple[int, dict[str, str]]:
        body = {"code": code, "code_verifier": verifier or self.verifier, "code_challenge_method": "S256"}
        async with aiohttp.ClientSession() as http, http.post(f"{self.gateway.url}/api/v1/auth/keys", json=body) as answer:
            return answer.status, await answer.json()

    async def chat(self, key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        async with aiohttp.ClientSession(headers=headers) as http:
            async with http.post(f"{self.gateway.url}/api/v1/chat/completions", json=CHAT) as answer:
                await answer.read()
                return answer.status


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Chromium]:
    async with running_chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="module")
async def page(chromium: Chromium) -> AsyncIterator[Page]:
    async with chromium.page() as there:
        yield there


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningGateway]:
    """Gives newcomers a dollar."""
    async with Provider(name="North") as provider:
        catalog = render_catalog({"north": f"{provider.url}/v1"})
        running = RunningGateway(tmp_path_factory.mktemp("gateway"), catalog, settings={"billing": {"signup_usd": "1"}}, workers=2)
        try:
            yield await asyncio.to_thread(running.start)
        finally:
            await asyncio.to_thread(running.close)


@pytest_asyncio.fixture(loop_scope="module")
async def application(gateway: RunningGateway) -> AsyncIterator[Application]:
    async with Application(gateway).running() as there:
        yield there


async def fill_in(page: Page, email: str) -> None:
    await page.write("#email", email)
    await page.write("#password", PASSWORD)


async def sign_up(page: Page, email: str) -> str:
    """From the form to what the page asks then."""
    await page.until_shown("#sign-in")
    await fill_in(page, email)
    await page.click("#sign-up")
    return await page.until_shown("#consent")


async def test_a_person_signs_up_consents_and_the_application_has_a_key_that_works(page: Page, application: Application) -> None:
    await page.go(application.consent_url(key_label="Notes", limit="0.5", usage_limit_type="monthly"))
    assert "Sign in, or sign up" in await page.until_shown("#sign-in")
    assert not await page.is_shown("#consent")
    await fill_in(page, "grace@example.com")
    await page.click("#sign-up")
    asked = await page.until_shown("#consent")
    assert application.url.removeprefix("http://") in asked and "grace@example.com" in asked and "up to 0.5 USD monthly" in asked
    [cookie] = await page.cookies()
    assert cookie["name"] == "__Host-session" and cookie["secure"] and cookie["httpOnly"] and cookie["sameSite"] == "Lax"
    assert await page.evaluate("document.cookie") == ""
    await page.click("#authorize")
    assert await page.until_shown("#thanks") == "Thanks"
    came = await application.came_back.get()
    assert came["state"] == "7"
    assert (await application.exchange(came["code"]))[0] == 200
    assert (await application.exchange(came["code"]))[0] == 403  # once
    assert page.complaints == []
    ours = [load for load in page.failed_loads if application.gateway.url in load and not load.endswith("/favicon.ico")]
    assert ours == [f"401 {application.gateway.url}/api/v1/session"]  # by which the page knows that nobody is signed in


async def test_the_key_of_a_consent_is_the_persons_and_no_more_than_was_said(page: Page, application: Application) -> None:
    await page.go(application.consent_url(limit="0.25"))
    await sign_up(page, "ada@example.com")
    await page.click("#authorize")
    code = (await application.came_back.get())["code"]
    status, taken = await application.exchange(code)
    assert status == 200 and await application.chat(taken["key"]) == 200
    headers = {"Authorization": f"Bearer {taken['key']}"}
    async with aiohttp.ClientSession(headers=headers) as http, http.get(f"{application.gateway.url}/api/v1/key") as answer:
        assert (await answer.json())["data"]["limit"] == 0.25
    await page.go(application.consent_url())  # who is signed in is asked at once
    assert "ada@example.com" in await page.until_shown("#consent")
    await page.click("#authorize")
    code = (await application.came_back.get())["code"]
    assert (await application.exchange(code, "somebody else's verifier"))[0] == 403
    assert (await application.exchange(code))[0] == 403  # a wrong proof spends it


async def test_who_refuses_goes_back_and_nothing_was_made(page: Page, application: Application) -> None:
    await page.go(f"{application.url}/")
    await page.click("#ask")
    await sign_up(page, "joan@example.com")
    await page.click("#refuse")
    await page.until("document.title === 'Home'")
    assert application.came_back.empty() and page.complaints == []
    await page.go(f"{application.gateway.url}/docs")
    await page.until("document.readyState === 'complete'")
    assert await page.evaluate("fetch('/api/v1/keys').then(a => a.json()).then(b => b.data.length)") == 0


async def test_what_is_wrong_is_said_on_the_page(page: Page, application: Application) -> None:
    await page.go(application.consent_url(callback_url="http://evil.example/back"))
    await sign_up(page, "mary@example.com")
    await page.click("#authorize")
    assert "callback_url: must be an https URL" in await page.until_shown("#alert")
    assert await page.evaluate("location.pathname") == "/auth"
    await page.go(application.consent_url(callback_url="javascript:alert(1)"))
    await page.until_shown("#consent")
    await page.click("#authorize")
    assert "callback_url: must be an https URL" in await page.until_shown("#alert")
    assert page.complaints == []


async def test_a_wrong_password_is_told_and_a_headless_application_gets_its_code_by_hand(page: Page, application: Application) -> None:
    challenge = base64.urlsafe_b64encode(hashlib.sha256(application.verifier.encode()).digest()).rstrip(b"=").decode()
    await page.go(f"{application.gateway.url}/auth?code_challenge={challenge}&code_challenge_method=S256")
    await page.until_shown("#sign-in")
    await fill_in(page, "rosa@example.com")
    await page.click("#sign-in button[type=submit]")
    assert await page.until_shown("#alert") == "Wrong email or password"
    await page.click("#sign-up")
    await page.until_shown("#consent")
    await page.click("#authorize")
    code = await page.until_shown("#code")
    status, taken = await application.exchange(code)
    assert status == 200 and await application.chat(taken["key"]) == 200


async def test_script_in_what_an_application_says_is_shown_as_text(page: Page, application: Application) -> None:
    payload = "<img src=x onerror=alert(1)><script>alert(1)</script>"
    await page.go(application.consent_url(limit=payload, key_label=payload, usage_limit_type=payload))
    assert payload in await sign_up(page, "edith@example.com")
    assert await page.evaluate("document.images.length + document.querySelectorAll('main script').length") == 0
    assert page.complaints == []
    await page.evaluate("(s => { s.append('window.ran = 1'); document.body.append(s) })(document.createElement('script'))")
    await page.evaluate(f"document.body.append(Object.assign(document.createElement('img'), {{src: '{application.url}/x.png'}}))")
    await eventually(
        lambda: len([text for text in page.complaints if "Content Security Policy" in text or "TrustedScript" in text]) >= 2
    )  # so silence means something
    assert await page.evaluate("window.ran") is None


async def test_where_sign_up_is_closed_the_page_says_so(page: Page, start_gateway: StartGateway) -> None:
    gateway = await asyncio.to_thread(lambda: start_gateway({"north": "http://127.0.0.1:9/v1"}, settings={"accounts": {"signup": False}}))
    await page.go(f"{gateway.url}/auth?code_challenge={'a' * 43}")
    assert "Sign-up is closed here" in await page.until_shown("#sign-in")
    assert not await page.is_shown("#sign-up") and await page.is_shown("#sign-in button[type=submit]")
