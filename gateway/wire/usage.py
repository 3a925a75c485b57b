"""Usage as providers report it, read with suspicion; and the estimate where they do not, or not believably.

Explicit zero is zero; absent is an estimate marked as one; negative, fractional, of the wrong type or beyond what the
model can hold is refused and estimated. Sources: OpenAI, DeepSeek, Anthropic and Gemini (compatible), xAI, Moonshot usage
objects, read 2026-11.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from gateway.domain.usage import Usage

BYTES_PER_TOKEN = 4

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**40)]


class Limits(msgspec.Struct, frozen=True):
    """The most that is believed of one answer, in tokens."""

    prompt_tokens: int
    completion_tokens: int


class _PromptDetails(msgspec.Struct, frozen=True, gc=False):
    cached_tokens: _Count | None = None
    cache_write_tokens: _Count | None = None
    cache_creation_tokens: _Count | None = None
    audio_tokens: _Count | None = None


class _CompletionDetails(msgspec.Struct, frozen=True, gc=False):
    reasoning_tokens: _Count | None = None


class _Reported(msgspec.Struct, frozen=True, gc=False):
    prompt_tokens: _Count
    completion_tokens: _Count
    total_tokens: _Count | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None
    prompt_cache_hit_tokens: _Count | None = None  # DeepSeek
    cached_tokens: _Count | None = None  # Moonshot
    cache_read_input_tokens: _Count | None = None  # Anthropic
    cache_creation_input_tokens: _Count | None = None


_decoder = msgspec.json.Decoder(_Reported, strict=True)


def read(reported: bytes | None, limits: Limits, *, images: int) -> Usage | None:
    """The provider's own count; None when there is none to believe."""
    if reported is None:
        return None
    try:
        told = _decoder.decode(reported)
    except msgspec.DecodeError:
        return None
    completion = told.completion_tokens
    reasoning = cached = written = audio = 0
    if (said := told.completion_tokens_details) is not None and said.reasoning_tokens:
        reasoning = said.reasoning_tokens
    beside = (told.total_tokens or 0) - told.prompt_tokens - completion
    if beside > 0 and reasoning in (0, beside):
        # xAI and some others count reasoning beside completion; Gemini's compatible endpoint tells of it in the total alone.
        completion, reasoning = completion + beside, beside
    if (prompt := told.prompt_tokens_details) is not None:
        cached = prompt.cached_tokens or 0
        written = prompt.cache_write_tokens or prompt.cache_creation_tokens or 0
        audio = prompt.audio_tokens or 0
    cached = cached or told.prompt_cache_hit_tokens or told.cached_tokens or told.cache_read_input_tokens or 0
    written = written or told.cache_creation_input_tokens or 0
    if told.prompt_tokens > limits.prompt_tokens or completion > limits.completion_tokens:
        return None
    if cached + written > told.prompt_tokens or reasoning > completion:
        return None
    return Usage(
        prompt_tokens=told.prompt_tokens,
        completion_tokens=completion,
        cached_tokens=cached,
        cache_write_tokens=written,
        reasoning_tokens=reasoning,
        audio_tokens=audio,
        images=images,
    )


def estimate(*, prompt_text_bytes: int, completion_tokens: int, images: int, limits: Limits) -> Usage:
    """Our own count: four bytes of prompt text a token, rounded up; the caller counted the rest."""
    return Usage(
        prompt_tokens=min(-(-prompt_text_bytes // BYTES_PER_TOKEN), limits.prompt_tokens),
        completion_tokens=min(completion_tokens, limits.completion_tokens),
        images=images,
        estimated=True,
    )
