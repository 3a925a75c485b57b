"""The simulated provider's refusals and faults, seen from a raw connection."""

from __future__ import annotations

import gzip
import json
import zlib

import pytest

from bench.behaviour import Behaviour
from bench.books import Books
from bench.provider import Provider
from tests.provider_caller import HELLO, Caller, ask, connected, datas


async def test_bad_requests_are_refused(provider: Provider, caller: Caller) -> None:
    assert (await caller.ask({"messages": HELLO}))[0] == 400
    assert (await caller.ask(ask("colour=red")))[0] == 400
    assert (await caller.ask(ask(max_tokens=0)))[0] == 400
    assert (await caller.ask({}, "/v1/other"))[0] == 404
    assert not provider.books.entries
    caller.writer.write(b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert (await caller.answer())[0] == 400
    assert await caller.reader.read() == b""


async def test_refusals_carry_status_retry_after_and_error(caller: Caller) -> None:
    status, headers, body = await caller.ask(ask("status=429;retry_after=7;error_message=slow down;headers=x-secret:1"))
    assert (status, headers["retry-after"], headers["x-secret"]) == (429, "7", "1")
    assert json.loads(body)["error"] == {"message": "slow down", "type": "rate_limit_error", "param": None, "code": None}
    status, headers, body = await caller.ask(ask("status=400;error_code=context_length_exceeded", stream=True))
    assert (status, headers["content-type"]) == (400, "application/json")
    assert json.loads(body)["error"]["code"] == "context_length_exceeded"
    status, _, body = await caller.ask(ask("error_body=true"))
    assert status == 200
    assert "error" in json.loads(body)


async def test_faults_after_n_events(provider: Provider) -> None:
    async with connected(provider) as caller:
        caller.send(ask("reset_after_events=3;tokens=9", stream=True))
        await caller.head()
        assert [len(datas(await caller.chunk())) for _ in range(3)] == [1, 1, 1]
        with pytest.raises(ConnectionResetError):
            await caller.reader.readexactly(1)
    async with connected(provider) as caller:
        caller.send(ask("close_after_events=2;tokens=9", stream=True))
        await caller.head()
        body = await caller.reader.read()
        assert body.count(b"data: ") == 2
        assert not body.endswith(b"0\r\n\r\n")
    async with connected(provider) as caller:
        _, _, body = await caller.ask(ask("error_event_after=2;tokens=9", stream=True))
        events = datas(body)
        assert len(events) == 3
        assert events[-1]["error"]["type"] == "server_error"
    async with connected(provider) as caller:
        caller.send(ask("close_after_events=1"))
        _, headers = await caller.head()
        assert len(await caller.reader.read()) < int(headers["content-length"])
    assert [entry.completion_tokens for entry in provider.books.entries] == [2, 1, 1, 0]
    assert all(entry.finished and not entry.cancelled for entry in provider.books.entries)


async def test_stall_is_silence_until_the_caller_leaves_and_books_tell_when(provider: Provider) -> None:
    async with connected(provider) as caller:
        caller.send(ask("stall_after_events=4;tokens=9", stream=True))
        await caller.head()
        for _ in range(4):
            await caller.chunk()
        entry = provider.books.entries[0]
        assert (entry.completion_tokens, entry.finished, entry.cancelled) == (3, None, None)
    await provider.wait_for(lambda books: books.entries[0].cancelled is not None)
    assert entry.finished is None


async def test_caller_leaving_midstream_stops_the_making(provider: Provider) -> None:
    async with connected(provider) as caller:
        caller.send(ask("tokens=1000000000;tokens_per_s=200", stream=True))
        await caller.head()
        for _ in range(6):
            await caller.chunk()
    await provider.wait_for(_cancelled)
    made = provider.books.entries[0].completion_tokens
    assert 5 <= made <= 50


def _cancelled(books: Books) -> bool:
    return bool(books.entries) and books.entries[-1].cancelled is not None


async def test_silent_accept_refuse_and_drop_on_reuse(provider: Provider) -> None:
    async with connected(provider) as caller:
        caller.send(ask("silent_accept=true"))
        await provider.wait_for(lambda books: len(books.entries) == 1)
    await provider.wait_for(_cancelled)
    async with connected(provider) as caller:
        caller.send(ask("refuse=true"))
        assert await caller.reader.read() == b""
    async with connected(provider) as caller:
        sim = "close_after_requests=3"
        assert [(await caller.ask(ask(sim)))[0] for _ in range(2)] == [200, 200]
        caller.send(ask(sim))
        assert await caller.reader.read() == b""
    assert provider.books.dropped_requests == 1
    assert len(provider.books.entries) == 4  # the dropped one was never executed


async def test_garbage_bodies(caller: Caller) -> None:
    status, headers, body = await caller.ask(ask("empty=true", stream=True))
    assert (status, headers["content-type"], body) == (200, "text/event-stream", b"")
    _, headers, body = await caller.ask(ask("html=true", stream=True))
    assert headers["content-type"].startswith("text/html")
    assert body.startswith(b"<!doctype html>")
    for stream in (False, True):
        _, _, body = await caller.ask(ask("truncated_json=true", stream=stream))
        with pytest.raises(json.JSONDecodeError):
            json.loads(body.split(b"data: ")[-1])


async def test_huge_line_is_made_under_back_pressure(provider: Provider) -> None:
    async with connected(provider) as caller:
        _, _, body = await caller.ask(ask("huge_line=3000000", stream=True))
        assert len(body) == 3_000_000 + len(b'data: {"id":"')
        assert b"\n" not in body
    async with connected(provider) as caller:
        caller.send(ask("huge_line=4000000000", stream=True))
        await caller.head()
        await provider.wait_for(lambda books: len(books.entries) == 2)
        assert provider.books.entries[-1].finished is None
    await provider.wait_for(_cancelled)


async def test_gzip_bomb_is_one_valid_member(caller: Caller) -> None:
    _, headers, body = await caller.ask(ask("gzip_bomb=3145728"))
    assert headers["content-encoding"] == "gzip"
    assert len(body) < 20_000
    assert len(gzip.decompress(body)) == 3 * 1_048_576 + len(b'data: {"id":"')
    inflater = zlib.decompressobj(31)
    inflater.decompress(body)
    assert inflater.eof and not inflater.unused_data


async def test_raw_bytes_go_out_as_given(caller: Caller, provider: Provider) -> None:
    raw = (b"HTTP/1.1 200 OK\r\nContent-Le", b"ngth: 2\r\n\r\nok")
    provider.set_behaviour(Behaviour(raw=raw, raw_gap_ms=5, raw_close=False), "odd")
    for _ in range(2):
        assert (await caller.ask(ask() | {"model": "odd"}))[2] == b"ok"
    provider.set_behaviour(Behaviour(raw=raw), "odd")
    caller.send(ask() | {"model": "odd"})
    assert await caller.reader.read() == b"".join(raw)


async def test_down_refuses_and_up_serves_on_the_same_port(provider: Provider) -> None:
    url = provider.url
    async with connected(provider) as caller:
        caller.send(ask("silent_accept=true"))
        await provider.wait_for(lambda books: len(books.entries) == 1)
        await provider.down()
        with pytest.raises(ConnectionRefusedError):
            async with connected(provider):
                pass
    await provider.up()
    assert provider.url == url
    async with connected(provider) as caller:
        assert (await caller.ask(ask()))[0] == 200
