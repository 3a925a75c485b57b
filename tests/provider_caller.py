"""A raw caller, of the simulated provider or of a gateway: requests and answers as bytes on one connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

HELLO: list[Any] = [{"role": "user", "content": "hello there"}]


class Caller:
    """One raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, body: dict[str, Any], path: str = "/v1/chat/completions", extra: str = "", method: str = "POST") -> None:
        data = json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: sim\r\nContent-Length: {len(data)}\r\n{extra}\r\n"
        self.writer.write(head.encode() + data)

    async def head(self) -> tuple[int, dict[str, str]]:
        raw = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.split(": ", 1) for line in raw[1:] if line)
        return int(raw[0].split()[1]), {name.lower(): value for name, value in pairs}

    async def chunk(self) -> bytes:
        """One HTTP chunk; empty at the end of the body."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        status, headers = await self.head()
        if "content-length" in headers:
            return status, headers, await self.reader.readexactly(int(headers["content-length"]))
        if "transfer-encoding" not in headers:
            return status, headers, await self.reader.read()
        body = b""
        while data := await self.chunk():
            body += data
        return status, headers, body

    async def ask(self, body: dict[str, Any], path: str = "/v1/chat/completions", extra: str = "") -> tuple[int, dict[str, str], bytes]:
        self.send(body, path, extra)
        return await self.answer()


class Serving(Protocol):
    """A provider or a gateway."""

    @property
    def url(self) -> str: ...


@asynccontextmanager
async def connected(serving: Serving) -> AsyncIterator[Caller]:
    """A raw connection."""
    host, _, port = serving.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Caller(reader, writer)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def ask(sim: str = "", *, stream: bool = False, **more: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "sage-1", "messages": HELLO, "stream": stream, **more}
    if stream:
        body.setdefault("stream_options", {"include_usage": True})
    return body | ({"metadata": {"sim": sim}} if sim else {})


def datas(body: bytes) -> list[Any]:
    """The events' data: objects, and the `[DONE]` text."""
    lines = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def text_of(chunks: list[Any]) -> str:
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c != "[DONE]" and c["choices"])
