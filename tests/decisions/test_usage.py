"""Usage objects are read with suspicion (LED-11): zero is zero, nothing is an estimate, and what cannot be is not believed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.usage import Usage
from gateway.wire.usage import estimate, read

LIMITS = (2000, 500)  # the most prompt and completion tokens that are believed


def told(**members: Any) -> Usage | None:
    return read(json.dumps({"prompt_tokens": 100, "completion_tokens": 40, **members}).encode(), *LIMITS, images=0)


def test_led_11_an_explicit_zero_is_a_count_and_no_estimate() -> None:
    zero = read(b'{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}', *LIMITS, images=0)
    assert zero == Usage(prompt_tokens=0, completion_tokens=0)
    assert zero is not None and not zero.estimated


@pytest.mark.parametrize("reported", [None, b"{}", b"[]", b"null", b"7", b'"usage"', b"", b"{", b'{"completion_tokens":3}'])
def test_led_11_without_a_count_there_is_nothing_to_believe(reported: bytes | None) -> None:
    assert read(reported, *LIMITS, images=0) is None


SHAPES: dict[str, tuple[dict[str, Any], Usage]] = {
    "plain": ({"total_tokens": 140}, Usage(prompt_tokens=100, completion_tokens=40)),
    "openai": (
        {
            "prompt_tokens_details": {"cached_tokens": 64, "audio_tokens": 3},
            "completion_tokens_details": {"reasoning_tokens": 30, "audio_tokens": 0, "accepted_prediction_tokens": 0},
        },
        Usage(prompt_tokens=100, completion_tokens=40, cached_tokens=64, reasoning_tokens=30, audio_tokens=3),
    ),
    "details null": ({"prompt_tokens_details": None, "completion_tokens_details": None}, Usage(prompt_tokens=100, completion_tokens=40)),
    "members null": (
        {"total_tokens": None, "prompt_tokens_details": {"cached_tokens": None}, "completion_tokens_details": {"reasoning_tokens": None}},
        Usage(prompt_tokens=100, completion_tokens=40),
    ),
    "deepseek": (
        {"prompt_cache_hit_tokens": 64, "prompt_cache_miss_tokens": 36},
        Usage(prompt_tokens=100, completion_tokens=40, cached_tokens=64),
    ),
    "moonshot": ({"cached_tokens": 64}, Usage(prompt_tokens=100, completion_tokens=40, cached_tokens=64)),
    "anthropic": (
        {"cache_read_input_tokens": 60, "cache_creation_input_tokens": 20},
        Usage(prompt_tokens=100, completion_tokens=40, cached_tokens=60, cache_write_tokens=20),
    ),
    "cache writes": (
        {"prompt_tokens_details": {"cached_tokens": 10, "cache_write_tokens": 90}},
        Usage(prompt_tokens=100, completion_tokens=40, cached_tokens=10, cache_write_tokens=90),
    ),
    "xai, reasoning beside completion": (
        {"total_tokens": 440, "completion_tokens_details": {"reasoning_tokens": 300}},
        Usage(prompt_tokens=100, completion_tokens=340, reasoning_tokens=300),
    ),
    "gemini, reasoning in the total alone": ({"total_tokens": 440}, Usage(prompt_tokens=100, completion_tokens=340, reasoning_tokens=300)),
    "a total that is too small": ({"total_tokens": 100}, Usage(prompt_tokens=100, completion_tokens=40)),
    "a total that fits neither way": (
        {"total_tokens": 440, "completion_tokens_details": {"reasoning_tokens": 30}},
        Usage(prompt_tokens=100, completion_tokens=40, reasoning_tokens=30),
    ),
    "all is reasoning": (
        {"completion_tokens_details": {"reasoning_tokens": 40}},
        Usage(prompt_tokens=100, completion_tokens=40, reasoning_tokens=40),
    ),
    "unknown members": ({"queue_time": 0.01, "num_sources_used": 0, "cost": -1e9}, Usage(prompt_tokens=100, completion_tokens=40)),
    "the most that is believed": ({"prompt_tokens": 2000, "completion_tokens": 500}, Usage(prompt_tokens=2000, completion_tokens=500)),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_led_11_counts_of_every_family_are_read(shape: str) -> None:
    members, usage = SHAPES[shape]
    assert told(**members) == usage


HOSTILE: dict[str, dict[str, Any]] = {
    "negative prompt": {"prompt_tokens": -5},
    "negative completion": {"completion_tokens": -7},
    "negative cache": {"prompt_tokens_details": {"cached_tokens": -1}},
    "huge prompt": {"prompt_tokens": 2001},
    "huge completion": {"completion_tokens": 501},
    "beyond any integer": {"completion_tokens": 10**40},
    "infinite": {"completion_tokens": 1e308},
    "fraction": {"prompt_tokens": 5.5},
    "whole number as a float": {"prompt_tokens": 5.0},
    "text": {"completion_tokens": "40"},
    "boolean": {"completion_tokens": True},
    "list": {"prompt_tokens": [100]},
    "null": {"prompt_tokens": None},
    "completion null": {"completion_tokens": None},
    "more cached than there is": {"prompt_tokens_details": {"cached_tokens": 101}},
    "more cached and written than there is": {"prompt_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 41}},
    "more reasoning than completion": {"completion_tokens_details": {"reasoning_tokens": 41}},
    "reasoning beside completion, over the limit": {"total_tokens": 601, "completion_tokens_details": {"reasoning_tokens": 461}},
    "reasoning in the total alone, over the limit": {"total_tokens": 601},
    "details of another type": {"prompt_tokens_details": 7},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_led_11_what_cannot_be_is_refused(kind: str) -> None:
    assert told(**HOSTILE[kind]) is None


def test_led_11_nan_is_refused() -> None:
    assert read(b'{"prompt_tokens":NaN,"completion_tokens":1}', *LIMITS, images=0) is None


numbers = st.one_of(st.integers(-(2**70), 2**70), st.integers(-3, 3000), st.floats(), st.text(max_size=3), st.none(), st.booleans())
details = st.dictionaries(st.sampled_from(["cached_tokens", "cache_write_tokens", "audio_tokens", "reasoning_tokens"]), numbers)
NAMES = ("prompt_tokens", "completion_tokens", "total_tokens", "prompt_cache_hit_tokens", "cached_tokens", "cache_read_input_tokens",
         "cache_creation_input_tokens")  # fmt: skip


@given(
    st.dictionaries(st.sampled_from(NAMES), numbers),
    st.dictionaries(st.sampled_from(["prompt_tokens_details", "completion_tokens_details"]), details | numbers),
)
def test_inp_12_whatever_is_reported_comes_out_within_the_limits_or_not_at_all(counts: dict[str, Any], parts: dict[str, Any]) -> None:
    usage = read(json.dumps(counts | parts).encode(), *LIMITS, images=2)
    if usage is not None:
        assert 0 <= usage.cached_tokens + usage.cache_write_tokens <= usage.prompt_tokens <= LIMITS[0]
        assert 0 <= usage.reasoning_tokens <= usage.completion_tokens <= LIMITS[1]
        assert min(usage.cached_tokens, usage.cache_write_tokens, usage.audio_tokens) >= 0
        assert usage.images == 2 and not usage.estimated


@pytest.mark.parametrize(("prompt_bytes", "prompt_tokens"), [(0, 0), (1, 1), (4, 1), (5, 2), (8000, 2000), (8001, 2000)])
def test_an_estimate_is_four_bytes_a_token_rounded_up_and_marked(prompt_bytes: int, prompt_tokens: int) -> None:
    usage = estimate(*LIMITS, prompt_text_bytes=prompt_bytes, completion_tokens=501, images=1)
    assert usage == Usage(prompt_tokens=prompt_tokens, completion_tokens=500, images=1, estimated=True)
