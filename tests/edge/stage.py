"""A running gateway between scripted providers and callers, kept for a whole module of tests.

Three providers: `raw` speaks whatever bytes a test writes, `first` is simulated and misbehaves as told, `good` is
simulated and healthy. Models: `RAW`, `FIRST` and `GOOD` have one endpoint each; `RAW_THEN_GOOD` and `FIRST_THEN_GOOD`
have a healthy second one, and their callers wish them to be tried in that order. No breaker opens and no retry is refused
unless a module's settings ask for it: what tests do to one endpoint again and again is not to reach the next test. Where a
provider says when to come back, though, it is held: such tests bring models of their own (`models`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp
import psutil  # type: ignore[import-untyped]
import pytest
import pytest_asyncio

from bench.behaviour import Behaviour
from bench.provider import Provider
from tests.conftest import RunningGateway, render_catalog
from tests.provider_caller import Caller, connected, datas

RAW, FIRST, GOOD = "acme/raw", "acme/first", "acme/good"
RAW_THEN_GOOD, FIRST_THEN_GOOD = "acme/raw-then-good", "acme/first-then-good"
MODELS = {RAW: ("raw",), FIRST: ("first",), GOOD: ("good",), RAW_THEN_GOOD: ("raw", "good"), FIRST_THEN_GOOD: ("first", "good")}
Models = Mapping[str, tuple[str, ...]]  # id -> providers, in the order in which they are tried
UNMOVED: Mapping[str, Any] = {
    "breaker_failures": 10**6,
    "breaker_error_share": 1.0,
    "breaker_attempts_min": 10**6,
    "retry_budget_per_s": 10**6,
}
HELLO = [{"role": "user", "content": "Hello"}]


def in_order(slugs: Collection[str], body: Mapping[str, Any]) -> dict[str, Any]:
    """The wish that providers are tried in this order, unless the body has wishes of its own."""
    return {"provider": {"order": list(slugs)}} if len(slugs) > 1 and body.keys().isdisjoint({"provider", "models"}) else {}


SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ROLE = {"role": "assistant", "content": ""}


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(delta: Mapping[str, Any], *, finish: str | None = None, **more: Any) -> bytes:
    """One chat event as an OpenAI-like provider writes it."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return sse({"id": "up-1", "object": "chat.completion.chunk", "created": 7, "model": "raw", "choices": [choice], **more})


def sse(data: object) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def completion(text: str = "fine") -> bytes:
    """A whole chat answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return json.dumps({"id": "up-1", "object": "chat.completion", "created": 7, "model": "raw", "choices": [choice]}).encode()


def plain(body: bytes, head: bytes = b"", content_type: bytes = b"application/json") -> bytes:
    """A whole HTTP answer; `head` are further header lines."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n%bContent-Length: %d\r\n\r\n%b" % (content_type, head, len(body), body)


class RawCall:
    """One request as the raw provider read it, and its connection."""

    def __init__(self, head: bytes, body: bytes, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.head = head
        self.body = body
        self.number = number  # of this connection's requests, from 1
        self.reader = reader
        self.writer = writer
        self.keep = False  # the connection is for further requests

    async def write(self, *pieces: bytes) -> None:
        """Each piece as a segment of its own, as far as the kernel lets us."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(0)

    async def left(self) -> float:
        """Waits until the other side closes; returns when, by the monotonic clock."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass
        return time.monotonic()

    def reset(self) -> None:
        connection: socket.socket = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[RawCall], Awaitable[None]]


class RawProvider:
    """Reads whole requests and lets `script` do with the connection what it likes; it is closed after the script."""

    def __init__(self, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self._host = host
        self._tls = tls
        self.script: Script = _silent
        self.calls: list[RawCall] = []
        self.connections = 0
        self.open_connections = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._called = asyncio.Condition()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self._host}:{self.port}/v1"

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def answers(self, *pieces: bytes) -> None:
        """Every request gets these bytes, then the end of the connection."""

        async def script(call: RawCall) -> None:
            await call.write(*pieces)

        self.script = script

    async def called(self, count: int) -> RawCall:
        """The `count`-th request, waited for."""
        async with asyncio.timeout(10.0), self._called:
            await self._called.wait_for(lambda: len(self.calls) >= count)
        return self.calls[count - 1]

    async def open(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, self._host, port, backlog=1024, ssl=self._tls)

    @contextlib.asynccontextmanager
    async def deaf(self) -> AsyncIterator[socket.socket]:
        """Its port belongs to a listener that accepts nothing and whose one place is taken: the kernel drops what would open more.

        Gives the listener; who accepts from it makes room.
        """
        port = self.port
        await self.__aexit__()
        with contextlib.ExitStack() as opened:
            listener = opened.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self._host, port))
            listener.listen(0)
            opened.enter_context(socket.create_connection((self._host, port)))
            yield listener
        await self.open(port)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes the listener and every connection; `open` may follow."""
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open_connections += 1
        try:
            await self._serve_all(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            self.open_connections -= 1
            writer.close()

    async def _serve_all(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, keep = 0, True
        while keep:
            number += 1
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
            call = RawCall(head, await reader.readexactly(length), number, reader, writer)
            async with self._called:
                self.calls.append(call)
                self._called.notify_all()
            await self.script(call)
            keep = call.keep


async def _silent(call: RawCall) -> None:
    await call.left()


@dataclass
class Answered:
    """What a caller got."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float = 0.0

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Data of the stream's events; "[DONE]" as text."""
        return datas(self.body)

    @property
    def text(self) -> str:
        return "".join(part["choices"][0]["delta"].get("content") or "" for part in self.events if part != "[DONE]" and part.get("choices"))

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        return found


@dataclass
class Stage:
    """One gateway with its providers. `ask` is the caller."""

    gateway: RunningGateway
    raw: RawProvider
    first: Provider
    good: Provider
    session: aiohttp.ClientSession
    models: Models = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"{self.gateway.url}/api/v1/chat/completions"

    @property
    def authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.gateway.key}"}

    async def ask(
        self, model: str, *, stream: bool = False, path: str = "", headers: Mapping[str, str] | None = None, **more: Any
    ) -> Answered:
        """One chat request, answered whole."""
        body = {"model": model, "messages": HELLO, "stream": stream, **in_order(self.models.get(model, ()), more), **more}
        began = time.monotonic()
        url = f"{self.gateway.url}{path}" if path else self.url
        async with self.session.post(url, json=body, headers={**self.authorization, **(headers or {})}) as answer:
            data = await answer.read()
            return Answered(answer.status, answer.headers, data, time.monotonic() - began)

    def connected(self) -> AbstractAsyncContextManager[Caller]:
        """A raw connection to the gateway."""
        return connected(self.gateway)

    @contextlib.asynccontextmanager
    async def streaming(self, model: str, **more: Any) -> AsyncIterator[Caller]:
        """A raw connection on which a stream was asked for."""
        async with self.connected() as caller:
            key = f"Authorization: Bearer {self.gateway.key}\r\n"
            body = {"model": model, "messages": HELLO, "stream": True, **in_order(self.models.get(model, ()), more), **more}
            caller.send(body, "/api/v1/chat/completions", key)
            yield caller

    @property
    def edge(self) -> psutil.Process:
        return self.gateway.edge

    def rss_bytes(self) -> int:
        """Of all edges."""
        return sum(psutil.Process(pid).memory_info().rss for pid in self.gateway.health()["edges"])

    def forget_peak(self) -> None:
        """From now on `peak_bytes` counts anew."""
        for pid in self.gateway.health()["edges"]:
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """The most memory that the edges have held at a time."""
        texts = [Path(f"/proc/{pid}/status").read_text() for pid in self.gateway.health()["edges"]]
        return sum(int(text.partition("VmHWM:")[2].split()[0]) * 1024 for text in texts)

    def exchange(self, generation_id: str) -> dict[str, Any]:
        """The log line of an exchange."""
        return self.gateway.logged("exchange", generation=generation_id)


def roomy(catalog: str) -> str:
    """The catalog with models that make millions of tokens."""
    catalog = catalog.replace("context_length = 131072", "context_length = 4000000")
    return catalog.replace("max_completion_tokens = 8192", "max_completion_tokens = 4000000")


def sighted(catalog: str) -> str:
    """The catalog with models that look at images."""
    return catalog.replace("context_length = 131072\n", 'context_length = 131072\ninput_modalities = ["text", "image"]\n')


@contextlib.asynccontextmanager
async def staged(
    folder: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    catalog: Callable[[str], str] = lambda text: text,
    environ: Mapping[str, str] | None = None,
    workers: int = 1,
    models: Models | None = None,
    training: bool = False,
) -> AsyncIterator[Stage]:
    """A ready Stage. `models` come beside the usual ones; `catalog` may change the catalog's text before the start; `training`:
    the account lets providers train on its prompts.

    Fails when an edge ended or was replaced meanwhile.
    """
    async with contextlib.AsyncExitStack() as opened:
        raw = await opened.enter_async_context(RawProvider())
        first = await opened.enter_async_context(Provider(name="First", keep_bodies=True, keep_headers=True))
        good = await opened.enter_async_context(Provider(name="Good", keep_bodies=True, keep_headers=True))
        urls = {"raw": raw.url, "first": f"{first.url}/v1", "good": f"{good.url}/v1"}
        offered = {**MODELS, **(models or {})}
        routing = {**UNMOVED, **(settings or {}).get("routing", {})}
        gateway = RunningGateway(
            folder / "g",
            catalog(render_catalog(urls, offered)),
            settings={**(settings or {}), "routing": routing},
            workers=workers,
            environ=environ,
        )
        opened.push_async_callback(asyncio.to_thread, gateway.close)
        await asyncio.to_thread(gateway.start)
        account = await asyncio.to_thread(gateway.create_account)
        if training:
            allow = ("--account", account["account_id"], "--train-paid", "on", "--train-free", "on")
            await asyncio.to_thread(gateway.admin, "account", "set", *allow)
        session = await opened.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=30.0))
        )
        edges = set(gateway.health()["edges"])
        yield Stage(gateway, raw, first, good, session, offered)
        assert set(gateway.health()["edges"]) == edges, "an edge was replaced"


def stage_of(**options: Any) -> Any:
    """The fixture of a module whose tests share a Stage: `stage = stage_of(settings=...)`, with the options of `staged`."""

    @pytest_asyncio.fixture(scope="module", loop_scope="module")
    async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
        async with staged(tmp_path_factory.mktemp("stage"), **options) as running:
            yield running

    return stage


@contextlib.contextmanager
def behaving(provider: Provider, behaviour: Behaviour) -> Any:
    """The provider behaves so in the block, and is healthy and forgetful after it."""
    provider.set_behaviour(behaviour)
    try:
        yield
    finally:
        provider.set_behaviour(Behaviour())
