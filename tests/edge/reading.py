"""A second reader of streams, written from the grammar and the contract alone: what a caller is to read of a provider's events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from gateway.domain.money import usd_number
from tests.edge.stage import RAW


def grammar(stream: bytes) -> list[bytes]:
    """Data of the events of a stream, by the letter of the WHATWG grammar."""
    text = stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    found: list[bytes] = []
    data: list[bytes] = []
    for line in text.split(b"\n"):
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                data.append(value.removeprefix(b" "))
        else:
            if any(data):
                found.append(b"\n".join(data))
            data = []
    return found


def objects(stream: bytes) -> Iterator[dict[str, Any]]:
    """The provider's objects up to its end, without members that are null where strict clients refuse one."""
    for data in grammar(stream):
        if data == b"[DONE]":
            return
        try:
            part = json.loads(data.decode())
        except ValueError:
            continue
        if isinstance(part, dict):
            yield {name: value for name, value in part.items() if value is not None or name not in ("usage", "error", "system_fingerprint")}


def expected(stream: bytes, generation: str) -> Iterator[dict[str, Any]]:
    """What a caller is to read: the provider's objects with the fields that are documented as rewritten, its last count in our words."""
    ours = {"id": generation, "model": RAW, "provider": "Raw"}
    missing = {"object": "chat.completion.chunk", "created": int(generation.split("-")[1])}
    counts = {"prompt_tokens": 2, "completion_tokens": 0}  # "Hello" at four bytes a token
    told: dict[str, int] = {}
    last: dict[str, Any] | None = None
    for part in objects(stream):
        usage = part.pop("usage", None)
        told = usage or told
        if usage and not part["choices"]:
            last = part
            continue
        if last is None:
            last = {name: part[name] for name in ("object", "created") if name in part}
        for choice in part["choices"]:
            if choice.get("finish_reason"):
                choice["native_finish_reason"] = choice["finish_reason"]
        deltas = [choice["delta"] for choice in part["choices"]]
        counts["completion_tokens"] += any(value for delta in deltas for name, value in delta.items() if name != "role")
        yield {**missing, **part, **ours}
    yield {**missing, **(last or {}), **ours, "choices": [], "usage": priced(**(told or counts))}


def priced(*, prompt_tokens: int, completion_tokens: int, total_tokens: int = 0) -> dict[str, Any]:
    """The contract's usage object at the harness's prices."""
    prompt, completion = prompt_tokens * 1000, completion_tokens * 2000
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "cost": usd_number(prompt + completion),
        "is_byok": False,
        "prompt_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
        "cost_details": {
            "upstream_inference_cost": None,
            "upstream_inference_prompt_cost": usd_number(prompt),
            "upstream_inference_completions_cost": usd_number(completion),
        },
    }
