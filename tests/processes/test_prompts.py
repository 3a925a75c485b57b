"""No word of a prompt or an answer is in any file of a gateway, whatever became of the request."""

from __future__ import annotations

import asyncio
import base64
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp

from bench.behaviour import Behaviour
from bench.provider import Provider
from tests.conftest import MODEL, RunningGateway, StartGateway

PROMPT = "canaryprompt7Qx2"
ANSWER = "canaryerror9Zk4"
WORDS = (PROMPT.encode(), ANSWER.encode(), base64.b64encode(PROMPT.encode())[:-3], PROMPT.encode().hex().encode())

CHAT, LEGACY = "/api/v1/chat/completions", "/api/v1/completions"


def asked(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": f"Say {PROMPT}"}], "max_tokens": 8, **more}


REQUESTS: list[tuple[str, Behaviour, Any, set[int]]] = [
    (CHAT, Behaviour(tokens=8), asked(), {200}),
    (CHAT, Behaviour(tokens=8), asked(stream=True), {200}),
    (LEGACY, Behaviour(tokens=8), {"model": MODEL, "prompt": PROMPT, "max_tokens": 8}, {200}),
    (CHAT, Behaviour(status=500, error_message=f"cannot {ANSWER}"), asked(), {502, 503}),
    (CHAT, Behaviour(status=400, error_message=f"will not {ANSWER}"), asked(stream=True), {400}),
    (CHAT, Behaviour(), asked(model=f"acme/none-{PROMPT}"), {400}),
    (CHAT, Behaviour(), asked(tools=PROMPT), {400}),
    (CHAT, Behaviour(), asked(provider={"only": [PROMPT]}), {404}),
    (CHAT, Behaviour(), f'{{"messages": "{PROMPT}', {400}),
]


def files(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path, path.read_bytes()


def found_in(gateway: RunningGateway, *more: str) -> list[str]:
    kept = {str(path): data for path, data in files(gateway.folder)}
    assert any(name.endswith("gateway.db") for name in kept) and any("/journal/" in name for name in kept)
    with closing(sqlite3.connect(f"file:{gateway.folder}/gateway.db?mode=ro", uri=True)) as db:
        kept["the dump"] = "\n".join(db.iterdump()).encode()
    kept["the log"] = json.dumps(gateway.log).encode() + "\n".join(gateway.noise).encode()
    return [f"{word!r} in {name}" for word in (*WORDS, *map(str.encode, more)) for name, data in kept.items() if word in data]


async def test_no_file_and_no_log_line_holds_a_prompt_or_what_a_provider_said(start_gateway: StartGateway, provider: Provider) -> None:
    gateway = await asyncio.to_thread(start_gateway, {"north": f"{provider.url}/v1"})
    said: list[str] = []  # what callers were answered
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {gateway.key}"}) as session:
        for path, behaviour, body, statuses in REQUESTS:
            provider.set_behaviour(behaviour)
            sent = body if isinstance(body, str) else json.dumps(body)
            async with session.post(gateway.url + path, data=sent, headers={"Content-Type": "application/json"}) as answer:
                text = await answer.text()
                assert answer.status in statuses, text
                if answer.status == 200 and answer.content_type == "application/json":
                    (choice,) = json.loads(text)["choices"]
                    said.append(choice["text"] if path == LEGACY else choice["message"]["content"])
        provider.set_behaviour(Behaviour(tokens=500, tokens_per_s=50))
        async with session.post(gateway.url + CHAT, json=asked(stream=True, max_tokens=500)) as answer:
            await answer.content.readany()
            assert found_in(gateway, *said) == []  # nor while it streams
        assert found_in(gateway, *said) == []
    assert len(said) == 2 and all(len(text) > 10 for text in said), said
    assert (await asyncio.to_thread(gateway.admin, "ledger", "verify"))["ok"]
    assert found_in(gateway, MODEL)  # what is there is found
    assert found_in(gateway, *said) == []
