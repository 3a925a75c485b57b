"""The members of a streamed event that we act on, all else being skipped, not built; and the event of our own that ends a broken stream.

Source: OpenAI and OpenRouter chunk shapes, read 2026-11.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, Raw, UnsetType


class Call(msgspec.Struct, frozen=True, gc=False):
    """A piece of a tool call; without an index it is Gemini's, which writes none."""

    index: Raw | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True, gc=False):
    """What an event adds. Reasoning and tool calls are content: tokens were made."""

    role: str | UnsetType | None = UNSET
    content: str | list[Raw] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    reasoning_details: list[Raw] | UnsetType | None = UNSET
    refusal: str | None = None
    tool_calls: list[Call] | UnsetType | None = UNSET
    function_call: Raw = Raw()
    images: list[Raw] | None = None
    audio: Raw = Raw()

    def adds(self) -> bool:
        return bool(
            self.content
            or self.reasoning
            or self.reasoning_content
            or self.tool_calls
            or self.reasoning_details
            or self.refusal
            or self.images
            or len(self.function_call) > 4  # longer than null
            or len(self.audio) > 4
        )


class ChunkChoice(msgspec.Struct, frozen=True, gc=False):
    index: int | UnsetType = UNSET
    delta: Delta | None = None
    text: str | None = None  # legacy completions
    finish_reason: str | UnsetType | None = UNSET
    error: Raw | UnsetType = UNSET


class Chunk(msgspec.Struct, frozen=True, gc=False):
    id: Raw = Raw()
    model: Raw = Raw()
    choices: list[ChunkChoice] | None = None
    usage: Raw | UnsetType = UNSET
    error: Raw | UnsetType = UNSET
    provider: Raw | UnsetType = UNSET
    system_fingerprint: Raw | UnsetType = UNSET


_encode = msgspec.json.Encoder().encode


def error_event(body: dict[str, object], generation_id: str, model: str, provider: str, created_s: int, kind: str) -> bytes:
    """The one in-band event that ends a broken stream. `body` is the error object with an integer `code`."""
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error", "native_finish_reason": "error"}
    if kind == "text":
        choice = {"index": 0, "text": "", "finish_reason": "error", "native_finish_reason": "error"}
    event = {
        "id": generation_id,
        "provider": provider,
        "model": model,
        "object": "chat.completion.chunk" if kind == "chat" else "text_completion",
        "created": created_s,
        "error": body,
        "choices": [choice],
    }
    return b"data: " + _encode(event) + b"\n\n"
