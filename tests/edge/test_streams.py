"""Chats pass through unchanged, at once and under our own name (STR-01, STR-02, STR-03)."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import time
from typing import Any

import aiohttp
import pytest

from bench.behaviour import Behaviour
from tests.edge.reading import expected, grammar, priced
from tests.edge.stage import FIRST, GOOD, HELLO, RAW, ROLE, SSE_HEAD, RawCall, Stage, behaving, chunk, event, sse, stage_of
from tests.provider_caller import text_of
from tests.timing import again_if_untimely, in_time

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEEPALIVE_S = 0.25
GENERATION = re.compile(r"gen-\d{10}-[0-9A-Za-z]{20}")


stage = stage_of(settings={"timeouts": {"keepalive_s": KEEPALIVE_S, "first_token_s": 60.0, "idle_s": 60.0}})


# What a chat is made of.


@pytest.mark.parametrize("prefix", ["/api/v1", "/v1"])
async def test_a_whole_answer_is_in_our_name(stage: Stage, prefix: str) -> None:
    answered = await stage.ask(GOOD, path=f"{prefix}/chat/completions")
    body = answered.json
    assert answered.status == 200
    assert answered.headers["Content-Type"] == "application/json"
    assert GENERATION.fullmatch(body["id"]) and answered.headers["X-Generation-Id"] == body["id"]
    assert (body["model"], body["provider"], body["object"]) == (GOOD, "Good", "chat.completion")
    assert body["system_fingerprint"] == "fp_simulated"
    assert (body["choices"][0]["finish_reason"], body["choices"][0]["native_finish_reason"]) == ("stop", "stop")
    assert body["usage"] == priced(prompt_tokens=2, completion_tokens=16)


async def test_system_fingerprint_is_a_key_even_where_the_provider_has_none(stage: Stage) -> None:
    with behaving(stage.first, Behaviour(dialect="vllm")):
        assert (await stage.ask(FIRST)).json["system_fingerprint"] is None


@pytest.mark.parametrize("prefix", ["/api/v1", "/v1"])
async def test_a_stream_is_in_our_name_and_ends_with_done(stage: Stage, prefix: str) -> None:
    answered = await stage.ask(GOOD, stream=True, path=f"{prefix}/chat/completions")
    *chunks, done = answered.events
    assert answered.status == 200
    assert answered.headers["Content-Type"] == "text/event-stream"
    assert done == "[DONE]" and answered.body.endswith(b"data: [DONE]\n\n")
    assert {part["id"] for part in chunks} == {answered.headers["X-Generation-Id"]}
    assert GENERATION.fullmatch(answered.headers["X-Generation-Id"])
    assert {(part["model"], part["provider"]) for part in chunks} == {(GOOD, "Good")}
    finishing = [part["choices"][0] for part in chunks if part["choices"] and part["choices"][0]["finish_reason"]]
    assert [(choice["finish_reason"], choice["native_finish_reason"]) for choice in finishing] == [("stop", "stop")]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == priced(prompt_tokens=2, completion_tokens=16)
    assert chunks[-1]["service_tier"] == "default" and chunks[-1]["object"] == "chat.completion.chunk"  # as the provider's own said
    assert not [part for part in chunks[:-1] if "usage" in part]


@pytest.mark.parametrize("stream", [False, True])
async def test_legacy_completions_keep_their_shape(stage: Stage, stream: bool) -> None:
    body = {"model": GOOD, "prompt": "Once upon", "stream": stream}
    async with stage.session.post(f"{stage.gateway.url}/api/v1/completions", json=body, headers=stage.authorization) as answer:
        data = (await answer.read()).decode()
        generation = answer.headers["X-Generation-Id"]
    parts = [json.loads(line[6:]) for line in data.splitlines() if line.startswith("data: {")] if stream else [json.loads(data)]
    assert {(part["id"], part["object"], part["provider"]) for part in parts} == {(generation, "text_completion", "Good")}
    text = "".join(part["choices"][0]["text"] for part in parts if part["choices"])
    assert text.startswith(" the river runs")


@pytest.mark.parametrize("asked", [None, {"include_usage": False}, {"include_usage": True}])
async def test_usage_is_asked_of_the_provider_whatever_the_caller_says(stage: Stage, asked: object) -> None:
    options: dict[str, Any] = {"stream_options": asked} if asked else {}
    answered = await stage.ask(GOOD, stream=True, **options)
    assert [part["usage"]["total_tokens"] > 0 for part in answered.events[:-1] if part.get("usage")] == [True]
    sent = json.loads(stage.good.books.entries[-1].body)
    assert sent["stream_options"] == {"include_usage": True}
    assert sent["model"] == "good"


async def test_native_finish_reason_keeps_the_providers_word(stage: Stage) -> None:
    with behaving(stage.first, Behaviour(finish_reason="end_turn")):
        whole = (await stage.ask(FIRST)).json["choices"][0]
        parts = (await stage.ask(FIRST, stream=True)).events[:-1]
    streamed = next(part["choices"][0] for part in parts if part["choices"] and part["choices"][0]["finish_reason"])
    for choice in (whole, streamed):
        assert (choice["finish_reason"], choice["native_finish_reason"]) == ("stop", "end_turn")


# Who may ask.


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer sk-or-v1-nobody", "Bearer \xff", "x" * 600])
async def test_a_caller_without_a_key_is_refused_and_costs_no_call(stage: Stage, authorization: str | None) -> None:
    before = stage.good.books.requests
    headers = {} if authorization is None else {"Authorization": authorization}
    async with stage.session.post(stage.url, json={"model": GOOD, "messages": HELLO}, headers=headers) as answer:
        error = (await answer.json())["error"]
        assert (answer.status, error["code"], error["metadata"]["error_type"]) == (401, 401, "authentication")
    assert stage.good.books.requests == before


async def test_a_management_key_is_no_inference_key(stage: Stage) -> None:
    account = await asyncio.to_thread(stage.gateway.create_account, "grace@example.com")
    headers = {"Authorization": f"Bearer {account['management_key']}"}
    answered = await stage.ask(GOOD, headers=headers)
    assert (answered.status, answered.error["code"]) == (403, 403)
    assert (await stage.ask(GOOD, headers={"Authorization": f"Bearer {account['key']}"})).status == 200


async def test_a_key_of_the_old_header_is_taken_too(stage: Stage) -> None:
    async with stage.session.post(stage.url, json={"model": GOOD, "messages": HELLO}, headers={"x-api-key": stage.gateway.key}) as answer:
        assert answer.status == 200


async def test_an_unknown_model_is_the_callers_mistake(stage: Stage) -> None:
    answered = await stage.ask("acme/nothing")
    assert (answered.status, answered.error["code"]) == (400, 400)


async def test_models_are_listed_at_both_prefixes(stage: Stage) -> None:
    for prefix in ("/api/v1", "/v1"):
        async with stage.session.get(f"{stage.gateway.url}{prefix}/models") as answer:
            assert answer.status == 200
            assert {row["id"] for row in (await answer.json())["data"]} >= {GOOD, FIRST, RAW}


# STR-01: a corpus of streams, each cut at many places, against a reader written from the grammar alone.

FINISH = event({}, finish="stop")
DONE = b"data: [DONE]\n\n"
TOOL = {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}]}
ARGUMENTS = {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}
SAYS_A = {"index": 0, "delta": {"content": "a"}, "finish_reason": None}
SPACED = json.dumps({"id": "up-1", "created": 7, "model": "raw", "choices": [SAYS_A]})
UNESCAPED = b'data: {"id":"up-1","model":"raw","choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}\n\n'
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
PLAIN = [event(ROLE), event({"content": "Hel"}), event({"content": "lo"}), FINISH]


def say(text: str, **more: Any) -> bytes:
    return event({"content": text}, **more)


def words(*texts: str) -> list[bytes]:
    return [event(ROLE), *(event({"content": text}) for text in texts), FINISH]


CORPUS: dict[str, list[bytes]] = {
    "plain": PLAIN,
    "without role": PLAIN[1:],
    "one event": [say("all", finish="stop")],
    "CRLF": [part.replace(b"\n", b"\r\n") for part in PLAIN],
    "CR": [part.replace(b"\n", b"\r") for part in PLAIN],
    "mixed line ends": [PLAIN[0], PLAIN[1].replace(b"\n", b"\r\n"), PLAIN[2].replace(b"\n", b"\r"), PLAIN[3]],
    "byte order mark": [b"\xef\xbb\xbf", *PLAIN],
    "comments": [b": hello\n\n", PLAIN[0], b":\n\n", PLAIN[1], b": a\n: b\n\n", *PLAIN[2:]],
    "comment within an event": [PLAIN[0], b": why\n" + PLAIN[1], b"data: " + SPACED.encode() + b"\n: after\n\n", FINISH],
    "data in two lines": [PLAIN[0], b"data: " + SPACED[:31].encode() + b"\ndata: " + SPACED[31:].encode() + b"\n\n", FINISH],
    "other fields": [b"retry: 100\n\n", b"event: message\nid: 1\n" + PLAIN[0], b"id: 2\nevent: e\n" + PLAIN[1], b"x\n\n", *PLAIN[2:]],
    "empty events": [b"\n\n", PLAIN[0], b"\n\n\n", PLAIN[1], b"data:\n\n", b"data\n\n", *PLAIN[2:]],
    "no space after the colon": [part.replace(b"data: ", b"data:") for part in PLAIN],
    "spaced JSON": [b"data: " + SPACED.encode() + b"\n\n"] * 3 + [FINISH],
    "text like framing": words("data: [DONE]", "\n\n", "data: {", '"id":"up-1"', "\r\n", '"finish_reason":null', '{"error":{"code":1}}'),
    "many bytes per letter": words("ä", "日本語", "🦜", "\u2028\u2029", "\x7f", "e\u0301"),
    "unescaped letters": [UNESCAPED % text for text in ("ä日".encode(), "🦜\u2028".encode(), b"a")] + [FINISH],
    "tool call": [event(ROLE), event(TOOL), event(ARGUMENTS), event(ARGUMENTS), event({}, finish="tool_calls")],
    "tool call with the answer's id": [event(ROLE), event({"tool_calls": [{"index": 0, "id": "up-1", "model": "raw"}]}), PLAIN[1], FINISH],
    "reasoning": [event(ROLE), event({"reasoning": "hm"}), event({"reasoning_content": "so"}), *PLAIN[1:]],
    "reasoning details": [event(ROLE), event({"reasoning_details": [{"type": "reasoning.text", "text": "x"}]}), *PLAIN[1:]],
    "usage null in its own event": [*PLAIN, sse({"id": "up-1", "model": "raw", "choices": [], "usage": None}), PLAIN[2]],
    "usage twice": [*PLAIN, *(sse({"id": "up-1", "model": "raw", "choices": [], "usage": USAGE, "tier": n}) for n in (1, 2))],
    "usage in another order": [sse({"usage": USAGE, "choices": [], "x": {"a": [1]}, "id": "up-1", "model": "raw"}), *PLAIN],
    "usage and text": [event(ROLE), say("a", usage={**USAGE, "completion_tokens": 1}), FINISH, sse({"choices": [], "usage": USAGE})],
    "usage at the end": [*PLAIN, sse({"id": "up-1", "model": "raw", "choices": [], "usage": USAGE})],
    "usage everywhere": [say("a", usage=USAGE), say("b", usage=USAGE), event({}, finish="stop", usage=USAGE)],
    "usage null until the end": [say("a", usage=None), say("b", usage=None), event({}, finish="length", usage=USAGE)],
    "content with the end": [*PLAIN[:2], say("lo", finish="stop")],
    "error null": [say("a", error=None), say("b", error=None), FINISH],
    "changing ids": [sse({"id": f"up-{n}", "model": "raw", "choices": [SAYS_A]}) for n in range(5)]
    + [FINISH],
    "id not first": [sse({"choices": [SAYS_A], "model": "raw", "id": "up-1"})] * 3 + [FINISH],
    "no id": [sse({"model": "raw", "choices": [SAYS_A]})] * 3 + [FINISH],
    "a provider of its own": [sse({"id": "up-1", "provider": "X", "model": "raw", "choices": [SAYS_A]})] * 2 + [FINISH],
    "not objects": [PLAIN[0], b'data: 7\n\ndata: "x"\n\ndata: [1]\n\ndata: null\n\n', PLAIN[1], b"data: {broken\n\n", *PLAIN[2:]],
    "not UTF-8": [*PLAIN[:2], say("X").replace(b"X", b"\xff\xfe"), say("Y").replace(b"Y", b"\xc3"), FINISH],
    "fingerprint null": [say("a", system_fingerprint=None), say("b", system_fingerprint=None), FINISH],
    "null now and then": [say("a"), say("b", usage=None), say("c"), FINISH],
    "JSON broken inside": [*PLAIN[:2], say("Q").replace(b'"Q"', b'"Q""'), say("Q").replace(b'"Q"', b""), FINISH],
    "large event": words("x" * 200_000, "y", "z" * 70_000),
    "many events": words(*(f" w{n}" for n in range(400))),
    "logprobs": [say("a"), say("b").replace(b'"logprobs":null', b'"logprobs":{"content":[]}'), FINISH],
    "refusal": [event(ROLE), event({"refusal": "no"}), FINISH],
    "after the end": [*PLAIN, DONE, *PLAIN],
}  # fmt: skip


def cuts(body: bytes, rng: random.Random) -> list[bytes]:
    """Chunks of the chunked coding whose borders lie anywhere, in events, letters and line ends."""
    count = rng.choice((0, 1, 3, 10, 40))
    borders = sorted({0, len(body), *(rng.randrange(1, len(body)) for _ in range(count))})
    return [chunk(body[a:b]) for a, b in itertools.pairwise(borders)]


async def test_str_01_events_are_passed_on_unchanged_wherever_the_network_cuts(stage: Stage) -> None:
    bodies = {name: b"".join(parts) + DONE for name, parts in CORPUS.items()}

    async def script(call: RawCall) -> None:
        name, _, seed = json.loads(call.body)["user"].rpartition(" ")
        await call.write(SSE_HEAD)
        for piece in cuts(bodies[name], random.Random(seed)):
            await call.write(piece)
            await asyncio.sleep(0.001)
        await call.write(b"0\r\n\r\n")

    async def read(name: str, seed: int) -> None:
        answered = await stage.ask(RAW, stream=True, user=f"{name} {seed}")
        assert answered.status == 200, name
        generation = answered.headers["X-Generation-Id"]
        read_by_grammar = grammar(answered.body)
        assert read_by_grammar[-1] == b"[DONE]", name
        got = [json.loads(data) for data in read_by_grammar[:-1]]
        wanted = list(expected(bodies[name], generation))
        assert got == wanted, f"{name}, seed {seed}"
        assert not {line.partition(b":")[0] for line in answered.body.split(b"\n")} - {b"", b"data", b"event", b"id", b"retry"}, name

    stage.raw.script = script
    for seed in range(6):
        await asyncio.gather(*(read(name, seed) for name in CORPUS))


# STR-02


async def _delays(url: str, headers: dict[str, str], model: str, session: aiohttp.ClientSession, rounds: int) -> list[float]:
    """Seconds from each event's leaving the provider (told in its text) to its arrival here."""
    delays: list[float] = []
    body = {"model": model, "messages": HELLO, "stream": True}
    async with session.post(url, json=body, headers=headers) as answer:
        async for line in answer.content:
            now = time.monotonic()
            if line.startswith(b"data: {") and b'"content":"@' in line:
                sent = float(json.loads(line[6:])["choices"][0]["delta"]["content"][1:])
                delays.append(now - sent)
    assert len(delays) == rounds
    return delays


@again_if_untimely
async def test_str_02_tokens_are_not_held_back(stage: Stage) -> None:
    rounds, streams, gap_s = 20, 20, 0.05

    async def script(call: RawCall) -> None:
        await call.write(SSE_HEAD, chunk(event(ROLE)))
        await asyncio.sleep(random.random() * gap_s)
        for _ in range(rounds):
            await call.write(chunk(event({"content": f"@{time.monotonic()}"})))
            await asyncio.sleep(gap_s)
        await call.write(chunk(FINISH + DONE), b"0\r\n\r\n")

    stage.raw.script = script
    through = [_delays(stage.url, stage.authorization, RAW, stage.session, rounds) for _ in range(streams)]
    direct = [_delays(f"{stage.raw.url}/chat/completions", {}, "raw", stage.session, rounds) for _ in range(streams)]
    measured = await asyncio.gather(*through, *direct)
    ours = sorted(itertools.chain(*measured[:streams]))
    control = sorted(itertools.chain(*measured[streams:]))
    # The control streams tell how busy the machine is: what we add is the difference at the same rank.
    added_p50 = ours[len(ours) // 2] - control[len(control) // 2]
    added_p99 = ours[len(ours) * 99 // 100] - control[len(control) * 99 // 100]
    busy = control[len(control) * 99 // 100] > 0.005
    # On a busy machine the gateway waits for a core as well: then a token is not held back as long as it comes before the next.
    in_time(added_p50, gap_s / 2 if busy else 0.001, at_least=-1.0)
    in_time(added_p99, 2 * gap_s if busy else 0.010, at_least=-1.0)


# STR-03


@again_if_untimely
async def test_str_03_silence_is_filled_with_comments_and_no_event_is_cut(stage: Stage) -> None:
    silence_s = 4 * KEEPALIVE_S
    half = event({"content": "slow"})

    async def script(call: RawCall) -> None:
        await call.write(SSE_HEAD)
        await asyncio.sleep(silence_s)  # before the first token
        await call.write(chunk(event(ROLE) + half[:40]))
        await asyncio.sleep(silence_s)  # inside the first event
        await call.write(chunk(half[40:]))
        await asyncio.sleep(silence_s)  # between tokens
        await call.write(chunk(event({"content": "ly"}) + FINISH + DONE), b"0\r\n\r\n")

    stage.raw.script = script
    async with stage.streaming(RAW) as caller:
        status, _ = await caller.head()
        assert status == 200
        before, longest_s, comments, body = time.monotonic(), 0.0, 0, b""
        while piece := await caller.chunk():
            longest_s = max(longest_s, time.monotonic() - before)
            before = time.monotonic()
            body += piece
            comments += piece.startswith(b":")
    in_time(longest_s, KEEPALIVE_S + 0.2)
    assert comments >= 6
    assert all(part == "" or part.startswith((":", "data: ")) for part in body.decode().split("\n"))
    parts = [json.loads(data) for data in grammar(body)[:-1]]
    assert text_of(parts) == "slowly" and grammar(body)[-1] == b"[DONE]"


async def test_str_03_a_failure_after_a_comment_is_told_in_the_stream(stage: Stage) -> None:
    async def script(call: RawCall) -> None:
        await call.write(SSE_HEAD)
        await asyncio.sleep(2 * KEEPALIVE_S)

    stage.raw.script = script
    answered = await stage.ask(RAW, stream=True)
    assert answered.status == 200
    (told,) = answered.events
    assert told["error"]["code"] == 502 and told["choices"][0]["finish_reason"] == "error"


async def test_str_03_a_quick_refusal_keeps_its_status(stage: Stage) -> None:
    with behaving(stage.first, Behaviour(status=500)):
        answered = await stage.ask(FIRST, stream=True)
    assert (answered.status, answered.error["code"]) == (502, 502)
