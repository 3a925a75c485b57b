"""A real browser, driven over its own DevTools protocol: no driver in between, and none to install.

What a page complains of is kept (`Page.complaints`): exceptions, console errors, and whatever its policy forbade.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

PATIENCE_S = 20.0  # two cores, shared
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0",
)  # fmt: skip


class PageError(Exception):
    """The browser refused, or the page threw."""


class Chromium:
    """A running browser, and the pages that are open in it."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._asked = 0
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._pages: dict[str, Page] = {}
        self._reading = asyncio.create_task(self._read(), name="chromium")

    @contextlib.asynccontextmanager
    async def page(self) -> AsyncIterator[Page]:
        """A tab of a profile of its own: no cookie is there yet."""
        context = (await self.command("Target.createBrowserContext"))["browserContextId"]
        target = await self.command("Target.createTarget", url="about:blank", browserContextId=context)
        session = (await self.command("Target.attachToTarget", targetId=target["targetId"], flatten=True))["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.command(f"{domain}.enable", session)
        try:
            yield page
        finally:
            del self._pages[session]
            await self.command("Target.disposeBrowserContext", browserContextId=context)

    async def command(self, method: str, session: str = "", **parameters: Any) -> Any:
        """Its result. Raises PageError."""
        self._asked += 1
        number, answer = self._asked, asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.send_json({**message, "sessionId": session} if session else message)
        async with asyncio.timeout(PATIENCE_S):
            return await answer

    async def close(self) -> None:
        with contextlib.suppress(PageError):
            await self.command("Browser.close")
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading

    async def _read(self) -> None:
        async for message in self._socket:
            told = json.loads(message.data)
            if (answer := self._waiting.pop(told.get("id", 0), None)) is not None:
                if "error" in told:
                    answer.set_exception(PageError(told["error"]["message"]))
                else:
                    answer.set_result(told["result"])
            elif (page := self._pages.get(told.get("sessionId", ""))) is not None:
                page.hear(told["method"], told["params"])
        for answer in self._waiting.values():
            answer.set_exception(PageError("the browser is gone"))


class Page:
    """One tab. All waiting is bounded."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self.complaints: list[str] = []
        self.failed_loads: list[str] = []  # answers over 399, as "status URL"
        self._browser = browser
        self._session = session

    async def go(self, url: str) -> None:
        """Begin to load it; what the page then shows is to be waited for."""
        told = await self._command("Page.navigate", url=url)
        if "errorText" in told:
            raise PageError(told["errorText"])

    async def evaluate(self, script: str) -> Any:
        """Its JSON value. Raises PageError."""
        told = await self._command("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise PageError(str(told["exceptionDetails"].get("exception", {}).get("description", told["exceptionDetails"]["text"])))
        return told["result"].get("value")

    async def until(self, script: str) -> Any:
        """The first true value of a script; a page may be replaced meanwhile."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                with contextlib.suppress(PageError):
                    if value := await self.evaluate(script):
                        return value
                await asyncio.sleep(0.02)  # pages tell nobody when they have changed

    async def until_shown(self, selector: str) -> str:
        """The text of an element, once somebody could read it."""
        shown = "(e => e && e.checkVisibility() && {text: e.innerText ?? ''})(document.querySelector(%s))"
        found = await self.until(shown % json.dumps(selector))
        return str(found["text"])

    async def is_shown(self, selector: str) -> bool:
        return bool(await self.evaluate(f"!!document.querySelector({json.dumps(selector)})?.checkVisibility()"))

    async def click(self, selector: str) -> None:
        """With the mouse, where the element is."""
        await self.until_shown(selector)
        script = f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        x, y = await self.evaluate(script)
        for kind in ("mousePressed", "mouseReleased"):
            await self._command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def write(self, selector: str, text: str) -> None:
        """In place of what is in the field."""
        await self.until_shown(selector)
        await self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        await self._command("Input.insertText", text=text)

    async def cookies(self) -> list[dict[str, Any]]:
        """Also those that no script can read."""
        return list((await self._command("Network.getCookies"))["cookies"])

    async def _command(self, method: str, **parameters: Any) -> Any:
        return await self._browser.command(method, self._session, **parameters)

    def hear(self, event: str, told: dict[str, Any]) -> None:
        """An event of this tab."""
        if event == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(told["args"]))
        elif event == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning") and told["entry"]["source"] != "network":
            self.complaints.append(told["entry"]["text"])
        elif event == "Network.responseReceived" and told["response"]["status"] >= 400:
            self.failed_loads.append(f"{told['response']['status']} {told['response']['url']}")


@contextlib.asynccontextmanager
async def running_chromium(folder: Path) -> AsyncIterator[Chromium]:
    """A browser whose profile is in `folder`."""
    program = shutil.which("chromium")
    assert program is not None
    process = await asyncio.create_subprocess_exec(
        program, *FLAGS, f"--user-data-dir={folder}", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(2 * PATIENCE_S):
            address = None
            while address is None:
                line = (await process.stderr.readline()).decode(errors="replace")
                assert line, "chromium ended before it listened"
                address = re.search(r"DevTools listening on (ws://\S+)", line)
        draining = asyncio.create_task(process.stderr.read(), name="chromium stderr")
        async with aiohttp.ClientSession() as http, http.ws_connect(address[1], max_msg_size=0) as socket:
            browser = Chromium(socket)
            try:
                yield browser
            finally:
                await browser.close()
        await asyncio.wait_for(process.wait(), PATIENCE_S)
        await draining
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
