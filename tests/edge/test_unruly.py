"""Callers who leave at any instant and providers who end at any byte: no hang, no fault of ours, nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.edge.stage import HELLO, RAW, RAW_THEN_GOOD, SSE_HEAD, RawCall, Script, Stage, chunk, completion, event, plain, staged

ROUTE = "/api/v1/chat/completions"
CALLERS, ROUNDS = 30, 4
EVENTS = [*(event({"content": "x"}) for _ in range(4)), event({}, finish="stop"), b"data: [DONE]\n\n"]
STREAM = [SSE_HEAD, *map(chunk, EVENTS), b"0\r\n\r\n"]


def unruly(rng: random.Random) -> Script:
    """A provider that ends its answers at any byte, or at their end, or keeps the connection as it should."""

    async def script(call: RawCall) -> None:
        pieces = STREAM if b'"stream": true' in call.body else [plain(completion())]
        fate = rng.random()
        if fate < 0.2:  # closes exactly at the end
            await call.write(*pieces)
        elif fate < 0.4:
            whole = b"".join(pieces)
            await call.write(whole[: rng.randrange(len(whole))])
            call.reset()
        else:
            for piece in pieces if fate < 0.8 else [b"".join(pieces)]:
                await call.write(piece)
            call.keep = True

    return script


async def restless(stage: Stage, rng: random.Random, statuses: Counter[int]) -> None:
    """One connection: some requests, left before, within, or right at the end of an answer."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ValueError):
        async with stage.connected() as caller:
            for _ in range(rng.randrange(1, 5)):
                body = {"model": rng.choice([RAW, RAW_THEN_GOOD]), "messages": HELLO, "stream": rng.random() < 0.6}
                caller.send(body, ROUTE, f"Authorization: Bearer {stage.gateway.key}\r\n")
                fate = rng.random()
                if fate < 0.3:
                    await asyncio.sleep(rng.random() * 0.01)
                elif fate < 0.5:
                    _, headers = await caller.head()
                    while "transfer-encoding" in headers and rng.random() < 0.7 and await caller.chunk():
                        pass
                if fate < 0.5:
                    caller.writer.transport.abort()
                    return
                if fate < 0.6:
                    caller.writer.write_eof()
                status, headers, _ = await caller.answer()
                statuses[status] += 1
                if headers.get("connection") == "close":
                    return


@pytest.mark.parametrize("fsync", ["batch", "always"])
async def test_whoever_leaves_whenever_nothing_hangs_or_stays(tmp_path: Path, fsync: str) -> None:
    rng, statuses = random.Random(7), Counter[int]()
    async with staged(tmp_path, settings={"journal": {"fsync": fsync}}) as stage:
        stage.raw.script = unruly(rng)
        fds = stage.edge.num_fds()
        async with asyncio.timeout(60.0):
            for _ in range(ROUNDS):
                await asyncio.gather(*(restless(stage, rng, statuses) for _ in range(CALLERS) for _ in range(2)))
        assert set(statuses) <= {200, 502} and statuses[200] > statuses[502]  # 502: the only provider broke off, and nothing had been sent

        def is_quiet() -> bool:
            figures = re.findall(
                r"^gateway_(?:inflight_requests|inflight_attempts\S*|connections) (\S+)$", stage.gateway.metrics(), re.MULTILINE
            )
            return bool(figures) and set(figures) == {"0.0"}

        await eventually(is_quiet, 20.0)
        kept = stage.raw.open_connections + len(stage.good.connections)  # by the pools, for later
        assert stage.edge.num_fds() <= fds + kept + 8
        lines = [line for line in stage.gateway.log if line["event"] == "exchange"]
        assert len({line["generation"] for line in lines if line.get("generation")}) == len(
            [line for line in lines if line.get("generation")]
        )
        assert not [line for line in stage.gateway.log if line["level"] == "error"]
        assert (await asyncio.to_thread(stage.gateway.admin, "ledger", "verify"))["ok"]
