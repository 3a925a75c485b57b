"""WEB-03: what callers and providers said is text wherever it is shown: a browser that opens any of it runs nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from bench.behaviour import Behaviour
from bench.provider import Provider
from tests.conftest import RunningGateway, eventually, render_catalog
from tests.pages.chromium import Chromium, Page, PageError, running_chromium
from tests.pages.site import serving
from tests.pages.test_consent_page import CHAT, sign_up

pytestmark = [pytest.mark.system("chromium"), pytest.mark.asyncio(loop_scope="module")]

# Each would tell the trap of itself. Whatever is asked of the trap counts: a script that ran, an image that was fetched.
PAYLOADS = (
    "<script src={trap}/s></script>",
    "<img src={trap}/i onerror=window.ran=1>",
    '"><svg onload=window.ran=1><image href={trap}/v>',
    "'-(window.ran=1)-'",
    "</script></title></textarea><script>window.ran=1</script>",
    "javascript:window.ran=1",
    "<iframe srcdoc='<script>parent.ran=1</script>'>",
    "<meta http-equiv=refresh content=0;url={trap}/m>",
    "]]><x:script xmlns:x='http://www.w3.org/1999/xhtml'>window.ran=1</x:script>",
)


class Trap:
    """A server that nothing may ask."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.url = ""

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Trap]:
        async def fall(request: web.Request) -> web.Response:
            self.asked.append(str(request.rel_url))
            return web.Response(text="window.ran = 1", content_type="text/javascript", headers={"Access-Control-Allow-Origin": "*"})

        async with serving(web.get("/{tail:.*}", fall)) as self.url:
            yield self

    @property
    def payloads(self) -> list[str]:
        return [payload.format(trap=self.url) for payload in PAYLOADS]


class Scene:
    """A gateway in which everything that takes text has been told the payloads, and a browser signed in to it."""

    def __init__(self, gateway: RunningGateway, trap: Trap, page: Page) -> None:
        self.gateway, self.trap, self.page = gateway, trap, page
        self.generations: list[str] = []
        self.errors: list[tuple[str, bytes]] = []  # content type and body of what failed

    async def fetch(self, method: str, path: str, body: object = None) -> Any:
        """As the page's own scripts ask."""
        asked = {"method": method, "headers": {"Content-Type": "application/json"}, **({"body": json.dumps(body)} if body else {})}
        script = f"(o => (o.headers['X-CSRF-Token'] = csrfToken, fetch('/api/v1{path}', o).then(a => a.json())))({json.dumps(asked)})"
        return await self.page.evaluate(script)

    async def chat(self, key: str, payload: str, **more: object) -> None:
        headers = {"Authorization": f"Bearer {key}", "X-Title": payload, "HTTP-Referer": payload, "User-Agent": payload}
        async with aiohttp.ClientSession(headers=headers) as http:
            async with http.post(f"{self.gateway.url}/api/v1/chat/completions", json={**CHAT, "user": payload, **more}) as answer:
                body = await answer.read()
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                if answer.status != 200 or b'"error"' in body:
                    self.errors.append((answer.content_type, body))
                self.generations.append(answer.headers["X-Generation-Id"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Chromium]:
    async with running_chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(chromium: Chromium, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    async with Provider(name="North") as provider, Trap().open() as trap, chromium.page() as page:
        catalog = render_catalog({"north": f"{provider.url}/v1"})
        gateway = RunningGateway(tmp_path_factory.mktemp("gateway"), catalog, settings={"billing": {"signup_usd": "1"}}, workers=1)
        try:
            await asyncio.to_thread(gateway.start)
            await page.go(f"{gateway.url}/auth?code_challenge={'a' * 43}")
            await sign_up(page, "mallory@example.com")
            scene = Scene(gateway, trap, page)
            await _tell_everything(scene, provider)
            yield scene
        finally:
            await asyncio.to_thread(gateway.close)


async def _tell_everything(scene: Scene, provider: Provider) -> None:
    for payload in scene.trap.payloads:
        made = await scene.fetch("POST", "/keys", {"name": payload})
        assert made["data"]["name"] == payload
        provider.set_behaviour(Behaviour())
        await scene.chat(made["key"], payload)
        provider.set_behaviour(Behaviour(status=400, error_message=payload, error_code=payload, error_type=payload))
        await scene.chat(made["key"], payload)
        provider.set_behaviour(Behaviour(error_event_after=3, error_message=payload))
        await scene.chat(made["key"], payload, stream=True)
    told = [await scene.fetch("GET", f"/generation?id={each}") for each in scene.generations]
    async with asyncio.timeout(10.0):
        while any("error" in each for each in told):
            await asyncio.sleep(0.1)
            told = [await scene.fetch("GET", f"/generation?id={each}") for each in scene.generations]
    kept = {each["data"]["http_referer"] for each in told}
    assert kept == set(scene.trap.payloads)  # so there is something to show


def places(scene: Scene) -> dict[str, str]:
    """Whatever a browser can open that says what somebody said, and what it takes that for; of feeds it knows nothing."""
    json_type, payloads = "application/json", scene.trap.payloads
    found = dict.fromkeys(("/api/v1/keys", "/api/v1/credits", "/api/v1/privacy", "/api/v1/session", "/api/v1/activity"), json_type)
    found |= {f"/api/v1/generation?id={each}": json_type for each in scene.generations[:6]}
    for payload in payloads:
        said = quote(payload, safe="")
        asked = ("callback_url", "code_challenge", "limit", "key_label", "usage_limit_type", "expires_at", "workspace_id")
        found[f"/auth?{urlencode(dict.fromkeys(asked, payload))}#{said}"] = "text/html"
        found |= {f"/docs?x={said}#{said}": "text/html", f"/api/v1/models?use_rss=true&q={said}": "text/plain"}
        below = ("", "pages/", "api/v1/", "api/v1/keys/", "api/v1/generation?id=", "api/v1/models?q=", "api/v1/activity?date=")
        others = (*(f"/{each}{said}" for each in below), f"/api/v1/model/{said}/x", f"/api/v1/chat/completions?{said}")
        found |= dict.fromkeys(others, json_type)
    return found


async def test_web_03_nothing_that_was_said_runs_wherever_it_is_opened(scene: Scene) -> None:
    page = scene.page
    for place, content_type in places(scene).items():
        await page.evaluate("window.before = true")
        await page.go(f"{scene.gateway.url}{place}")
        await page.until("!window.before && document.readyState === 'complete'")
        assert await page.evaluate("document.contentType") == content_type, place
        assert await page.evaluate("window.ran") is None, place
        assert not await page.evaluate("document.querySelector('iframe, img, meta[http-equiv], svg image') !== null"), place
    assert scene.trap.asked == []
    assert page.complaints == []  # nor was there anything that a policy had to forbid


async def test_web_03_key_names_are_shown_as_they_were_given(scene: Scene) -> None:
    await scene.page.go(f"{scene.gateway.url}/api/v1/keys")
    shown = json.loads(str(await scene.page.until("document.contentType === 'application/json' && document.body.innerText")))
    assert {row["name"] for row in shown["data"]} == set(scene.trap.payloads)


async def test_web_03_what_providers_say_of_errors_comes_as_json_or_events(scene: Scene) -> None:
    assert len(scene.errors) == 2 * len(PAYLOADS)
    assert {content_type for content_type, _ in scene.errors} == {"application/json", "text/event-stream"}
    assert all(json.dumps(payload)[1:-1].encode() in b"".join(body for _, body in scene.errors) for payload in scene.trap.payloads)


async def test_web_03_the_table_of_usage_is_a_download(scene: Scene) -> None:
    with pytest.raises(PageError, match="ERR_ABORTED"):
        await scene.page.go(f"{scene.gateway.url}/api/v1/activity?format=csv")


@pytest.mark.parametrize("path", ["/auth", "/docs", "/pages/auth.js", "/pages/plain.css", "/pages/icon.svg"])
async def test_web_03_pages_run_files_of_ours_and_nothing_else(scene: Scene, path: str) -> None:
    async with aiohttp.ClientSession() as http, http.get(scene.gateway.url + path) as answer:
        assert answer.status == 200 and answer.headers["X-Content-Type-Options"] == "nosniff"
        policy = answer.headers["Content-Security-Policy"]
    rules = {words[0]: words[1:] for words in (part.split() for part in policy.split(";"))}
    assert rules["default-src"] == ["'none'"] and rules["base-uri"] == ["'none'"] and rules["frame-ancestors"] == ["'none'"]
    assert {source for name, sources in rules.items() if name.endswith("-src") for source in sources} <= {"'none'", "'self'"}
    assert rules["require-trusted-types-for"] == ["'script'"] and rules["trusted-types"] == ["'none'"]


async def test_web_03_the_pages_own_scripts_could_not_make_markup_of_text(scene: Scene, chromium: Chromium) -> None:
    async with chromium.page() as page:
        await page.go(f"{scene.gateway.url}/auth")
        await page.until_shown("#sign-in")
        with pytest.raises(PageError, match="TrustedHTML"):
            await page.evaluate("document.body.innerHTML = '<b>bold</b>'")
        await eventually(lambda: any("TrustedHTML" in text for text in page.complaints))  # so silence means something


async def test_web_03_another_sites_form_gets_no_page_of_ours_to_run(scene: Scene, chromium: Chromium) -> None:
    """A form of a foreign page posts what looks like JSON, and the browser opens the answer."""
    async with chromium.page() as page:
        await page.go(f"{scene.trap.url}/form")
        await page.until("document.readyState === 'complete'")
        body = json.dumps({"model": scene.trap.payloads[0], "messages": [{"role": "user", "content": "x"}], "a": "="})
        script = """(([url, name]) => {
            const form = Object.assign(document.createElement('form'), { method: 'post', enctype: 'text/plain', action: url });
            form.append(Object.assign(document.createElement('input'), { name }));
            document.body.append(form);
            form.submit();
        })(%s)"""
        await page.evaluate(script % json.dumps([f"{scene.gateway.url}/api/v1/chat/completions", body]))
        await page.until("document.contentType === 'application/json'")
        assert json.loads(await page.evaluate("document.body.innerText"))["error"]["code"] in (400, 401, 403, 415)
        assert await page.evaluate("window.ran") is None
    scene.trap.asked.clear()
