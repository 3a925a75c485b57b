"""What an answer costs, and what costs nothing (LED-11, LED-12, STR-04, STR-05): every end of an exchange, to the nano."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from bench.answers import text_of
from bench.behaviour import Behaviour
from gateway.domain.generation import Generation
from tests.edge.stage import ROLE, SSE_HEAD, Answered, behaving, chunk, event, plain, sse
from tests.money.shop import FREE, MODELS, PLAIN, RICH, TIERED, TINY, Shop, exactly, nanos, opened, priced, sim

pytestmark = pytest.mark.asyncio(loop_scope="module")

BOTH = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
DONE = b"data: [DONE]\n\n"
HELLO_TOKENS = 2  # "Hello" at four bytes a token


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    async with opened(tmp_path_factory.mktemp("charges")) as running:
        yield running
        report = await running.verify()
        assert report["ok"] and report["difference_nanos"] == 0


def usage_of(answered: Answered) -> dict[str, Any]:
    """The one usage object of an answer, its numbers as they are written."""
    if not answered.headers["Content-Type"].startswith("text/event-stream"):
        whole: dict[str, Any] = exactly(answered.body)["usage"]
        return whole
    parts = [exactly(line[6:]) for line in answered.body.decode().splitlines() if line.startswith("data: {")]
    (usage,) = (part["usage"] for part in parts if part.get("usage"))
    assert parts[-1]["usage"] == usage and parts[-1]["choices"] == []
    found: dict[str, Any] = usage
    return found


async def settled(shop: Shop, answered: Answered) -> tuple[dict[str, Any], Generation]:
    """Usage as the caller read it, and the record; fails where the two, or the parts of the cost, do not agree."""
    assert answered.status == 200, answered.body
    usage, row = usage_of(answered), await shop.generation(answered.headers["X-Generation-Id"])
    record = await shop.record(row["id"])
    details = usage["cost_details"]
    prompt, completion = details["upstream_inference_prompt_cost"], details["upstream_inference_completions_cost"]
    assert nanos(usage["cost"]) == nanos(row["total_cost"]) == nanos(row["usage"]) == record.charged_nanos
    assert nanos(prompt) + nanos(completion) == record.charged_nanos and nanos(prompt) == record.prompt_nanos
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert (row["native_tokens_prompt"], row["native_tokens_completion"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    return usage, record


def answers(shop: Shop, *events: bytes, end: bytes = DONE) -> None:
    """The raw provider streams these events."""
    shop.raw.answers(SSE_HEAD, *map(chunk, (*events, end) if end else events), b"0\r\n\r\n")


def whole(usage: object, *, text: str | None = "fine", finish: str | None = "stop") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    answer = {"id": "up-1", "object": "chat.completion", "created": 7, "model": "raw", "choices": [choice], "usage": usage}
    return plain(json.dumps(answer).encode())


# LED-11: what providers report.


@BOTH
async def test_led_11_an_explicit_zero_costs_nothing_and_is_no_estimate(shop: Shop, stream: bool) -> None:
    usage, record = await settled(shop, await shop.ask(stream=stream, **sim(usage="zero")))
    assert (record.charged_nanos, record.unbilled_nanos, usage["total_tokens"]) == (0, 0, 0)
    assert record.usage is not None and not record.usage.estimated


@BOTH
async def test_led_11_without_usage_an_estimate_is_charged_and_flagged(shop: Shop, stream: bool) -> None:
    usage, record = await settled(shop, await shop.ask(stream=stream, **sim(usage="none")))
    completion = 16 if stream else -(-len(text_of(16)) // 4)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (HELLO_TOKENS, completion)
    assert record.usage is not None and record.usage.estimated
    assert record.charged_nanos == priced(PLAIN, {"prompt": HELLO_TOKENS, "completion": completion})


@BOTH
@pytest.mark.parametrize(
    ("shape", "dialect"),
    [
        *((shape, "openai") for shape in ("openai", "every", "with_finish", "null_until_end")),
        *(("openai", dialect) for dialect in ("llamacpp", "ollama", "vllm", "groq", "changing_ids")),
        ("every", "changing_ids"),
        ("with_finish", "groq"),
    ],
)
async def test_led_11_usage_counts_wherever_it_stands(shop: Shop, stream: bool, shape: str, dialect: str) -> None:
    answered = await shop.ask(stream=stream, **sim(usage=shape, dialect=dialect, prompt_tokens=321, tokens=21))
    usage, record = await settled(shop, answered)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (321, 21)
    assert record.charged_nanos == priced(PLAIN, {"prompt": 321, "completion": 21})
    assert record.usage is not None and not record.usage.estimated


async def test_led_11_of_repeated_counts_the_last_one_wins(shop: Shop) -> None:
    def told(prompt: int, completion: int, **more: Any) -> bytes:
        usage = {"prompt_tokens": prompt, "completion_tokens": completion}
        return sse({"id": "up-1", "choices": [], "usage": usage, **more})

    answers(shop, event(ROLE), told(9, 0), event({"content": "a"}), told(900, 900), event({}, finish="stop"), told(10, 3, tier="x"))
    answered = await shop.ask("acme/raw", stream=True)
    usage, record = await settled(shop, answered)
    assert record.charged_nanos == priced(PLAIN, {"prompt": 10, "completion": 3}) == nanos(usage["cost"])
    assert answered.events[-2]["tier"] == "x"


@BOTH
async def test_led_11_cached_and_reasoning_tokens_have_their_own_prices(shop: Shop, stream: bool) -> None:
    behaviour = {"prompt_tokens": 1000, "cached_tokens": 601, "reasoning_deltas": 3, "reasoning_tokens": 40, "tokens": 60}
    usage, record = await settled(shop, await shop.ask("acme/rich", stream=stream, **sim(**behaviour)))
    assert record.charged_nanos == priced(RICH, {"prompt": 1000, "cached": 601, "completion": 100, "reasoning": 40})
    assert usage["prompt_tokens_details"] == {"cached_tokens": 601, "cache_write_tokens": 0, "audio_tokens": 0}
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 40}
    row = await shop.generation(record.id)
    assert (row["native_tokens_cached"], row["native_tokens_reasoning"]) == (601, 40)


async def test_led_11_what_was_written_to_a_cache_has_its_price(shop: Shop) -> None:
    told = {"prompt_tokens": 1000, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 100, "cache_write_tokens": 700}}
    shop.raw.answers(whole(told))
    usage, record = await settled(shop, await shop.ask("acme/raw"))
    assert usage["prompt_tokens_details"] == {"cached_tokens": 100, "cache_write_tokens": 700, "audio_tokens": 0}
    assert record.charged_nanos == priced(PLAIN, {"prompt": 1000, "completion": 1})  # no price of their own: that of the prompt


HOSTILE: dict[str, object] = {
    "negative": {"prompt_tokens": -5, "completion_tokens": -7, "total_tokens": -12},
    "huge": {"prompt_tokens": 10**15, "completion_tokens": 1},
    "more than was allowed": {"prompt_tokens": 5, "completion_tokens": 8193},
    "fractions": {"prompt_tokens": 5.5, "completion_tokens": 1.0},
    "text": {"prompt_tokens": "5", "completion_tokens": "1"},
    "more cached than there is": {"prompt_tokens": 5, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 6}},
    "more reasoning than there is": {"prompt_tokens": 5, "completion_tokens": 1, "completion_tokens_details": {"reasoning_tokens": 2}},
    "a list": [1, 2],
    "nothing in it": {},
}


@BOTH
@pytest.mark.parametrize("kind", HOSTILE)
async def test_led_11_hostile_usage_is_refused_and_estimated(shop: Shop, stream: bool, kind: str) -> None:
    if stream:
        answers(shop, event(ROLE), event({"content": "fi"}), event({"content": "ne"}), event({}, finish="stop", usage=HOSTILE[kind]))
    else:
        shop.raw.answers(whole(HOSTILE[kind], text="finefine"))
    _, record = await settled(shop, await shop.ask("acme/raw", stream=stream))
    assert record.usage is not None and record.usage.estimated
    assert record.charged_nanos == priced(PLAIN, {"prompt": HELLO_TOKENS, "completion": 2})


@BOTH
async def test_led_11_not_a_number_is_no_count(shop: Shop, stream: bool) -> None:
    """JSON has no NaN: such an event is dropped, such an answer is none."""
    if stream:
        answers(shop, event({"content": "a"}), event({}, finish="stop"), b'data: {"choices":[],"usage":{"prompt_tokens":NaN}}\n\n')
        _, record = await settled(shop, await shop.ask("acme/raw", stream=True))
        assert record.usage is not None and record.usage.estimated
    else:
        shop.raw.answers(whole(7).replace(b'"usage": 7', b'"usage":NaN'))
        assert (await shop.ask("acme/raw")).status == 502


# Prices.


@BOTH
@pytest.mark.parametrize(("model", "pricing"), [("acme/free", FREE), ("acme/tiny", TINY), ("acme/rich", RICH)])
async def test_led_10_free_is_nothing_and_tiny_is_rounded_up_once(shop: Shop, stream: bool, model: str, pricing: dict[str, str]) -> None:
    usage, record = await settled(shop, await shop.ask(model, stream=stream, **sim(prompt_tokens=7, tokens=5)))
    assert record.charged_nanos == priced(pricing, {"prompt": 7, "completion": 5}) == nanos(usage["cost"])
    assert (record.charged_nanos == 0) == (model == "acme/free")


@pytest.mark.parametrize("tokens", [99_999, 100_000, 100_001])
async def test_led_10_a_long_prompt_has_the_price_of_long_prompts(shop: Shop, tokens: int) -> None:
    _, record = await settled(shop, await shop.ask("acme/tiered", **sim(prompt_tokens=tokens, tokens=3)))
    override: dict[str, str] = TIERED["overrides"][0] if tokens > 100_000 else {}  # type: ignore[assignment]
    assert record.charged_nanos == priced({**PLAIN, **override}, {"prompt": tokens, "completion": 3})


async def test_legacy_completions_are_charged_alike(shop: Shop) -> None:
    answered = await shop.ask(prompt="Once upon", **sim(prompt_tokens=3, tokens=4))
    _, record = await settled(shop, answered)
    assert record.charged_nanos == priced(PLAIN, {"prompt": 3, "completion": 4}) and record.kind == "text"


# LED-12: who is paid.

FAILURES = {
    "status 500": Behaviour(status=500),
    "status 429": Behaviour(status=429),
    "an error with status 200": Behaviour(error_body=True),
    "refused": Behaviour(refuse=True),
    "reset before content": Behaviour(reset_after_events=1),
    "an error event before content": Behaviour(error_event_after=1),
    "nothing": Behaviour(empty=True),
    "a page": Behaviour(html=True),
}


@BOTH
@pytest.mark.parametrize("how", FAILURES)
async def test_led_12_a_failed_attempt_costs_nothing_and_the_next_one_its_own_price(shop: Shop, stream: bool, how: str) -> None:
    before = await shop.used()
    with behaving(shop.cheap, FAILURES[how]):
        answered = await shop.ask(f"acme/two-{stream:d}" if how == "status 429" else "acme/two", stream=stream)
    usage, record = await settled(shop, answered)
    price = MODELS["acme/two"]["good"]
    assert record.charged_nanos == priced(price, {"prompt": HELLO_TOKENS, "completion": 16})
    assert await shop.used() - before == record.charged_nanos == nanos(usage["cost"])
    row = await shop.generation(record.id)
    assert [attempt["provider_name"] for attempt in row["provider_responses"]] == ["Cheap", "Good"]
    assert row["provider_name"] == "Good" and row["provider_responses"][1]["status"] == 200
    assert [attempt.outcome == "ok" for attempt in record.attempts] == [False, True]


@BOTH
async def test_led_12_when_nobody_served_nothing_is_charged(shop: Shop, stream: bool) -> None:
    before = await shop.used()
    shop.raw.answers(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")
    with behaving(shop.cheap, Behaviour(status=503)):
        answered = await shop.ask("acme/broken", stream=stream)
    assert answered.status == 502
    row = await shop.generation(answered.headers["X-Generation-Id"])
    tried = [(attempt["provider_name"], attempt["status"]) for attempt in row["provider_responses"]]
    assert tried == [("Cheap", 503), ("Raw", 500), ("Raw", 500)]
    assert (nanos(row["total_cost"]), row["native_tokens_completion"]) == (0, None)
    assert await shop.used() == before


# Zero-completion insurance.

NOTHING = {"prompt_tokens": 50, "completion_tokens": 0}


async def test_an_answer_without_tokens_and_without_an_end_is_free(shop: Shop) -> None:
    shop.raw.answers(whole(NOTHING, text="", finish=None))
    _, record = await settled(shop, await shop.ask("acme/raw"))
    assert (record.charged_nanos, record.unbilled_nanos) == (0, priced(PLAIN, {"prompt": 50, "completion": 0}))


async def test_an_answer_without_tokens_that_ended_in_order_is_charged(shop: Shop) -> None:
    shop.raw.answers(whole(NOTHING, text=""))
    _, record = await settled(shop, await shop.ask("acme/raw"))
    assert record.charged_nanos == priced(PLAIN, {"prompt": 50, "completion": 0})


@BOTH
async def test_an_answer_that_ends_in_error_is_free(shop: Shop, stream: bool) -> None:
    told = {"prompt_tokens": 50, "completion_tokens": 4}
    if stream:
        answers(shop, event({"content": "a"}), event({}, finish="error", usage=told))
    else:
        shop.raw.answers(whole(told, finish="error"))
    answered = await shop.ask("acme/raw", stream=stream)
    record = await shop.record(answered.headers["X-Generation-Id"])
    assert (record.charged_nanos, record.unbilled_nanos) == (0, priced(PLAIN, {"prompt": 50, "completion": 4}))
    assert record.finish_reason == "error" and (stream or nanos(usage_of(answered)["cost"]) == 0)


async def test_a_stream_that_says_nothing_is_no_answer_and_free(shop: Shop) -> None:
    answers(shop, event(ROLE), sse({"choices": [], "usage": {"prompt_tokens": 50, "completion_tokens": 0}}))
    answered = await shop.ask("acme/raw", stream=True)
    assert answered.status == 502
    assert (await shop.record(answered.headers["X-Generation-Id"])).charged_nanos == 0


# STR-05: streams that break.

BREAKS = {
    "reset": Behaviour(reset_after_events=6),
    "close": Behaviour(close_after_events=6),
    "error event": Behaviour(error_event_after=6),
    "reset, with counts": Behaviour(reset_after_events=6, usage="every", prompt_tokens=40),
}


@pytest.mark.parametrize("how", BREAKS)
async def test_str_05_a_stream_that_its_provider_breaks_is_free_and_what_it_would_have_cost_is_kept(shop: Shop, how: str) -> None:
    before = await shop.used()
    with behaving(shop.good, BREAKS[how]):
        answered = await shop.ask(stream=True)
    assert answered.events[-1]["error"]["code"] >= 500 and answered.events[-1]["choices"][0]["finish_reason"] == "error"
    record = await shop.record(answered.headers["X-Generation-Id"])
    prompt = BREAKS[how].prompt_tokens or HELLO_TOKENS
    assert (record.charged_nanos, record.unbilled_nanos) == (0, priced(PLAIN, {"prompt": prompt, "completion": 5}))
    assert (record.finish_reason, record.error) == ("error", "stream_broken") and await shop.used() == before


async def test_str_05_broken_streams_are_charged_where_the_operator_says_so(tmp_path: Path) -> None:
    async with opened(tmp_path, settings={"billing": {"charge_broken_streams": True}}) as shop:
        for how in BREAKS.values():
            with behaving(shop.good, how):
                answered = await shop.ask(stream=True)
            record = await shop.record(answered.headers["X-Generation-Id"])
            assert record.charged_nanos == priced(PLAIN, {"prompt": how.prompt_tokens or HELLO_TOKENS, "completion": 5})
            assert record.unbilled_nanos == 0
        with behaving(shop.good, Behaviour(reset_after_events=1)):  # no content yet
            answered = await shop.ask(stream=True)
        assert answered.status == 502 and (await shop.record(answered.headers["X-Generation-Id"])).charged_nanos == 0
        assert (await shop.verify())["ok"]


# What the sums say.


async def test_credits_and_the_key_say_what_the_generations_add_up_to(shop: Shop) -> None:
    account = await shop.new_account("bob@example.com", "3.00")
    charged = 0
    asked: dict[str, dict[str, int]] = {
        "acme/plain": {}, "acme/rich": {"cached_tokens": 1}, "acme/tiny": {}, "acme/free": {}, "acme/two": {}
    }  # fmt: skip
    for model, behaviour in asked.items():
        answered = await shop.ask(model, account=account, **sim(prompt_tokens=11, **behaviour))
        charged += nanos((await shop.generation(answered.headers["X-Generation-Id"], account))["total_cost"])
    credits, key = await shop.get("credits", account), await shop.get("key", account)
    assert charged > 0 and nanos(credits["total_usage"]) == charged and nanos(credits["total_credits"]) == 3 * 10**9
    assert {nanos(key[name]) for name in ("usage", "usage_daily", "usage_weekly", "usage_monthly")} == {charged}
