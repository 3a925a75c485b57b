"""What an application says of itself is kept as it was written, in either of the two encodings of headers; bounded, and one line."""

from __future__ import annotations

import asyncio
import json

import pytest

from gateway.domain.generation import Generation
from tests.conftest import eventually
from tests.edge.stage import GOOD, HELLO, Stage, stage_of
from tests.money.shop import stored

pytestmark = pytest.mark.asyncio(loop_scope="module")

stage = stage_of()
BODY = json.dumps({"model": GOOD, "max_tokens": 2, "messages": HELLO}).encode()


async def record(stage: Stage, *lines: bytes) -> Generation:
    """Of one exchange whose head has these lines."""
    head = (
        b"POST /api/v1/chat/completions HTTP/1.1",
        b"Host: gateway.example",
        b"Authorization: Bearer " + stage.gateway.key.encode(),
        b"Content-Type: application/json",
        b"Content-Length: %d" % len(BODY),
        *lines,
    )
    async with asyncio.timeout(10.0), stage.connected() as caller:
        caller.writer.write(b"\r\n".join(head) + b"\r\n\r\n" + BODY)
        status, headers, _ = await caller.answer()
    assert status == 200
    generation_id = headers["x-generation-id"]
    await eventually(lambda: generation_id in stored(stage.gateway))
    return stored(stage.gateway)[generation_id]


@pytest.mark.parametrize("name", [b"X-Title", b"X-OpenRouter-Title"])
@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (b"My App", "My App"),
        ("Größe, 東京".encode(), "Größe, 東京"),
        ("Größe".encode("latin-1"), "Größe"),
        ("Ångström café".encode("latin-1"), "Ångström café"),
        (b"half a letter \xc3", "half a letter Ã"),
        (b"\xed\xa0\x80 surrogate", "í\xa0� surrogate"),
        (b"line\xc2\x85end \xe2\x80\xa8x", "line�end �x"),
        (b"win \x93quoted\x94", "win �quoted�"),
        (b"x" * 300, "x" * 256),
        ("ö".encode() * 300, "ö" * 256),
        ("ö".encode("latin-1") * 300, "ö" * 256),
        (b"sk-or-v1-" + b"0" * 64, ""),
    ],
    ids=lambda value: repr(value[:12]),
)
async def test_a_title_keeps_its_letters(stage: Stage, name: bytes, sent: bytes, kept: str) -> None:
    assert (await record(stage, name + b": " + sent)).title == kept


async def test_referer_agent_and_session_keep_theirs_too(stage: Stage) -> None:
    found = await record(
        stage, "HTTP-Referer: https://bücher.example/é".encode(), b"User-Agent: caf\xe9/1", "X-Session-Id: größe-1".encode()
    )
    assert (found.http_referer, found.user_agent, found.session_id) == ("https://bücher.example/é", "café/1", "größe-1")


async def test_an_exchange_with_a_title_is_one_line_of_the_log(stage: Stage) -> None:
    found = await record(stage, b"X-Title: a\xc2\x85b\xe2\x80\xa8c\xc2\x9bd")
    stage.exchange(found.id)
    assert len([line for line in stage.gateway.log if line.get("generation") == found.id]) == 1
