"""Minimal reading of a request body: what we must know of it, and the bytes to send on.

Only the top level is split (`dict[str, Raw]`), the fields we act on are decoded and checked, everything else stays as
the caller's bytes. Unknown fields pass on, except those that belong to the gateway or would steer a provider.
Source: OpenRouter chat and completion request fields, read 2026-11.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec

from gateway.domain.errors import BadRequest

NESTING_MAX = 128

Kind = Literal["chat", "text"]

# Ours to act on, never a provider's to see.
_GATEWAY_FIELDS = frozenset(
    "model models provider route plugins transforms preset usage session_id trace debug cache_control_ttl max_tool_calls "
    "stop_server_tools_when image_config include_reasoning".split()
)
# A provider that is itself a gateway would obey these: a caller must not steer where our credentials go.
_STEERING_FIELDS = frozenset(
    "api_base base_url api_key api_version api_type extra_headers extra_body extra_query headers organization "
    "custom_llm_provider custom_host deployment_id azure_endpoint vertex_credentials vertex_project aws_access_key_id "
    "aws_secret_access_key litellm_params user_config mock_response fallbacks".split()
)
_DROPPED = _GATEWAY_FIELDS | _STEERING_FIELDS | {"stream", "stream_options"}

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Tokens = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


def _number(low: float, high: float) -> Any:
    return Annotated[float, msgspec.Meta(ge=low, le=high)] | None


_CHECKED: dict[str, Any] = {
    "model": _Name | None,
    "models": Annotated[list[_Name], msgspec.Meta(max_length=32)] | None,
    "stream": bool | None,
    "stream_options": dict[str, msgspec.Raw] | None,
    "max_tokens": _Tokens | None,
    "max_completion_tokens": _Tokens | None,
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None,
    "min_p": _number(0, 1),
    "top_a": _number(0, 1),
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
    "repetition_penalty": _number(0, 2),
    "seed": Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None,
    "n": Annotated[int, msgspec.Meta(ge=1, le=1)] | None,
    "stop": Annotated[str, msgspec.Meta(max_length=65536)] | Annotated[list[str], msgspec.Meta(max_length=16)] | None,
    "logprobs": bool | Annotated[int, msgspec.Meta(ge=0, le=20)] | None,
    "top_logprobs": Annotated[int, msgspec.Meta(ge=0, le=20)] | None,
    "logit_bias": Annotated[dict[str, Annotated[float, msgspec.Meta(ge=-100, le=100)]], msgspec.Meta(max_length=4096)] | None,
    "tools": list[dict[str, msgspec.Raw]] | None,
    "tool_choice": str | dict[str, msgspec.Raw] | None,
    "parallel_tool_calls": bool | None,
    "response_format": dict[str, msgspec.Raw] | None,
    "reasoning": dict[str, msgspec.Raw] | None,
    "user": Annotated[str, msgspec.Meta(max_length=1024)] | None,
    "session_id": Annotated[str, msgspec.Meta(max_length=256)] | None,
    "metadata": dict[str, str] | None,
    "provider": dict[str, msgspec.Raw] | None,
    "route": Literal["fallback", "sort"] | None,
    "plugins": list[dict[str, msgspec.Raw]] | None,
    "transforms": list[str] | None,
    "usage": dict[str, msgspec.Raw] | None,
}


class Part(msgspec.Struct, frozen=True):
    """One part of a message's content. Data URLs count as media, never as text."""

    type: str
    text: str | None = None


class Message(msgspec.Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None


_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_checks: dict[str, Callable[[msgspec.Raw], Any]] = {name: msgspec.json.Decoder(kind).decode for name, kind in _CHECKED.items()}
_messages_decoder = msgspec.json.Decoder(Annotated[list[Message], msgspec.Meta(min_length=1)])
_prompt_decoder = msgspec.json.Decoder(str | list[str | int | list[int]])
_string_encoder = msgspec.json.Encoder()


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """What we know of one chat or completion request."""

    kind: Kind
    model: str
    models: tuple[str, ...] = ()  # fallbacks after `model`, in order, without it
    stream: bool = False
    max_tokens: int | None = None  # tokens; None: the endpoint's own ceiling counts
    prompt_text_bytes: int = 0
    reasoning: bool = False  # the caller asked for reasoning
    tail: bytes = b""  # the body after `{"model":"...",` that every attempt shares

    def body_for(self, upstream_model: str) -> bytes:
        """The request body for a provider, `model` in its own words."""
        return b'{"model":' + _string_encoder.encode(upstream_model) + self.tail


def parse(body: bytes, kind: Kind) -> Envelope:
    """Read a request body. Raises BadRequest, naming the field and what it must be, never echoing it."""
    fields = _split(body)
    known = {name: _checked(name, raw) for name, raw in fields.items() if name in _checks}
    names = [name for name in (known.get("model"), *(known.get("models") or ())) if name]
    if not names:
        raise BadRequest("model is required: a string such as author/name")
    stream = bool(known.get("stream"))
    max_tokens = known.get("max_completion_tokens") or known.get("max_tokens")
    return Envelope(
        kind=kind,
        model=names[0],
        models=tuple(dict.fromkeys(name for name in names[1:] if name != names[0])),
        stream=stream,
        max_tokens=max_tokens,
        prompt_text_bytes=_prompt_text_bytes(fields, kind),
        reasoning="reasoning" in fields or "reasoning_effort" in fields,
        tail=_tail(fields, known, stream),
    )


def _split(body: bytes) -> dict[str, msgspec.Raw]:
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError:
            raise BadRequest("the body is not valid UTF-8") from None
    if body.count(b"{") + body.count(b"[") > NESTING_MAX and _nesting_exceeds(body, NESTING_MAX):
        raise BadRequest(f"the body is nested deeper than {NESTING_MAX} levels")
    try:
        fields = _fields_decoder.decode(body)
    except msgspec.ValidationError:
        raise BadRequest("the body must be a JSON object") from None
    except (msgspec.DecodeError, RecursionError):
        raise BadRequest("the body is not valid JSON") from None
    if _may_repeat_key(body, fields) and _repeats_key(body, fields):
        raise BadRequest("the body repeats a top-level key")
    return fields


def _checked(name: str, raw: msgspec.Raw) -> Any:
    try:
        return _checks[name](raw)
    except msgspec.ValidationError as error:
        # msgspec names types, limits and the path, never the value.
        raise BadRequest(f"{name}: {error}") from None
    except (msgspec.DecodeError, RecursionError):
        raise BadRequest(f"{name}: not valid JSON") from None


def _tail(fields: dict[str, msgspec.Raw], known: dict[str, Any], stream: bool) -> bytes:
    parts = [b""]
    for name, raw in fields.items():
        if name not in _DROPPED:
            parts.append(_string_encoder.encode(name) + b":" + bytes(raw))
    if stream:
        options = {**(known.get("stream_options") or {}), "include_usage": True}
        parts.append(b'"stream":true,"stream_options":' + msgspec.json.encode(options))
    return b",".join(parts) + b"}"


def _prompt_text_bytes(fields: dict[str, msgspec.Raw], kind: Kind) -> int:
    """Bytes of text in the prompt. Raises BadRequest when there is none to speak of."""
    name = "messages" if kind == "chat" and "messages" in fields else "prompt"
    raw = fields.get(name)
    if raw is None:
        raise BadRequest("messages is required: a list of at least one message" if kind == "chat" else "prompt is required")
    try:
        if name == "messages":
            return sum(_text_bytes(message.content) for message in _messages_decoder.decode(raw))
        prompt = _prompt_decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{name}: {error}") from None
    except (msgspec.DecodeError, RecursionError):
        raise BadRequest(f"{name}: not valid JSON") from None
    return _text_bytes(prompt) if isinstance(prompt, str) else len(raw)


def _text_bytes(content: str | list[Part] | None) -> int:
    if content is None:
        return 0
    if isinstance(content, str):
        return len(content) if content.isascii() else len(content.encode())
    return sum(_text_bytes(part.text) for part in content if part.text)


# Duplicate keys: msgspec keeps the last one silently, a provider might keep the first; what was authorised must be what
# is sent. A compact body without repeats has exactly the length of its parts, which settles nearly all of them at once.


def _may_repeat_key(body: bytes, fields: dict[str, msgspec.Raw]) -> bool:
    length = 1 + len(fields) * 4 + sum(map(len, fields)) + sum(map(len, fields.values()))
    return length != len(body)


_KEY = re.compile(rb'[ \t\n\r]*"((?:[^"\\]|\\.)*)"[ \t\n\r]*:[ \t\n\r]*')
_COMMA = re.compile(rb"[ \t\n\r]*,")
_OPEN = re.compile(rb"[ \t\n\r]*\{")


def _repeats_key(body: bytes, fields: dict[str, msgspec.Raw]) -> bool:
    """Walk the top level; a key that was seen, or whose value is not the one kept, is a repeat."""
    seen: set[str] = set()
    opened = _OPEN.match(body)
    at = opened.end() if opened else 0
    while (key := _KEY.match(body, at)) is not None:
        name = msgspec.json.decode(b'"' + key[1] + b'"', type=str) if b"\\" in key[1] else key[1].decode()
        value = bytes(fields[name])
        if name in seen or not body.startswith(value, key.end()):
            return True
        seen.add(name)
        comma = _COMMA.match(body, key.end() + len(value))
        if comma is None:
            break
        at = comma.end()
    return len(seen) != len(fields)


_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


def _nesting_exceeds(body: bytes, limit: int) -> bool:
    """Whether brackets outside strings nest deeper than `limit`: each pass removes the innermost level."""
    brackets = _STRING.sub(b"", body).translate(None, _NOT_BRACKETS)
    for _ in range(limit):
        if not brackets:
            return False
        shorter = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if len(shorter) == len(brackets):
            return False  # unbalanced: the decoder will say so
        brackets = shorter
    return bool(brackets)
