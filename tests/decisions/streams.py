"""What streams are by the book: a parser of server-sent events after the WHATWG grammar, and what the gateway may change.

Written for clarity, from the specifications alone, to be compared with the code that has to be fast.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from gateway.wire.cutter import BYTE_ORDER_MARK, EventCutter
from gateway.wire.shape import Shape
from gateway.wire.sse import Splicer

GENERATION = "gen-1764031697-aB3dE5fG7hJ9kL1mN2pQ"
MODEL = "acme/sage-1"
PROVIDER = "North"


class Event(NamedTuple):
    """One dispatched event. `id` is what this event itself set."""

    type: str
    id: str | None
    data: str


def parsed(stream: bytes) -> list[Event]:
    """The events of a whole stream (WHATWG, "interpreting an event stream"); an event without its empty line is discarded."""
    text = stream.decode("utf-8", "replace").removeprefix("\ufeff")
    events: list[Event] = []
    kind, own_id, data = "", None, ""
    for line in re.split("\r\n|\n|\r", text)[:-1]:
        if not line:
            if data:
                events.append(Event(kind or "message", own_id, data.removesuffix("\n")))
            kind, own_id, data = "", None, ""
        elif not line.startswith(":"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                kind = value
            elif field == "data":
                data += value + "\n"
            elif field == "id" and "\0" not in value:
                own_id = value
    return events


class Outcome(NamedTuple):
    """What a stream comes to: the events for the caller with their data decoded, and the account of them."""

    events: list[tuple[str, str | None, Any]]
    content_events: int
    finish_reason: str | None
    usage: Any
    error: Any
    done: bool
    dropped: int


def by_the_book(stream: bytes) -> Outcome:
    """What must become of a provider's stream."""
    events: list[tuple[str, str | None, Any]] = []
    content_events = dropped = 0
    finish_reason, usage, error, done = None, None, None, False
    calls: list[Any] = []  # of a provider that does not number them
    kind = ""
    for event in parsed(stream):
        if event.data.strip() == "[DONE]":
            done = True
            break
        try:
            chunk = json.loads(event.data, parse_constant=_refused)
            if "\ufffd" in event.data or not isinstance(chunk, dict):  # bytes that were not UTF-8
                raise ValueError
        except ValueError:
            dropped += 1
            continue
        if chunk.get("error"):
            error = chunk["error"]
            break
        kind = kind or ("text_completion" if '"text":' in event.data and '"delta"' not in event.data else "chat.completion.chunk")
        choices = chunk.get("choices") or []
        content_events += any(_adds(choice) for choice in choices)
        finish_reason = next((choice["finish_reason"] for choice in choices if choice.get("finish_reason")), finish_reason)
        if isinstance(chunk.get("usage"), dict) and chunk["usage"]:
            usage = chunk["usage"]
            if not choices:
                continue  # told once, at the end, with what it costs
        spoilt = next((choice["finish_reason"] for choice in choices if _finish(choice.get("finish_reason")) == "error"), None)
        if spoilt is not None:
            error = {"message": f"finish_reason: {spoilt}"}
            break
        events.append((event.type, event.id, rewritten(chunk, calls, kind)))
    return Outcome(events, content_events, finish_reason, usage, error, done, dropped)


def _refused(constant: str) -> None:
    raise ValueError(constant)


def _adds(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    names = "content reasoning reasoning_content reasoning_details refusal tool_calls function_call images audio".split()
    return bool(choice.get("text") or any(delta.get(name) for name in names))


NOT_NULL_IN_DELTA = frozenset("role tool_calls function_call reasoning_details images annotations audio".split())
FINISH_REASONS = {"end_turn": "stop", "eos": "stop", "max_tokens": "length", "tool_use": "tool_calls", "safety": "content_filter"}
FINISH_REASONS |= {"model_length": "length", "function_call_filter": "error", "abort": "error"}
FINISH_REASONS |= {name: name for name in ("stop", "length", "tool_calls", "content_filter", "error")}


def rewritten(chunk: dict[str, Any], calls: list[Any], kind: str) -> dict[str, Any]:
    """The documented changes, and no others."""
    out = {**chunk, "id": GENERATION, "model": MODEL, "provider": PROVIDER}
    if out.get("object") not in (kind, "text_completion"):
        out["object"] = kind
    if type(out.get("created")) is not int or out["created"] < 0:
        out["created"] = int(GENERATION.split("-")[1])
    out["choices"] = chunk.get("choices") or []
    out.pop("usage", None)
    out.pop("error", None)
    if out.get("system_fingerprint", "") is None:
        del out["system_fingerprint"]
    if any(_is_changed(choice) for choice in chunk.get("choices") or ()):
        out["choices"] = [_choice(choice, index, calls) for index, choice in enumerate(chunk["choices"])]
    return out


def _is_changed(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    nulls = any(delta.get(name, 0) is None for name in ("role", "tool_calls", "reasoning_details"))
    unnumbered = any("index" not in call for call in delta.get("tool_calls") or ())
    return nulls or unnumbered or "index" not in choice or choice.get("finish_reason", "") is not None


def _finish(native: str | None) -> str | None:
    return FINISH_REASONS.get(native.lower().split(":")[0], "stop") if native else None


def _choice(choice: dict[str, Any], index: int, calls: list[Any]) -> dict[str, Any]:
    out = {"index": index, **choice}
    native = choice.get("finish_reason") or None
    out["finish_reason"] = _finish(native)
    out.setdefault("native_finish_reason", native)
    if choice.get("delta"):
        out["delta"] = {name: value for name, value in choice["delta"].items() if value is not None or name not in NOT_NULL_IN_DELTA}
        if out["delta"].get("tool_calls"):
            out["delta"]["tool_calls"] = [_call(call, calls) for call in out["delta"]["tool_calls"]]
    if calls and out["finish_reason"] == "stop":
        out["finish_reason"] = "tool_calls"
    return out


def _call(call: dict[str, Any], calls: list[Any]) -> dict[str, Any]:
    if "index" in call:
        return call
    if not calls or call.get("id") or call.get("function", {}).get("name"):
        calls.append(call)
    return {"index": len(calls) - 1, **call}


def spliced(pieces: Iterable[bytes], *, model: str = MODEL, provider: str = PROVIDER) -> tuple[bytes, Splicer]:
    """The bytes for the caller, and the splicer with its account: the same whatever the endpoint's earlier streams have shown."""
    pieces = list(pieces)
    fresh = Shape()
    first, *later = [_spliced(pieces, Splicer(GENERATION, model, provider, shape)) for shape in (fresh, fresh, SEEN_ALL)]
    chunks = re.split(rb"(?<=\n\n)", b"".join(pieces))
    for count in (1, 2):  # events in a chunk
        coarser = [b"".join(chunks[at : at + count]) for at in range(0, len(chunks), count)]
        later.append(_spliced_at_once(coarser, Splicer(GENERATION, model, provider, fresh)))
    for again in later:
        assert again[0] == first[0] and account(again[1]) == account(first[1])
    return first


SEEN_ALL = Shape()  # of an endpoint that writes like all providers at once


def _spliced(pieces: list[bytes], splicer: Splicer) -> tuple[bytes, Splicer]:
    cutter = EventCutter(1 << 20)
    return b"".join([splicer.splice(block) for piece in pieces if (block := cutter.feed(piece))]), splicer


def _spliced_at_once(chunks: list[bytes], splicer: Splicer) -> tuple[bytes, Splicer]:
    """As the chunks of a whole answer; from the first on that is not one event they go through the cutter."""
    sent, taken = splicer.splice_pieces(chunks) if not chunks[0].startswith(BYTE_ORDER_MARK) else (b"", 0)
    rest, _ = _spliced([b"".join(chunks[taken:])], splicer)
    return sent + rest, splicer


def account(splicer: Splicer) -> tuple[object, ...]:
    return (
        splicer.content_events, splicer.finish_reason, splicer.usage, splicer.error, splicer.done, splicer.dropped, splicer.upstream_id,
        splicer.final_event(b'{"total_tokens":1}'),
    )  # fmt: skip


def outcome(sent: bytes, splicer: Splicer) -> Outcome:
    return Outcome(
        [(event.type, event.id, json.loads(event.data)) for event in parsed(sent)],
        splicer.content_events,
        splicer.finish_reason,
        None if splicer.usage is None else json.loads(splicer.usage),
        None if splicer.error is None else json.loads(splicer.error),
        splicer.done,
        splicer.dropped,
    )


def byte_by_byte(data: bytes) -> Iterator[bytes]:
    return (data[i : i + 1] for i in range(len(data)))
