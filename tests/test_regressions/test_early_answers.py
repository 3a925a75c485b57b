"""A provider may answer before it has read the request, and never read the rest: no later request may wait behind it."""

from __future__ import annotations

import asyncio
import contextlib
import re
from pathlib import Path

import pytest

from tests.edge.stage import HELLO, RAW, completion, plain, staged

LARGE = {"model": RAW, "messages": HELLO, "padding": "x" * 20_000_000}  # more than sockets take unread


class Hasty:
    """Answers each request by its head; of a large one it reads nothing more, and keeps the connection."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self.connections = 0
        self.open: set[asyncio.Task[None]] = set()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.open.add(task)
        self.connections += 1
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    length = int(head.lower().partition(b"content-length:")[2].split()[0])
                    if length < 1000:
                        await reader.readexactly(length)
                    writer.write(self._answer)
                    if length >= 1000:
                        writer.transport.pause_reading()  # type: ignore[attr-defined]
                        await asyncio.Event().wait()
        finally:
            self.open.discard(task)
            writer.close()


@pytest.mark.parametrize("head", [b"", b"Connection: close\r\n"], ids=["kept", "closing"])
async def test_a_provider_that_answers_before_it_has_read_is_not_asked_on_that_connection_again(tmp_path: Path, head: bytes) -> None:
    hasty = Hasty(plain(completion(), head))
    server = await asyncio.start_server(hasty, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    def at_hasty(catalog: str) -> str:
        return re.sub(r'(slug = "raw".*?base_url = ")[^"]*', rf"\g<1>http://127.0.0.1:{port}/v1", catalog, flags=re.DOTALL)

    try:
        async with staged(tmp_path, catalog=at_hasty) as stage, asyncio.timeout(60.0):
            async with stage.connected() as caller:
                key = f"Authorization: Bearer {stage.gateway.key}\r\n"
                status, _, _ = await caller.ask(LARGE, "/api/v1/chat/completions", key)
                assert status == 200
            for _ in range(3):
                assert (await stage.ask(RAW, messages=HELLO)).status == 200
            assert hasty.connections >= 2
            ours = {each for each in stage.edge.net_connections() if each.raddr and each.raddr.port == port}
            assert len(ours) <= 1  # the one that was not read is given up, not kept open for its rest
    finally:
        for task in list(hasty.open):
            task.cancel()
        await asyncio.gather(*hasty.open, return_exceptions=True)
        server.close()
