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


def read(reported: bytes | None, prompt_tokens_max: int, completion_tokens_max: int, *, images: int) -> Usage | None:
    """The provider's own count; None when there is none, or none to believe: more than the most that can be."""
    if reported is None:
        return None
    try:
        told = _decoder.decode(reported)
    except (msgspec.DecodeError, RecursionError):
        return None
    prompt, completion = told.prompt_tokens, told.completion_tokens
    reasoning = cached = written = audio = 0
    if (made := told.completion_tokens_details) is not None and made.reasoning_tokens:
        reasoning = made.reasoning_tokens
    beside = (told.total_tokens or 0) - prompt - completion
    if beside > 0 and reasoning in (0, beside):
        # xAI and some others count reasoning beside completion; Gemini's compatible endpoint tells of it in the total alone.
        completion, reasoning = completion + beside, beside
    if (details := told.prompt_tokens_details) is not None:
        cached = details.cached_tokens or 0
        written = details.cache_write_tokens or details.cache_creation_tokens or 0
        audio = details.audio_tokens or 0

    cached = cached or told.prompt_cache_hit_tokens or told.cached_tokens or told.cache_read_input_tokens or 0
    written = written or told.cache_creation_input_tokens or 0
    if prompt > prompt_tokens_max or completion > completion_tokens_max or cached + written > prompt or reasoning > completion:
        return None
    return Usage(prompt, completion, cached, written, reasoning, audio, images)


def completion_told(reported: bytes | None) -> int:
    """The completion tokens of a count, reasoning aside, however many they are; 0 where there is none to read."""
    if reported is None:
        return 0
    try:
        told = _decoder.decode(reported)
    except (msgspec.DecodeError, RecursionError):
        return 0
    details = told.completion_tokens_details
    return max(0, told.completion_tokens - ((details.reasoning_tokens or 0) if details is not None else 0))


def estimate(prompt_tokens_max: int, completion_tokens_max: int, *, prompt_text_bytes: int, completion_tokens: int, images: int) -> Usage:
    """Our own count: four bytes of prompt text a token, rounded up; the caller counted the rest."""
    return Usage(
        prompt_tokens=min(-(-prompt_text_bytes // BYTES_PER_TOKEN), prompt_tokens_max),
        completion_tokens=min(completion_tokens, completion_tokens_max),
        images=images,
        estimated=True,
    )
