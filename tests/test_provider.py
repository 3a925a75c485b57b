"""The simulated provider keeps its word: what tests and the bench build on is tested here with real sockets."""

from __future__ import annotations

import asyncio
import json
import signal
import sys

import msgspec
import openai
import pytest

from bench.answers import text_of as answer_of
from bench.behaviour import Behaviour
from bench.books import Entry
from bench.provider import Provider
from tests.provider_caller import HELLO, Caller, ask, connected, datas, text_of
from tests.timing import again_if_untimely, in_time


async def test_stream_has_the_shape_of_openai(caller: Caller) -> None:
    status, headers, body = await caller.ask(ask("tokens=3", stream=True))
    chunks = datas(body)
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(chunks) == " the river runs"
    assert chunks[-3]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"]["completion_tokens"] == 3
    assert chunks[-2]["usage"]["prompt_tokens"] == 3  # 11 bytes / 4, rounded up
    assert chunks[-1] == "[DONE]"
    assert len({chunk["id"] for chunk in chunks[:-1]}) == 1


async def test_max_tokens_cuts_the_answer_with_length(caller: Caller) -> None:
    _, _, body = await caller.ask(ask(max_tokens=2))
    answer = json.loads(body)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 2
    _, _, body = await caller.ask(ask("reasoning_deltas=3", stream=True, max_completion_tokens=4))
    chunks = datas(body)
    assert sum("reasoning_content" in c["choices"][0]["delta"] for c in chunks[:-2]) == 3
    assert text_of(chunks) == " the"
    assert chunks[-2]["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3


async def test_official_client_reads_stream_json_and_tool_call(provider: Provider) -> None:
    async with openai.AsyncOpenAI(base_url=provider.url + "/v1", api_key="k", max_retries=0) as client:
        answer = await client.chat.completions.create(model="sage-1", messages=HELLO)
        assert (
            answer.choices[0].message.content == " the river runs past quiet stones while small birds count every light upon the water and"
        )
        stream = await client.chat.completions.create(
            model="sage-1", messages=HELLO, stream=True, metadata={"sim": "tool_call=true;tokens=4"}
        )
        arguments, reasons = "", []
        async for chunk in stream:
            for choice in chunk.choices:
                arguments += "".join(call.function.arguments or "" for call in choice.delta.tool_calls or [] if call.function)
                reasons.append(choice.finish_reason)
        assert json.loads(arguments) == {"text": " the river runs past"}
        assert reasons[-1] == "tool_calls"
        legacy = await client.completions.create(model="sage-1", prompt="once", max_tokens=2)
        assert legacy.choices[0].text == " the river"


async def test_answers_are_the_same_ready_or_paced(provider: Provider, caller: Caller) -> None:
    for dialect in ("openai", "llamacpp", "ollama", "vllm", "groq", "changing_ids"):
        for stream in (False, True):
            sim = f"dialect={dialect};tokens=5;reasoning_deltas=2;comments=2;newline=crlf"
            ready = (await caller.ask(ask(sim, stream=stream)))[2]
            paced = (await caller.ask(ask(sim + ";ttft_ms=1;tokens_per_s=2000", stream=stream)))[2]
            first, second = (entry.answer_id.encode() for entry in list(provider.books.entries)[-2:])
            assert first in ready
            assert _timeless(ready.replace(first, b"")) == _timeless(paced.replace(second, b""))


def _timeless(body: bytes) -> bytes:
    created = body.partition(b'"created":')[2][:10]
    return body.replace(created, b"0")


async def test_dialects_differ_where_real_servers_do(caller: Caller) -> None:
    _, _, body = await caller.ask(ask("dialect=llamacpp;tokens=1", stream=True))
    llama = datas(body)
    assert next(iter(llama[0])) == "choices"
    assert "timings" in llama[-2]
    _, _, body = await caller.ask(ask("dialect=changing_ids;tokens=1", stream=True))
    assert len({chunk["id"] for chunk in datas(body)[:-1]}) == 4
    _, _, body = await caller.ask(ask("dialect=groq;tokens=1", stream=True))
    assert datas(body)[-3]["x_groq"]["usage"]["completion_tokens"] == 1
    _, _, body = await caller.ask(ask("dialect=ollama;tokens=2", stream=True))
    assert [c["choices"][0]["delta"]["role"] for c in datas(body)[:-2]] == ["assistant"] * 3


@pytest.mark.parametrize(
    ("variant", "on_chunks"),
    [
        ("openai", [None, None, None, 1]),
        ("none", [None, None, None]),
        ("every", [0, 1, 1]),
        ("with_finish", [None, None, 1]),
        ("zero", [None, None, None, 0]),
        ("negative", [None, None, None, -7]),
        ("null_until_end", [None, None, None, 1]),
    ],
)
async def test_usage_sits_where_the_variant_says(caller: Caller, variant: str, on_chunks: list[int | None]) -> None:
    _, _, body = await caller.ask(ask(f"usage={variant};tokens=1", stream=True))
    found = [(chunk.get("usage") or {}).get("completion_tokens") for chunk in datas(body)[:-1]]
    assert found == on_chunks
    if variant == "null_until_end":
        assert datas(body)[0]["usage"] is None
    _, _, body = await caller.ask(ask(f"usage={variant};tokens=1", stream=True, stream_options={}))
    assert any(c.get("usage") for c in datas(body)[:-1]) == (variant in ("every", "with_finish", "null_until_end"))


async def test_framing_of_bodies_both_ways(caller: Caller) -> None:
    data = json.dumps(ask(max_tokens=1)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: sim\r\nTransfer-Encoding: chunked\r\n\r\n"
    pieces = b"".join(b"%x;note=1\r\n%b\r\n" % (len(part), part) for part in (data[:7], data[7:8], data[8:]))
    whole = head + pieces + b"0\r\nTrailer: x\r\n\r\n"
    for byte in whole:
        caller.writer.write(bytes([byte]))
        await caller.writer.drain()
    assert (await caller.answer())[0] == 200
    caller.writer.write(whole * 3)  # pipelined
    assert [(await caller.answer())[0] for _ in range(3)] == [200] * 3
    for framing in ("chunked", "length"):
        for stream in (False, True):
            _, headers, body = await caller.ask(ask(f"framing={framing};tokens=2", stream=stream))
            assert ("content-length" in headers) == (framing == "length")
            assert b" the" in body
    _, headers, body = await caller.ask(ask("framing=close;tokens=2", stream=True))
    assert headers["connection"] == "close"
    assert datas(body)[-1] == "[DONE]"


async def test_pipelined_requests_are_answered_in_order_behind_a_slow_one(caller: Caller) -> None:
    caller.send(ask("ttft_ms=20;tokens=1", stream=True))
    caller.send(ask("tokens=2"))
    caller.send(ask("tokens=3"))
    assert datas((await caller.answer())[2])[-2]["usage"]["completion_tokens"] == 1
    assert json.loads((await caller.answer())[2])["usage"]["completion_tokens"] == 2
    assert json.loads((await caller.answer())[2])["usage"]["completion_tokens"] == 3


async def test_expect_continue_and_http10(provider: Provider, caller: Caller) -> None:
    data = json.dumps(ask()).encode()
    caller.writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(data))
    assert await caller.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    caller.writer.write(data)
    assert (await caller.answer())[0] == 200
    async with connected(provider) as old:
        data = json.dumps(ask(stream=True)).encode()
        old.writer.write(b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        _, headers, body = await old.answer()
        assert "transfer-encoding" not in headers
        assert datas(body)[-1] == "[DONE]"


@again_if_untimely
async def test_rhythm_is_kept(caller: Caller, provider: Provider) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    caller.send(ask("headers_delay_ms=40;ttft_ms=60;tokens=5;tokens_per_s=100", stream=True))
    await caller.head()
    headers_s = loop.time() - began
    await caller.chunk()
    first_s = loop.time() - began
    while await caller.chunk():
        pass
    total_s = loop.time() - began
    in_time(headers_s, 0.1, at_least=0.039)
    assert 0.098 <= first_s < total_s
    in_time(total_s, 0.4, at_least=0.138)
    entry = provider.books.entries[-1]
    assert entry.finished is not None
    assert 0.138 <= entry.finished - entry.started <= total_s + 0.01


async def test_behaviour_is_chosen_by_request_model_then_default() -> None:
    async with Provider(behaviour=Behaviour(tokens=1), behaviours={"m:free": Behaviour(tokens=2)}) as provider:
        async with connected(provider) as caller:

            async def made(model: str, sim: str = "") -> int:
                body = (await caller.ask(ask(sim) | {"model": model}))[2]
                return int(json.loads(body)["usage"]["completion_tokens"])

            assert [await made("other"), await made("m:free"), await made("m:free", "tokens=5")] == [1, 2, 5]
            caller.send(json.loads(msgspec.json.encode({"tokens": 7})), "/sim/models/m%3Afree", method="PUT")
            assert (await caller.answer())[0] == 200
            assert [await made("other"), await made("m:free"), await made("m:free", "ttft_ms=1")] == [1, 7, 7]
            caller.send({"toknes": 7}, "/sim/models/x", method="PUT")
            assert (await caller.answer())[0] == 400
            caller.send({}, "/v1/models", method="GET")
            listed = json.loads((await caller.answer())[2])["data"]
            assert [model["id"] for model in listed] == ["m:free"]


async def test_books_over_http_hide_credentials_and_can_be_cleared(provider: Provider, caller: Caller) -> None:
    await caller.ask(ask("cached_tokens=2;prompt_tokens=9"), extra="Authorization: Bearer s3cret\r\nX-Twice: 1\r\nX-Twice: 2\r\n")
    caller.send({}, "/sim/books", method="GET")
    books = (await caller.answer())[2]
    assert b"s3cret" not in books
    read = json.loads(books)
    assert (read["requests"], read["connections"], read["open_connections"]) == (2, 1, 1)
    entry = msgspec.convert(read["entries"][0], Entry)
    assert (entry.prompt_tokens, entry.cached_tokens, entry.completion_tokens, entry.body) == (9, 2, 16, b"")
    assert [value for name, value in entry.headers if name == "X-Twice"] == ["1", "2"]
    caller.send({}, "/sim/books", method="DELETE")
    assert (await caller.answer())[0] == 200
    assert not provider.books.entries


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_goes_on_from_what_a_prefill_has_of_it(caller: Caller, stream: bool) -> None:
    messages = [*HELLO, {"role": "assistant", "content": answer_of(21)}]
    for sim, limit, text, finish in (
        ("tokens=25", 9, answer_of(25), "stop"),
        ("tokens=25", 3, answer_of(24), "length"),
        ("tokens=21", 3, answer_of(21), "stop"),
    ):
        status, _, body = await caller.ask(ask(sim, stream=stream, messages=messages, max_tokens=limit))
        assert status == 200
        choices = (
            [each["choices"][0] for each in datas(body) if each != "[DONE]" and each["choices"]] if stream else json.loads(body)["choices"]
        )
        said = "".join(each["delta" if stream else "message"].get("content") or "" for each in choices)
        assert (answer_of(21) + said, choices[-1]["finish_reason"]) == (text, finish)
    status, _, body = await caller.ask(ask("tokens=25;prefill=ignored", stream=stream, messages=messages))
    assert status == 200 and body.count(b" runs") == 2  # of 25 words the first 7 come twice
    assert (await caller.ask(ask("prefill=refused", stream=stream, messages=messages)))[0] == 400
    assert (await caller.ask(ask("prefill=refused", stream=stream)))[0] == 200


async def test_bodies_and_credentials_are_kept_on_request() -> None:
    async with Provider(keep_bodies=True, keep_headers=True) as provider:
        async with connected(provider) as caller:
            await caller.ask(ask(), extra="Authorization: Bearer s3cret\r\n")
    assert json.loads(provider.books.entries[0].body)["messages"] == HELLO
    assert ("Authorization", "Bearer s3cret") in provider.books.entries[0].headers


async def test_process_prints_ready_and_ends_on_sigterm() -> None:
    command = ["-m", "bench.provider", "--behaviour", "tokens=2", "--model", "m=1", "tokens=3", "--name", "North"]
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode()
        assert line.startswith("ready http://127.0.0.1:")
        async with openai.AsyncOpenAI(base_url=line.split()[1] + "/v1", api_key="k", max_retries=0) as client:
            for model, tokens in (("other", 2), ("m=1", 3)):
                answer = await client.chat.completions.create(model=model, messages=HELLO)
                assert answer.usage is not None
                assert answer.usage.completion_tokens == tokens
    finally:
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
