"""Streams that break and go on at another endpoint: the caller has one answer, without a repeated or a lost character (STR-06)."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

import openai
import pytest
import pytest_asyncio

from bench.answers import text_of
from bench.behaviour import Behaviour
from tests.edge.stage import HELLO, ROLE, SSE_HEAD, Answered, RawCall, RawProvider, Stage, behaving, chunk, event, sse, staged

pytestmark = pytest.mark.asyncio(loop_scope="module")

AT_ONCE = 24
IDLE_S = 1.0
SPELLINGS = ("mistral", "deepseek", "moonshot", "vllm")
MODELS = {
    "acme/sim": ("first", "good"),
    "acme/unable": ("first", "good"),
    "acme/odd": ("raw", "second"),
    "acme/three": ("first", "second", "good"),
    **{f"acme/{name}": ("first", "second") for name in SPELLINGS},
}
PREFILL = {
    ("acme/sim", "good"): "true",
    ("acme/odd", "second"): "true",
    ("acme/three", "second"): "true",
    ("acme/three", "good"): "true",
} | {(f"acme/{name}", "second"): json.dumps(name) for name in SPELLINGS}
# As a provider writes them: escapes, a pair of surrogates in two events, an event that ends in a backslash.
PIECES = ("Gr\\u00fc\\u00dfe", " ", "\\ud83d", "\\ude00", ' \\"né\\"\\n', "\\\\", "\\\\ud83d", "\\uD83D", "\\uDE00\\t", "end.")
TEXT: str = json.loads('"' + "".join(PIECES) + '"')


def provided(catalog: str, second: RawProvider) -> str:
    """The catalog with one provider more, and with what endpoints can go on."""
    catalog += (
        f'\n[[providers]]\nslug = "second"\nname = "Second"\nbase_url = "{second.url}"\ndata = {{ trains = false, retains = false }}\n'
    )
    for model, slugs in MODELS.items():
        tables = [f'[[models]]\nid = "{model}"\nname = "{model}"\ncontext_length = 131072\n']
        for slug in slugs:
            able = f"prefill = {PREFILL[model, slug]}\n" if (model, slug) in PREFILL else ""
            tables.append(
                f'[[models.endpoints]]\nprovider = "{slug}"\nupstream_model = "{model.partition("/")[2]}"\nmax_completion_tokens = 8192\n'
                f'{able}pricing = {{ prompt = "0.000001", completion = "0.000002" }}\n'
            )
        catalog += "\n" + "".join(tables)
    return catalog


class Scene:
    """A stage with a second raw provider, and callers who wish that streams go on."""

    def __init__(self, stage: Stage, second: RawProvider) -> None:
        self.stage = stage
        self.second = second

    async def ask(self, model: str, *, continuation: bool = True, **more: Any) -> Answered:
        wishes = {"order": list(MODELS[model]), "continuation": continuation}
        return await self.stage.ask(model, stream=True, provider=wishes, **more)

    def sent(self) -> Any:
        """The last request that the second provider had."""
        return json.loads(self.second.calls[-1].body)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    async with RawProvider() as second:
        settings = {"timeouts": {"idle_s": IDLE_S, "keepalive_s": 60.0}}
        async with staged(tmp_path_factory.mktemp("stage"), settings=settings, catalog=lambda text: provided(text, second)) as stage:
            yield Scene(stage, second)


def raw_answer(pieces: tuple[str, ...]) -> bytes:
    """A whole stream of these texts, each as it stands in JSON."""
    empty = event({"content": "@"})
    events = [event(ROLE), *(empty.replace(b'"@"', f'"{piece}"'.encode()) for piece in pieces), event({}, finish="stop")]
    usage = sse({"id": "up-1", "object": "chat.completion.chunk", "created": 7, "model": "raw", "choices": [], "usage": USAGE})
    return SSE_HEAD + b"".join(map(chunk, [*events, usage, b"data: [DONE]\n\n"])) + b"0\r\n\r\n"


USAGE = {"prompt_tokens": 9, "completion_tokens": 10, "total_tokens": 19}
ANSWER = raw_answer(PIECES)


async def cut(call: RawCall) -> None:
    """As much of the answer as the request says, and then the end of the connection, or a reset."""
    at = int(json.loads(call.body)["metadata"]["cut"])
    await call.write(ANSWER[:at])


def goes_on(text: str) -> Any:
    """A provider that goes on with this text, a character an event, with an opening of its own."""

    async def script(call: RawCall) -> None:
        last = json.loads(call.body)["messages"][-1]
        said = last["content"] if last["role"] == "assistant" else ""
        assert text.startswith(said), said
        events = [event({"role": "assistant", "content": each}, later=True) for each in text[len(said) :]]
        data = b"".join([event(ROLE), *events, event({}, finish="stop")]).replace(b'"created":7', b'"created":99')
        await call.write(SSE_HEAD + chunk(data + b"data: [DONE]\n\n") + b"0\r\n\r\n")

    return script


def assert_one_answer(answered: Answered, text: str) -> list[Mapping[str, Any]]:
    """That this is one whole stream, by the contract, with exactly this text; its events."""
    *events, done = answered.events
    assert (answered.status, done) == (200, "[DONE]"), answered.body
    halves = "".join(each["choices"][0]["delta"].get("content") or "" for each in events if each["choices"])
    assert halves.encode("utf-16", "surrogatepass").decode("utf-16") == text
    assert {each["id"] for each in events} == {answered.headers["X-Generation-Id"]}
    assert len({each["created"] for each in events}) == 1
    deltas = [each["choices"][0]["delta"] for each in events if each["choices"]]
    roles = [number for number, delta in enumerate(deltas) if "role" in delta]
    assert roles in ([0], list(range(len(roles))))  # of the endpoint that began
    assert [each["choices"][0]["finish_reason"] for each in events if each["choices"]].count("stop") == 1
    assert [bool(each.get("usage")) for each in events] == [False] * (len(events) - 1) + [True]
    assert events[-1]["choices"] == []
    return events


async def test_str_06_a_stream_cut_at_any_byte_goes_on_without_a_repeated_or_lost_character(scene: Scene) -> None:
    scene.stage.raw.script, scene.second.script = cut, goes_on(TEXT)
    places = asyncio.Semaphore(AT_ONCE)

    async def one(at: int) -> int:
        async with places:
            answered = await scene.ask("acme/odd", metadata={"cut": str(at)})
        events = assert_one_answer(answered, TEXT)
        names = [each["provider"] for each in events]
        assert names == sorted(names), "the first endpoint's events come first"
        return len(set(names))

    count = await asyncio.gather(*(one(at) for at in range(len(ANSWER) + 1)))
    # In the head and the opening: another answers all of it. Later: two make it. After the word of the end: nobody else is needed.
    kinds = "".join(map(str, count))
    assert re.fullmatch("1+2+1+", kinds), kinds


@pytest.mark.parametrize("fault", ["close_after_events", "reset_after_events", "stall_after_events", "error_event_after"])
@pytest.mark.parametrize("events", [2, 5, 17])
async def test_str_06_whatever_breaks_a_stream_it_goes_on(scene: Scene, fault: str, events: int) -> None:
    with behaving(scene.stage.first, Behaviour(tokens=16).changed_by(f"{fault}={events}")):
        answered = await scene.ask("acme/sim")
    told = assert_one_answer(answered, text_of(16))
    assert {each["provider"] for each in told} == {"First", "Good"}
    line = scene.stage.exchange(answered.headers["X-Generation-Id"])
    outcome = "stream_stalled" if "stall" in fault else "stream_broken"
    assert [name for _, name, _ in line["attempts"]] == [outcome, "ok"]


async def test_str_06_who_did_not_ask_for_it_gets_the_error_event(scene: Scene) -> None:
    good = scene.stage.good.books.requests
    with behaving(scene.stage.first, Behaviour(close_after_events=5)):
        for answered in (await scene.ask("acme/sim", continuation=False), await scene.ask("acme/unable")):
            assert answered.text == text_of(4) and answered.events[-1]["error"]["code"] == 502
    assert scene.stage.good.books.requests == good


@pytest.mark.parametrize(
    ("behaviour", "more"),
    [
        (Behaviour(tool_call=True, close_after_events=5), {}),
        (Behaviour(reasoning_deltas=9, close_after_events=5), {}),
        (Behaviour(close_after_events=5), {"response_format": {"type": "json_object"}}),
        (Behaviour(close_after_events=5), {"guided_regex": "[a-z ]+"}),
    ],
)
async def test_str_06_what_no_text_can_go_on_with_ends_in_the_error_event(scene: Scene, behaviour: Behaviour, more: dict[str, Any]) -> None:
    good = scene.stage.good.books.requests
    with behaving(scene.stage.first, behaviour):
        answered = await scene.ask("acme/sim", **more)
    assert answered.events[-1]["error"]["code"] == 502 and "[DONE]" not in answered.events
    assert scene.stage.good.books.requests == good


async def test_str_06_reasoning_that_was_done_does_not_come_again(scene: Scene) -> None:
    with behaving(scene.stage.good, Behaviour(reasoning_deltas=2)):
        with behaving(scene.stage.first, Behaviour(reasoning_deltas=3, close_after_events=6)):
            answered = await scene.ask("acme/sim")
    events = assert_one_answer(answered, text_of(16))
    deltas = [each["choices"][0]["delta"] for each in events if each["choices"]]
    assert "".join(each.get("reasoning_content") or each.get("reasoning") or "" for each in deltas) == text_of(3)


async def test_str_06_the_limit_of_tokens_holds_for_both_parts_together(scene: Scene) -> None:
    for events in (5, 11):  # the second time all ten were made, and only the word of the end was lost
        good = scene.stage.good.books.requests
        with behaving(scene.stage.first, Behaviour(tokens=50, close_after_events=events)), behaving(scene.stage.good, Behaviour(tokens=50)):
            answered = await scene.ask("acme/sim", max_tokens=10)
        assert answered.text == text_of(10) and answered.events[-1] == "[DONE]"
        told = answered.events[:-1]
        assert [each["choices"][0]["finish_reason"] for each in told if each["choices"]][-1] == "length"
        assert told[-1]["usage"]["completion_tokens"] == 10
        assert len({each["created"] for each in told}) == len({each["id"] for each in told}) == 1
        assert scene.stage.good.books.requests - good == (1 if events == 5 else 0)


async def test_str_06_a_second_break_goes_on_a_second_time_and_attempts_have_an_end(scene: Scene) -> None:
    half = text_of(8)

    async def script(call: RawCall) -> None:
        said = json.loads(call.body)["messages"][-1]["content"]
        await call.write(SSE_HEAD + chunk(event(ROLE) + event({"content": half[len(said) :]})))

    scene.second.script = script
    with behaving(scene.stage.first, Behaviour(close_after_events=4)):
        answered = await scene.ask("acme/three")
        told = assert_one_answer(answered, text_of(16))
        assert [each["provider"] for each in told if each["choices"]][-1] == "Good"
        with behaving(scene.stage.good, Behaviour(close_after_events=3)):
            broken = await scene.ask("acme/three")
    assert broken.text == text_of(10)
    assert broken.events[-1]["error"]["metadata"]["provider_name"] == "Good" and "[DONE]" not in broken.events


async def test_str_06_what_failed_before_its_first_content_leaves_no_trace_in_what_goes_on(scene: Scene) -> None:
    async def script(call: RawCall) -> None:  # later than the first, which nobody has read; then cut
        await call.write(SSE_HEAD + chunk((event(ROLE) + event({"content": text_of(2)})).replace(b'"created":7', b'"created":99')))

    scene.second.script = script
    with behaving(scene.stage.first, Behaviour(close_after_events=1)):
        answered = await scene.ask("acme/three")
    told = assert_one_answer(answered, text_of(16))
    assert {each["created"] for each in told} == {99} and [each["provider"] for each in told if each["choices"]][-1] == "Good"


@pytest.mark.parametrize("kind", SPELLINGS)
async def test_str_06_each_kind_of_endpoint_is_told_in_its_own_words(scene: Scene, kind: str) -> None:
    whole, said = text_of(16), text_of(4)

    async def script(call: RawCall) -> None:
        rest = whole if kind == "mistral" else whole[len(said) :]  # Mistral's answer begins with what it was given
        events = [event(ROLE), *(event({"content": each}) for each in re.findall(r" \w+", rest)), event({}, finish="stop")]
        await call.write(SSE_HEAD + chunk(b"".join(events)) + b"0\r\n\r\n")

    scene.second.script = script
    with behaving(scene.stage.first, Behaviour(close_after_events=5)):
        assert_one_answer(await scene.ask(f"acme/{kind}", max_tokens=100), whole)
    body = scene.sent()
    mark = {"mistral": {"prefix": True}, "deepseek": {"prefix": True}, "moonshot": {"partial": True}, "vllm": {}}[kind]
    assert body["messages"] == [*HELLO, {"role": "assistant", "content": said, **mark}]
    assert (body.get("continue_final_message"), body.get("add_generation_prompt")) == ((True, False) if kind == "vllm" else (None, None))
    assert body["max_tokens"] == 96
    assert "provider" not in body


async def test_str_06_an_answer_that_its_caller_began_is_one_message_still(scene: Scene) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Say:"}]
    scene.second.script = goes_on("Say:" + text_of(16))
    with behaving(scene.stage.first, Behaviour(close_after_events=5)):
        assert_one_answer(await scene.ask("acme/three", messages=messages), text_of(16))
    assert scene.sent()["messages"] == [*HELLO, {"role": "assistant", "content": "Say:" + text_of(4)}]


async def test_str_06_a_bare_prompt_goes_on_anywhere(scene: Scene) -> None:
    async def script(call: RawCall) -> None:
        assert json.loads(call.body)["prompt"] == "Once" + text_of(3)
        choice = {"text": text_of(6)[len(text_of(3)) :], "index": 0, "finish_reason": None}
        said = sse({"id": "c", "object": "text_completion", "created": 9, "model": "m", "choices": [choice]})
        end = sse(
            {
                "id": "c",
                "object": "text_completion",
                "created": 9,
                "model": "m",
                "choices": [{**choice, "text": "", "finish_reason": "stop"}],
            }
        )
        await call.write(SSE_HEAD + chunk(said + end + b"data: [DONE]\n\n") + b"0\r\n\r\n")

    scene.second.script = script
    with behaving(scene.stage.first, Behaviour(close_after_events=3)):
        answered = await scene.ask("acme/mistral", prompt="Once", path="/api/v1/completions")
    *events, done = answered.events
    assert "".join(each["choices"][0]["text"] for each in events if each["choices"]) == text_of(6) and done == "[DONE]"


async def test_str_06_a_client_of_openais_reads_one_answer(scene: Scene) -> None:
    async with openai.AsyncOpenAI(base_url=f"{scene.stage.gateway.url}/api/v1", api_key=scene.stage.gateway.key, max_retries=0) as client:
        with behaving(scene.stage.first, Behaviour(reset_after_events=7)):
            wishes = {"provider": {"order": ["first", "good"], "continuation": True}}
            stream = await client.chat.completions.create(
                model="acme/sim", messages=[{"role": "user", "content": "Hello"}], stream=True, extra_body=wishes
            )
            chunks = [each async for each in stream]
    assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == text_of(16)
    assert {each.id for each in chunks} == {chunks[0].id} and len({each.created for each in chunks}) == 1
    assert [each.choices[0].finish_reason for each in chunks if each.choices][-1] == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 16


async def test_str_06_a_caller_who_reads_slowly_is_not_sent_more_by_the_endpoint_that_goes_on(scene: Scene) -> None:
    total = 60_000

    async def script(call: RawCall) -> None:
        said = json.loads(call.body)["messages"][-1]["content"]
        call.writer.write(SSE_HEAD)
        for _ in range(total):
            call.writer.write(chunk(event({"content": "x" * 400})))
            await call.writer.drain()
        assert said
        await call.write(chunk(event({}, finish="stop") + b"data: [DONE]\n\n") + b"0\r\n\r\n")

    scene.second.script = script
    before = scene.stage.rss_bytes()
    wishes = {"order": ["first", "second"], "continuation": True}
    with behaving(scene.stage.first, Behaviour(close_after_events=9)):
        async with scene.stage.streaming("acme/three", provider=wishes) as caller:
            await caller.head()
            await scene.second.called(len(scene.second.calls) + 1)
            await asyncio.sleep(0.5)  # in which all of it would come, were it asked for: 30 MB
            assert scene.stage.rss_bytes() - before < 12_000_000
