"""What accounts that log their prompts let be kept: the very bytes of request and answer, once, and of nobody else's.

An edge process joins a control that these tests hold. What it is told comes in the order of the exchanges' ends, so that
one that arrives next is the only one there was.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from gateway.domain.content_keys import new_key
from gateway.domain.keys import digest
from gateway.domain.metrics import Samples
from gateway.domain.rules import NO_RULES, AccountRules
from gateway.link.messages import Content
from tests.conftest import MODEL, RunningGateway, eventually
from tests.edge.stage import RAW, ROLE, SSE_HEAD, RawCall, RawProvider, Script, chunk, event, plain, sse, staged
from tests.edge.test_hang_ups import leave
from tests.money.shop import log_prompts
from tests.processes.test_control_loss import Stand
from tests.provider_caller import Caller, connected

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROUTE = "/api/v1/chat/completions"
LOGS = AccountRules(log_prompts=True)
BYTES_MAX = 20_000
SETTINGS = f"[content]\nexchange_bytes_max = {BYTES_MAX}\n[timeouts]\nkeepalive_s = 0.2\n[routing]\nbreaker_failures = 1000000\n"
SETTINGS += "breaker_error_share = 1.0\nbreaker_attempts_min = 1000000\nretry_budget_per_s = 1000000\n"
USAGE = {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500}  # 2,000,000 nanos
FULL, DISCOUNTED = Decimal("0.002"), Decimal("0.00198")
COMMENT = b": OPENROUTER PROCESSING\n\n"
DONE = b"data: [DONE]\n\n"
ERROR = json.dumps({"error": {"message": "overheated", "code": 500}}).encode()
LAST = (event({}, finish="stop"), sse({"id": "up-1", "choices": [], "usage": USAGE}), DONE)


class Reader(Stand):
    """A control that reads what it is sent."""

    def __init__(self, folder: Path, raw: RawProvider) -> None:
        super().__init__(folder, raw.url)
        self.config.write_text(self.config.read_text() + SETTINGS)
        self.raw = raw
        self.contents: asyncio.Queue[Content] = asyncio.Queue()
        self.samples: asyncio.Queue[Samples] = asyncio.Queue()
        self.logging, self.silent = self.new_key(rules=LOGS), self.new_key()

    async def open_link(self) -> None:
        await super().open_link()
        self.link.on_content = self.contents.put_nowait
        self.figures = Samples()

        def on_report(_: str, samples: Samples) -> None:
            self.figures = self.figures.changed_by(samples)
            self.samples.put_nowait(self.figures)

        self.link.on_report = on_report

    async def next(self) -> Content:
        async with asyncio.timeout(10.0):
            return await self.contents.get()

    async def reported(self, name: str, labels: tuple[str, ...], value: float) -> None:
        """Until the edge tells this figure."""
        while not self.samples.empty():
            self.samples.get_nowait()
        async with asyncio.timeout(10.0):
            while (await self.samples.get()).numbers[name].get(labels) != value:
                pass

    @contextlib.asynccontextmanager
    async def asking(
        self, body: bytes, key: str = "", *, chunked: bool = False, head: str = "", path: str = ROUTE
    ) -> AsyncIterator[Caller]:
        """A connection on which these bytes were asked with."""
        async with connected(self) as caller:
            framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
            authorization = f"Authorization: Bearer {key or self.logging}"
            caller.writer.write(f"POST {path} HTTP/1.1\r\nHost: gw\r\n{authorization}\r\n{head}{framing}\r\n\r\n".encode())
            caller.writer.write(chunk(body[:10]) + chunk(body[10:]) + b"0\r\n\r\n" if chunked else body)
            yield caller

    async def ask(self, body: bytes, key: str = "", **more: Any) -> tuple[int, str, bytes]:
        """Status, generation id and body of the answer."""
        async with self.asking(body, key, **more) as caller:
            status, headers, answer = await caller.answer()
            return status, headers.get("x-generation-id", ""), answer

    async def mark(self) -> str:
        """One ordinary exchange of the account, whose content is the next to arrive if nothing else is; its id."""
        self.raw.answers(plain(whole()))
        status, generation_id, _ = await self.ask(request())
        assert status == 200
        return generation_id


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reader(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Reader]:
    async with RawProvider() as raw:
        made = Reader(tmp_path_factory.mktemp("content") / "stand", raw)
        async with made.opened():
            yield made


def request(*, stream: bool = False, pad: int = 0, **more: Any) -> bytes:
    """A body that no encoder of ours writes."""
    body = {"stream": stream, "messages": [{"role": "user", "content": "Grüße\u2028 \\ud83d"}], "model": MODEL, "ours": [1.50, {}], **more}
    return json.dumps(body, ensure_ascii=False, indent=1).encode() + b" \n" + b" " * pad


def whole(text: str = "Fine. \u00fc") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    answer = {"id": "up-1", "object": "chat.completion", "created": 7, "model": "raw", "choices": [choice], "usage": USAGE}
    return json.dumps(answer).encode()


def is_whole(content: Content, generation_id: str, body: bytes, answer: bytes) -> bool:
    """Whether it is all that was said, and no more."""
    assert abs(content.created_at_ms / 1000 - time.time()) < 60
    return content == Content(generation_id, "user_1", content.created_at_ms, body, answer, truncated=False)


def paid(answer: bytes) -> Decimal:
    """What the last usage object says, as it is written."""
    texts = [line.removeprefix(b"data: ") for line in answer.splitlines() if b'"cost"' in line]
    cost: Decimal = json.loads(texts[-1], parse_float=Decimal)["usage"]["cost"]
    return cost


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
async def test_of_a_whole_answer_the_very_bytes_of_both_sides_arrive(reader: Reader, chunked: bool) -> None:
    reader.raw.answers(plain(whole()))
    status, generation_id, answer = await reader.ask(request(), chunked=chunked)
    assert status == 200 and paid(answer) == DISCOUNTED
    assert is_whole(await reader.next(), generation_id, request(), answer)


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "event by event"])
@pytest.mark.parametrize("explained", ["", "X-OpenRouter-Metadata: enabled\r\n"], ids=["plain", "explained"])
async def test_of_a_stream_all_events_arrive_to_the_last(reader: Reader, at_once: bool, explained: str) -> None:
    events = (event(ROLE), *[event({"content": f" word{number}"}) for number in range(30)], *LAST)
    if at_once:
        reader.raw.answers(plain(b"".join(events), content_type=b"text/event-stream"))
    else:
        reader.raw.answers(SSE_HEAD, *map(chunk, events), b"0\r\n\r\n")
    status, generation_id, answer = await reader.ask(request(stream=True), head=explained)
    assert status == 200 and answer.endswith(DONE) and b" word29" in answer and paid(answer) == DISCOUNTED
    assert (b'"openrouter_metadata"' in answer) == bool(explained)
    assert is_whole(await reader.next(), generation_id, request(stream=True), answer)


async def test_text_completions_are_kept_alike(reader: Reader) -> None:
    choice = {"index": 0, "text": "fine", "finish_reason": "stop"}
    reader.raw.answers(plain(json.dumps({"id": "up-1", "object": "text_completion", "choices": [choice], "usage": USAGE}).encode()))
    body = json.dumps({"model": MODEL, "prompt": "Once"}).encode()
    status, generation_id, answer = await reader.ask(body, path="/v1/completions")
    assert status == 200 and is_whole(await reader.next(), generation_id, body, answer)


async def test_comments_that_keep_a_stream_alive_are_not_kept(reader: Reader) -> None:
    goes_on = asyncio.Event()

    async def slowly(call: RawCall) -> None:
        await goes_on.wait()
        await call.write(SSE_HEAD, *map(chunk, (event({"content": " late"}), *LAST)), b"0\r\n\r\n")

    reader.raw.script = slowly
    async with reader.asking(request(stream=True)) as caller:
        _, headers = await caller.head()
        comments = await caller.chunk() + await caller.chunk()
        assert comments == COMMENT * 2
        goes_on.set()
        answer = b""
        while data := await caller.chunk():
            answer += data
    answer = answer.replace(COMMENT, b"")  # one more may have come meanwhile
    assert b" late" in answer and is_whole(await reader.next(), headers["x-generation-id"], request(stream=True), answer)


async def test_a_broken_stream_is_kept_with_the_error_that_ended_it(reader: Reader) -> None:
    reader.raw.answers(SSE_HEAD, chunk(event({"content": " half"})))  # and hangs up
    status, generation_id, answer = await reader.ask(request(stream=True))
    assert status == 200 and b" half" in answer and b'"error"' in answer and DONE not in answer
    assert is_whole(await reader.next(), generation_id, request(stream=True), answer)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_providers_refusal_is_kept_as_the_caller_got_it(reader: Reader, stream: bool) -> None:
    head = b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    reader.raw.answers(head % len(ERROR) + ERROR)
    status, generation_id, answer = await reader.ask(request(stream=stream))
    assert status >= 500 and generation_id
    assert is_whole(await reader.next(), generation_id, request(stream=stream), answer)


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_of_a_stream_whose_caller_left_what_was_sent_is_kept(reader: Reader, how: str) -> None:
    async def endless(call: RawCall) -> None:
        await call.write(SSE_HEAD, chunk(event(ROLE)), chunk(event({"content": " one"})), chunk(event({"content": " two"})))
        await call.left()

    reader.raw.script = endless
    async with reader.asking(request(stream=True)) as caller:
        _, headers = await caller.head()
        answer = b""
        while b" two" not in answer:
            answer += await caller.chunk()
        leave(caller, how)
    assert is_whole(await reader.next(), headers["x-generation-id"], request(stream=True), answer.replace(COMMENT, b""))


async def test_a_whole_answer_that_nobody_waited_for_is_kept_without_one(reader: Reader) -> None:
    goes_on = asyncio.Event()

    async def slowly(call: RawCall) -> None:
        await goes_on.wait()
        await call.write(plain(whole()))

    reader.raw.script = slowly
    calls = len(reader.raw.calls)
    async with reader.asking(request()) as caller:
        await reader.raw.called(calls + 1)
        leave(caller, "reset")  # who merely stops talking still gets the answer
    await reader.reported("gateway_connections", (), 0)
    goes_on.set()
    content = await reader.next()
    assert (content.request, content.answer, content.truncated) == (request(), b"", False)


async def test_of_an_account_that_does_not_log_nothing_arrives_and_it_pays_in_full(reader: Reader) -> None:
    reader.raw.answers(plain(whole()))
    status, _, answer = await reader.ask(request(), reader.silent)
    assert status == 200 and paid(answer) == FULL
    reader.raw.answers(SSE_HEAD, *map(chunk, (event({"content": " word"}), *LAST)), b"0\r\n\r\n")
    status, _, answer = await reader.ask(request(stream=True), reader.silent)
    assert status == 200 and paid(answer) == FULL
    reader.raw.answers(SSE_HEAD, chunk(event({"content": " half"})))
    await reader.ask(request(stream=True), reader.silent)
    generation_id = await reader.mark()
    assert (await reader.next()).generation_id == generation_id


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (request(model="acme/unknown"), 400), (request(provider={"only": ["nobody"]}), 404), (b"x" * 30_000_000, 413)],
    ids=["malformed", "unknown model", "no endpoint", "too large"],
)
async def test_a_request_refused_before_a_provider_was_asked_is_not_kept(reader: Reader, body: bytes, status: int) -> None:
    assert (await reader.ask(body))[0] == status
    generation_id = await reader.mark()
    assert (await reader.next()).generation_id == generation_id


@pytest.mark.parametrize("before", [LOGS, NO_RULES], ids=["off", "on"])
async def test_a_switch_thrown_meanwhile_changes_nothing_of_what_has_begun(reader: Reader, before: AccountRules) -> None:
    secret = reader.new_key(rules=before)
    begun, goes_on = asyncio.Event(), asyncio.Event()

    async def in_two(call: RawCall) -> None:
        await call.write(SSE_HEAD, chunk(event({"content": " one"})))
        begun.set()
        await goes_on.wait()
        await call.write(*map(chunk, (event({"content": " two"}), *LAST)), b"0\r\n\r\n")

    reader.raw.script = in_two
    async with reader.asking(request(stream=True), secret) as caller:
        await begun.wait()
        _, headers = await caller.head()
        first = await caller.chunk()
        now = msgspec.structs.replace(reader.keys[digest(secret)], rules=NO_RULES if before is LOGS else LOGS)
        reader.keys[now.digest] = now
        reader.link.push_key(now.digest, now)
        # The edge has heard it: the next request is served by the new rule.
        reader.raw.answers(plain(whole()))
        _, next_id, next_answer = await reader.ask(request(), secret)
        assert paid(next_answer) == (FULL if before is LOGS else DISCOUNTED)
        goes_on.set()
        rest = b""
        while data := await caller.chunk():
            rest += data
    answer = (first + rest).replace(COMMENT, b"")
    assert paid(answer) == (DISCOUNTED if before is LOGS else FULL)
    content = await reader.next()
    if before is LOGS:
        assert is_whole(content, headers["x-generation-id"], request(stream=True), answer)
    else:
        assert is_whole(content, next_id, request(), next_answer)
        generation_id = await reader.mark()
        assert (await reader.next()).generation_id == generation_id


async def test_what_is_longer_than_the_setting_is_cut_at_that_byte(reader: Reader) -> None:
    reader.raw.answers(plain(whole()))
    _, _, answer = await reader.ask(request())  # all answers to this are as long
    await reader.next()
    room = BYTES_MAX - len(request()) - len(answer)
    for pad in (room, room + 1, room + len(answer), room + len(answer) + 1, 10 * BYTES_MAX):
        body = request(pad=pad)
        status, generation_id, answer = await reader.ask(body)
        content = await reader.next()
        assert (status, content.generation_id) == (200, generation_id)
        assert content.request + content.answer == body[:BYTES_MAX] + answer[: max(0, BYTES_MAX - len(body))]
        assert content.truncated == (pad > room)


async def test_a_long_stream_is_cut_and_passed_on_in_full(reader: Reader) -> None:
    events = [event({"content": f" word{number}"}) for number in range(300)]
    reader.raw.answers(SSE_HEAD, *map(chunk, (*events, *LAST)), b"0\r\n\r\n")
    _, _, answer = await reader.ask(request(stream=True))
    content = await reader.next()
    assert len(answer) > 2 * BYTES_MAX and answer.endswith(DONE) and b" word299" in answer
    assert content.truncated and content.request == request(stream=True)
    assert content.answer == answer[: BYTES_MAX - len(content.request)]


async def test_while_control_is_away_callers_are_served_and_what_they_said_is_dropped_and_counted(reader: Reader) -> None:
    await reader.link.stop()
    for _ in range(3):
        await reader.mark()
    await reader.open_link()
    await asyncio.wait_for(reader.joined.wait(), 20.0)
    generation_id = await reader.mark()
    assert (await reader.next()).generation_id == generation_id
    await reader.reported("gateway_content_dropped_total", ("edge",), 3)


@pytest.mark.parametrize("logs", [False, True], ids=["off", "on"])
async def test_no_word_of_what_was_said_is_in_any_file_log_or_figure(tmp_path: Path, logs: bool) -> None:
    """A whole gateway, and every way in which an exchange ends."""
    canary = "canary-7f3a91"
    said = [{"role": "user", "content": canary}]
    broken = (SSE_HEAD, chunk(event({"content": canary})))
    async with staged(tmp_path, environ={"GATEWAY_CONTENT_KEY": new_key()} if logs else None) as stage:
        if logs:
            log_prompts(stage.gateway, stage.gateway.account_id)
        for answers, status in (
            ((plain(whole(canary)),), 200),
            ((SSE_HEAD, *map(chunk, (event({"content": canary}), *LAST)), b"0\r\n\r\n"), 200),
            (broken, 200),
            ((SSE_HEAD, chunk(sse({"error": {"message": canary}}))), 502),
            ((plain(f'"{canary}'.encode()),), 502),
        ):
            stage.raw.answers(*answers)
            answered = await stage.ask(RAW, stream=answers[0] is SSE_HEAD, messages=said)
            assert answered.status == status and (canary.encode() in answered.body or status == 502)
        assert (await stage.ask("acme/unknown", messages=said)).status == 400
        async with stage.session.post(stage.url, data=f'{{"{canary}'.encode(), headers=stage.authorization) as refused:
            assert refused.status == 400
        stage.raw.script = _endless(broken)
        async with stage.streaming(RAW, messages=said) as caller:
            while canary.encode() not in await caller.reader.readline():
                pass
            await eventually(lambda: list((stage.gateway.folder / "journal").glob("running-*")))
            await asyncio.to_thread(_find, canary, stage.gateway)
        await asyncio.to_thread(stage.gateway.logged, "exchange", status=499)
        await asyncio.to_thread(_find, canary, stage.gateway)


def _endless(pieces: tuple[bytes, ...]) -> Script:
    async def script(call: RawCall) -> None:
        await call.write(*pieces)
        await call.left()

    return script


def _find(word: str, gateway: RunningGateway) -> None:
    """Fails where it is found, once all that was journalled is in the store."""
    deadline = time.monotonic() + 10.0
    while "\ngateway_journal_pending_records 0" not in (figures := gateway.metrics()):
        assert time.monotonic() < deadline
    files = [path for path in gateway.folder.rglob("*") if path.is_file()]
    assert {"gateway.db", "catalog.toml"} <= {path.name for path in files} and any("journal" in path.parts for path in files)
    assert not [path for path in files if word.encode() in path.read_bytes()]
    assert word not in json.dumps(gateway.log) + figures + "".join(gateway.noise + gateway.stdout)
