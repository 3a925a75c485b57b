"""Usage: tokens counted, by the provider or, where it did not count, by us."""

from __future__ import annotations

import msgspec


class Usage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Tokens of one answer. Reasoning is inside completion, cached and cache-written tokens are inside prompt.

    Records keep it by place (see `domain.generation`): members are only ever added, and at the end.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    audio_tokens: int = 0  # of the prompt
    images: int = 0  # of the prompt
    searches: int = 0
    estimated: bool = False  # counted by us: the provider did not say, or not believably
