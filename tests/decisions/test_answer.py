"""Whole answers of providers: put in our name and into the contract's form, or told apart from what is none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.wire.answer import Answer, NotAnAnswer, rewrite
from tests.decisions.streams import GENERATION, MODEL, PROVIDER

USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
PLAIN: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1750000000,
    "model": "sage-1",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop", "logprobs": None}],
    "usage": USAGE,
}


def read(answer: object) -> Answer:
    """Read it; where there is a choice, as the two ways in which programs write JSON, which must come to the same."""
    if isinstance(answer, bytes):
        return rewrite(answer, GENERATION, MODEL, PROVIDER)
    spaced = rewrite(json.dumps(answer).encode(), GENERATION, MODEL, PROVIDER)
    compact = rewrite(json.dumps(answer, separators=(",", ":")).encode(), GENERATION, MODEL, PROVIDER)
    assert shown(spaced) == shown(compact)
    assert (spaced.upstream_id, spaced.finish_reason) == (compact.upstream_id, compact.finish_reason)
    return compact


def shown(answer: Answer) -> dict[str, Any]:
    """What the caller gets, but for the usage."""
    found: dict[str, Any] = json.loads(answer.render(b'"ours"'))
    assert found.pop("usage") == "ours"
    return found


def with_choice(**members: Any) -> dict[str, Any]:
    return {**PLAIN, "choices": [{**PLAIN["choices"][0], **members}]}


def choice_of(answer: Answer) -> dict[str, Any]:
    choice: dict[str, Any] = shown(answer)["choices"][0]
    return choice


def test_an_answer_reads_in_our_name() -> None:
    answer = read(PLAIN)
    found = shown(answer)
    assert (found["id"], found["model"], found["provider"]) == (GENERATION, MODEL, PROVIDER)
    assert (answer.upstream_id, answer.finish_reason) == ("chatcmpl-1", "stop")
    assert answer.usage is not None and json.loads(answer.usage) == USAGE
    assert json.loads(answer.render(b'{"cost":1}')) == {**found, "usage": {"cost": 1}}
    assert found == {
        **{name: value for name, value in PLAIN.items() if name != "usage"},
        "id": GENERATION,
        "model": MODEL,
        "provider": PROVIDER,
        "system_fingerprint": None,
        "choices": [{**PLAIN["choices"][0], "native_finish_reason": "stop"}],
    }


@pytest.mark.parametrize(
    ("native", "finish"),
    [
        ("stop", "stop"), ("length", "length"), ("tool_calls", "tool_calls"), ("content_filter", "content_filter"), ("error", "error"),
        ("end_turn", "stop"), ("eos", "stop"), ("STOP", "stop"), ("stop_sequence", "stop"), ("max_tokens", "length"),
        ("MAX_TOKENS", "length"),
        ("model_length", "length"), ("model_context_window_exceeded", "length"), ("refusal", "content_filter"),
        ("sensitive", "content_filter"),
        ("content_filter: PROHIBITED_CONTENT", "content_filter"), ("RECITATION", "content_filter"), ("SPII", "content_filter"),
        ("function_call_filter: MALFORMED_FUNCTION_CALL", "error"), ("insufficient_system_resource", "error"), ("abort", "error"),
        ("tool_use", "tool_calls"), ("function_call", "tool_calls"), ("SAFETY", "content_filter"), ("never heard of it", "stop"),
    ],
)  # fmt: skip
def test_finish_reasons_are_of_the_contracts_words(native: str, finish: str) -> None:
    choice = choice_of(read(with_choice(finish_reason=native)))
    assert (choice["finish_reason"], choice["native_finish_reason"]) == (finish, native)


@pytest.mark.parametrize("native", [None, ""])
def test_no_finish_reason_is_null(native: str | None) -> None:
    answer = read(with_choice(finish_reason=native))
    assert (choice_of(answer)["finish_reason"], choice_of(answer)["native_finish_reason"], answer.finish_reason) == (None, None, None)


def test_a_native_finish_reason_of_the_providers_own_is_kept() -> None:
    assert choice_of(read(with_choice(finish_reason="stop", native_finish_reason="END")))["native_finish_reason"] == "END"


def test_required_members_are_there_and_nulls_are_not_where_clients_refuse_them() -> None:
    answer = {
        "choices": [{"message": {"role": "assistant", "content": None, "tool_calls": None, "refusal": None, "audio": None}}, {"text": "x"}]
    }
    assert shown(read({**answer, "error": None, "usage": None})) == {
        "id": GENERATION,
        "provider": PROVIDER,
        "model": MODEL,
        "object": "chat.completion",
        "created": int(GENERATION.split("-")[1]),
        "system_fingerprint": None,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": None, "refusal": None},
                "finish_reason": None,
                "native_finish_reason": None,
            },
            {"index": 1, "text": "x", "finish_reason": None, "native_finish_reason": None},
        ],
    }


@pytest.mark.parametrize("object_", [None, "", "chat.completion.chunk", 5])
@pytest.mark.parametrize("created", [None, 1764031697.5, "1764031697", -1])
def test_an_object_or_a_time_that_strict_clients_refuse_is_replaced(object_: object, created: object) -> None:
    message = {"content": "x"}  # without a role, which they require
    found = shown(read({"object": object_, "created": created, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}))
    assert (found["object"], found["created"]) == ("chat.completion", int(GENERATION.split("-")[1]))
    assert found["choices"][0]["message"] == {"role": "assistant", "content": "x"}
    text = shown(read({"object": object_, "created": created, "choices": [{"index": 0, "text": "x", "finish_reason": "stop"}]}))
    assert text["object"] == "text_completion"


@pytest.mark.parametrize("usage", [None, {}, 5, "many", [], [1, 2, 3]])
def test_usage_that_says_nothing_is_left_out(usage: object) -> None:
    answer = read({**PLAIN, "usage": usage})
    assert answer.usage is None
    assert "usage" not in shown(answer)


@pytest.mark.parametrize(("own", "upstream_id"), [("x", "x"), (5, "5"), (None, ""), ("", ""), ([1], ""), (1.5, ""), ({"a": 1}, "")])
def test_any_id_will_do(own: object, upstream_id: str) -> None:
    answer = read({**PLAIN, "id": own})
    assert (answer.upstream_id, json.loads(answer.render(b"{}"))["id"]) == (upstream_id, GENERATION)


def test_members_we_do_not_know_pass_byte_for_byte() -> None:
    body = b'{"x_groq": {"n": 1e999, "id":"req_1"} ,"choices":[{"index":0,"message":{"content":"\\u0041", "z" : 9999999999999999999999}}]}'
    found = read(body).render(b"{}")
    assert b'"x_groq":{"n": 1e999, "id":"req_1"}' in found
    assert b'"content":"\\u0041"' in found and b'"z":9999999999999999999999' in found


def test_no_key_stands_twice() -> None:
    body = b'{"id":"a","id":"b","model":"m","model":"n","provider":"P","choices":[{"finish_reason":"stop","finish_reason":"length"}]}'
    found = json.loads(read(body).render(b"{}"), object_pairs_hook=list)
    assert len(dict(found)) == len(found)
    assert read(body).finish_reason == "length"


@pytest.mark.parametrize(
    ("choice", "content_bytes"),
    [
        ({"message": {"content": "Hi"}}, 2),
        ({"message": {"content": "é模"}}, 5),
        ({"message": {"content": "a", "reasoning": "bc", "reasoning_content": None}}, 3),
        ({"text": "abcd"}, 4),
        ({"text": "é模"}, 5),
        ({"message": {"content": None}}, 0),
        ({"message": {}}, 0),
    ],
)
def test_text_is_counted_for_where_usage_is_missing_or_not_believed(choice: dict[str, Any], content_bytes: int) -> None:
    answer = {"choices": [choice, choice]}
    assert read(answer).content_bytes == 2 * content_bytes
    assert read({**answer, "usage": USAGE}).content_bytes == read(answer).content_bytes  # a usage object need not be believed


@pytest.mark.parametrize(
    "message", [{"tool_calls": [{"id": "c"}], "content": None}, {"content": [{"type": "text", "text": "x"}]}, {"content": 5}]
)
def test_what_is_no_plain_text_counts_as_json_that_carries_it(message: dict[str, Any]) -> None:
    choices = [{"message": message}]
    assert 20 < read({"choices": choices}).content_bytes <= len(json.dumps(choices))


def test_a_byte_order_mark_is_no_part_of_the_answer() -> None:
    answer = json.dumps(PLAIN).encode()
    marked = rewrite(b"\xef\xbb\xbf" + answer, GENERATION, MODEL, PROVIDER)
    assert marked == rewrite(answer, GENERATION, MODEL, PROVIDER)


def test_half_a_surrogate_pair_passes() -> None:
    body = b'{"choices":[{"index":0,"message":{"content":"a\\ud83d b\\\\ud800 \\uD83D\\uDE00"},"finish_reason":"length"}]}'
    assert choice_of(read(body))["message"]["content"] == "a\ud83d b\\ud800 😀"


NO_ANSWER = [
    b"", b" ", b"null", b"5", b'"x"', b"[]", b"{}", b"<html>502</html>",
    b'{"choices":null}', b'{"choices":{}}', b'{"choices":[]}', b'{"choices":[5]}', b'{"choices":[{"finish_reason":5}]}',
    b'{"choices":[{"message":"a string"}]}', b'{"choices":[{}]', b'{"choices":[{}]}}', b'{"choices":[{"a":NaN}]}',
    b'\xef\xbb\xbf\xef\xbb\xbf{"choices":[{}]}', b'{"choices":[{"text":"\xff"}]}', b'{"choices":[{"text":"\xff\\ud800"}]}',
    b'{"choices":[{"text":"\\ud800"}]', b'{"choices":' + b"[" * 100_000, b'{"id":"' + b"x" * 1000,
]  # fmt: skip


@pytest.mark.parametrize("body", NO_ANSWER, ids=range(len(NO_ANSWER)))
def test_what_is_no_completion_is_told_apart(body: bytes) -> None:
    with pytest.raises(NotAnAnswer) as told:
        read(body)
    assert told.value.error is None


@pytest.mark.parametrize("error", [{"message": "down", "code": 503}, "down", [1], True, 1, {"code": None}])
@pytest.mark.parametrize("choices", [True, False])
def test_an_error_in_a_200_is_an_error(error: object, choices: bool) -> None:
    with pytest.raises(NotAnAnswer) as told:
        read({**(PLAIN if choices else {}), "error": error})
    assert told.value.error is not None and json.loads(told.value.error) == error


@pytest.mark.parametrize("none", [None, False, {}, "", []])
def test_an_error_that_is_none_is_no_error(none: object) -> None:
    assert "error" not in json.loads(read({**PLAIN, "error": none}).render(b"{}"))


def test_names_cannot_break_out_of_their_strings() -> None:
    text = '","model":"x\n\r\u2028'
    found = json.loads(rewrite(json.dumps(PLAIN).encode(), GENERATION, text, text).render(b"{}"))
    assert (found["model"], found["provider"]) == (text, text)


VALUES: list[object] = [
    None,
    True,
    5,
    "x",
    [],
    {},
    [None],
    [{}],
    [{"finish_reason": "x"}],
    [{"message": {"role": None}}],
    {"a": 1},
    [[]],
    "\ud800",
]


@settings(max_examples=200, deadline=None)
@given(
    body=st.binary(max_size=60)
    | st.dictionaries(st.sampled_from(["id", "model", "choices", "usage", "error", "x"]), st.sampled_from(VALUES)).map(
        lambda fields: json.dumps(fields).encode()
    )
)
def test_noise_is_no_answer_and_nothing_worse(body: bytes) -> None:
    try:
        answer = read(body)
    except NotAnAnswer:
        return
    assert json.loads(answer.render(b"{}"))["id"] == GENERATION
