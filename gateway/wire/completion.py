"""What events of a stream and whole answers have in common: how their members are read and put into the contract's form."""

from __future__ import annotations

import re

import msgspec
from msgspec import Raw

# Values of `error` that providers send when there is none.
NO_ERROR = frozenset((b"", b"null", b"false", b"{}", b'""', b"[]"))

_FINISH_REASONS = {
    word: reason
    for reason, words in {
        "stop": "stop end_turn stop_sequence eos",
        "length": "length max_tokens model_length model_context_window_exceeded",
        "tool_calls": "tool_calls tool_use function_call",
        "content_filter": "content_filter safety refusal sensitive recitation blocklist prohibited_content spii image_safety",
        # The provider gave up: DeepSeek, vLLM, Z.ai, Gemini. As "stop" a caller would take half an answer for all of it.
        "error": "error insufficient_system_resource abort aborted network_error malformed_function_call function_call_filter",
    }.items()
    for word in words.split()
}


def normal_finish(native: str | None) -> str | None:
    """The contract's word for a provider's finish reason; Gemini's compatible endpoint puts details behind a colon."""
    return _FINISH_REASONS.get(native.lower().partition(":")[0], "stop") if native else None


# Optional members of a delta or message that strict clients refuse as null.
_NOT_NULL = frozenset("role tool_calls function_call reasoning_details images annotations audio".split())

_choices_decoder = msgspec.json.Decoder(list[dict[str, Raw]])
_fields_decoder = msgspec.json.Decoder(dict[str, Raw])
_finish_decoder = msgspec.json.Decoder(str | None)
_json_decoder = msgspec.json.Decoder(Raw)
_id_decoder = msgspec.json.Decoder(str | int | None)


class CallNumbers:
    """Numbers for the tool calls of one stream whose provider writes none: each call that brings an id or a name is a new one."""

    __slots__ = ("_count",)

    def __init__(self) -> None:
        self._count = 0

    def __bool__(self) -> bool:
        return self._count > 0

    def numbered(self, call: dict[str, Raw]) -> dict[str, object]:
        if "index" in call:
            return {**call}
        function = _fields_decoder.decode(call["function"]) if len(call.get("function", b"")) > 4 else {}
        if not self._count or any(len(raw) > 2 for raw in (call.get("id", b""), function.get("name", b""))):  # longer than ""
            self._count += 1
        return {"index": self._count - 1, **call}


def normalised_choices(raw: Raw, numbers: CallNumbers | None = None) -> list[dict[str, object]]:
    """Choices by the contract: `index` and `finish_reason` present, the latter of its vocabulary, the provider's own word
    in `native_finish_reason`, and no null in a delta or message where strict clients refuse one. With `numbers` the pieces
    of a stream's tool calls have an index, and a stream that had to be given them ends in "tool_calls". Raises DecodeError.
    """
    return [_normalised(choice, index, numbers) for index, choice in enumerate(_choices_decoder.decode(raw))]


def _normalised(choice: dict[str, Raw], index: int, numbers: CallNumbers | None) -> dict[str, object]:
    out: dict[str, object] = {"index": index, **choice}
    for name in ("delta", "message"):
        if len(choice.get(name, b"")) > 4:  # longer than null
            said = _fields_decoder.decode(choice[name])
            kept: dict[str, object] = {key: raw for key, raw in said.items() if key not in _NOT_NULL or bytes(raw) != b"null"}
            if numbers is not None and "tool_calls" in kept:
                kept["tool_calls"] = [numbers.numbered(call) for call in _choices_decoder.decode(said["tool_calls"])]
            if name == "message" and "role" not in kept:
                kept = {"role": "assistant", **kept}
            out[name] = kept
    raw = choice.get("finish_reason")
    native = _finish_decoder.decode(raw) if raw is not None else None
    finish = normal_finish(native)
    # Gemini's compatible endpoint ends a stream of tool calls with "stop" (googleapis/python-genai#2868): agents would end there.
    out["finish_reason"] = "tool_calls" if numbers and finish == "stop" else finish
    if "native_finish_reason" not in choice:
        out["native_finish_reason"] = native or None
    return out


def is_json(data: bytes) -> bool:
    try:
        _json_decoder.decode(data)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def is_filled_object(raw: Raw | bytes) -> bool:
    """Whether a member such as `usage` says something."""
    return len(raw) > 4 and bytes(raw).startswith(b"{")


def id_of(raw: Raw) -> str:
    """The provider's id; "" when it has none worth the name."""
    try:
        return str(_id_decoder.decode(raw) or "")
    except msgspec.DecodeError:
        return ""


def missing_members(fields: dict[str, Raw], kind: bytes, generation_id: str) -> list[bytes]:
    """`object` and `created`, which strict clients require, where the provider wrote none that will do; what it wrote is taken out of
    `fields`. `kind` is the object as JSON; the second is the one that our id names.
    """
    missing = []
    if bytes(fields.get("object", b"")) not in (kind, b'"text_completion"'):
        fields.pop("object", None)
        missing.append(b'"object":' + kind)
    if not bytes(fields.get("created", b"")).isdigit():
        fields.pop("created", None)
        second = generation_id.split("-")[1] if "-" in generation_id else ""
        missing.append(b'"created":' + (second.encode() if second.isdigit() else b"0"))
    return missing


def error_of(data: bytes) -> bytes:
    """What an event tells that is named an error: its `error` member, or all of it, or its plain text. As JSON."""
    try:
        told = bytes(_fields_decoder.decode(data).get("error", b""))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return msgspec.json.encode(data.decode("utf-8", "replace"))
    return data if told in NO_ERROR else told


def is_bare_error(data: bytes) -> bool:
    """Whether an object without choices is an error in itself: older vLLM's `{"object": "error", "message": ...}`."""
    fields = _fields_decoder.decode(data)
    return b'"error"' in (bytes(fields.get("object", b"")), bytes(fields.get("type", b"")))


# The decoder refuses half a surrogate pair, which is what an emoji that a provider cut in two leaves in either event.

_SURROGATE = re.compile(rb"\\u([dD][89a-fA-F][0-9a-fA-F]{2})")
_VEILED = re.compile(rb"\\u0000([dD][89a-fA-F][0-9a-fA-F]{2})")


def veil(data: bytes) -> bytes | None:
    """JSON with its escaped surrogates as ordinary text; None: it has none, or they could not be told apart afterwards."""
    veiled = _SURROGATE.sub(rb"\\u0000\1", data)
    return None if veiled == data or b"\\u0000" in data else veiled


def unveil(data: bytes) -> bytes:
    """The surrogates brought back."""
    return _VEILED.sub(rb"\\u\1", data)


def with_native_finish(rest: bytes, finish: str) -> bytes:
    """An event's end with the provider's word beside the contract's; b"" where they differ or it is not plain to see where."""
    if normal_finish(finish) == finish and b'"native_finish_reason"' not in rest:
        for colon in (b":", b": "):
            member = b'"finish_reason"%b"%b"' % (colon, finish.encode())
            if rest.count(member) == 1:
                return rest.replace(member, b'%b,"native_finish_reason":"%b"' % (member, finish.encode()))
    return b""


# Optional members of a chunk that strict clients refuse as null: absent, or with a value.
_NOT_NULL_IN_CHUNKS = frozenset(("usage", "system_fingerprint", "error"))


def is_left_out(name: str, raw: Raw) -> bool:
    if name not in _NOT_NULL_IN_CHUNKS:
        return False
    return name in ("usage", "error") or bytes(raw) == b"null"
