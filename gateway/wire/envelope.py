"""Minimal reading of a request body: what we must know of it, and the bytes to send on.

Only the top level is split (`dict[str, Raw]`), the fields we act on are decoded and checked, everything else stays as
the caller's bytes. Unknown fields pass on, except those that belong to the gateway or would steer a provider.
Source: OpenRouter chat and completion request fields, read 2026-11.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import accumulate
from typing import Annotated, Any, Literal, get_args

import msgspec

from gateway.domain.errors import BadRequest

NESTING_MAX = 128
MEDIA_TOKENS_MAX = 4096  # held for an image, a sound or a file; providers count 85 to 3,000 for an image
MEMBERS_MAX = 1024  # at the top level: each costs time of its own, and no API has a tenth as many
_TOO_DEEP = f"the body is nested deeper than {NESTING_MAX} levels"

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
_PROMPTING = ("tools", "response_format")  # what a chat template writes out into the prompt
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
    "route": Annotated[str, msgspec.Meta(pattern=r"^(fallback|sort)\Z")] | None,
    "plugins": list[dict[str, msgspec.Raw]] | None,
    "transforms": list[str] | None,
    "usage": dict[str, msgspec.Raw] | None,
}


class Part(msgspec.Struct, frozen=True):
    """One part of a message's content. Data URLs count as media, never as text."""

    type: str
    text: str | None = None


Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class Message(msgspec.Struct, frozen=True):
    role: Role
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
    prompt_bytes_max: int = 0  # no tokenizer makes more tokens of the prompt than this
    messages: int = 0
    images: int = 0
    reasoning: bool = False  # the caller asked for reasoning
    user: str = ""  # the caller's own name for its end user
    session_id: str = ""
    shared: tuple[bytes | msgspec.Raw, ...] = ()  # the body after the model's name, in pieces: the same for every attempt

    def body_for(self, upstream_model: str) -> bytes:
        """The request body for a provider, `model` in its own words."""
        # Joined once: a 5 MiB image cost 6 ms in copies when the pieces were concatenated on the way.
        return b"".join((b'{"model":', _string_encoder.encode(upstream_model), *self.shared))


def parse(body: bytes, kind: Kind) -> Envelope:
    """Read a request body. Raises BadRequest, naming the field and what it must be, never echoing it."""
    fields = _split(body)
    known = {name: _checked(name, raw) for name, raw in fields.items() if name in _checks}
    names = [name for name in (known.get("model"), *(known.get("models") or ())) if name]
    if not names:
        raise BadRequest("model is required: a string such as author/name")
    stream = bool(known.get("stream"))
    limits = [known[name] for name in ("max_completion_tokens", "max_tokens") if known.get(name) is not None]
    prompt = _prompt(fields, kind)
    return Envelope(
        kind=kind,
        model=names[0],
        models=tuple(dict.fromkeys(name for name in names[1:] if name != names[0])),
        stream=stream,
        max_tokens=max(limits, default=None),  # both are sent, and a provider may know but one of them
        prompt_text_bytes=prompt.text_bytes,
        prompt_bytes_max=prompt.bytes_max + sum([len(fields[name]) for name in _PROMPTING if name in fields]),
        messages=prompt.messages,
        images=prompt.images,
        reasoning="reasoning" in fields or "reasoning_effort" in fields,
        user=known.get("user") or "",
        session_id=known.get("session_id") or "",
        shared=_shared(fields, known, stream),
    )


def _split(body: bytes) -> dict[str, msgspec.Raw]:
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError:
            raise BadRequest("the body is not valid UTF-8") from None
    try:
        fields = _fields_decoder.decode(body)
    except msgspec.ValidationError:
        raise BadRequest("the body must be a JSON object") from None
    except msgspec.DecodeError:
        raise BadRequest("the body is not valid JSON") from None
    except RecursionError:
        raise BadRequest(_TOO_DEEP) from None
    if len(fields) > MEMBERS_MAX:
        raise BadRequest(f"the body has more than {MEMBERS_MAX} top-level keys")
    if _may_nest_deeper(body) and _depth(body) > NESTING_MAX:
        raise BadRequest(_TOO_DEEP)
    if not _is_compact(body, fields) and not _is_spaced(body, fields) and _repeats_key(body, fields):
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


def _shared(fields: dict[str, msgspec.Raw], known: dict[str, Any], stream: bool) -> tuple[bytes | msgspec.Raw, ...]:
    pieces: list[bytes | msgspec.Raw] = []
    for name, raw in fields.items():
        if name not in _DROPPED:
            pieces += (b"," + _string_encoder.encode(name) + b":", raw)
    if stream:
        options = {**(known.get("stream_options") or {}), "include_usage": True}
        pieces.append(b',"stream":true,"stream_options":' + msgspec.json.encode(options))
    pieces.append(b"}")
    return tuple(pieces)


class _Prompt(msgspec.Struct, frozen=True):
    text_bytes: int
    bytes_max: int
    messages: int = 0
    images: int = 0


def _prompt(fields: dict[str, msgspec.Raw], kind: Kind) -> _Prompt:
    """What the prompt amounts to. Raises BadRequest when there is none to speak of."""
    name = "messages" if kind == "chat" and "messages" in fields else "prompt"
    raw = fields.get(name)
    if raw is None:
        raise BadRequest("messages is required: a list of at least one message" if kind == "chat" else "prompt is required")
    try:
        if name == "messages":
            messages = _messages_decoder.decode(raw)
            parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
            media = sum([part.type != "text" for part in parts])
            text_bytes = sum([_text_bytes(message.content) for message in messages])
            # Without media all of the JSON is text, names of tools and their arguments included.
            bytes_max = text_bytes + media * MEDIA_TOKENS_MAX if media else len(raw)
            return _Prompt(text_bytes, bytes_max, len(messages), sum([part.type == "image_url" for part in parts]))
        prompt = _prompt_decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{name}: {_without_value(error)}") from None
    except (msgspec.DecodeError, RecursionError):
        raise BadRequest(f"{name}: not valid JSON") from None
    return _Prompt(_text_bytes(prompt) if isinstance(prompt, str) else len(raw), len(raw))


def _without_value(error: msgspec.ValidationError) -> str:
    """msgspec's words; only of a wrong enum member, here a role, it repeats the value."""
    text = str(error)
    if not text.startswith("Invalid enum value"):
        return text
    return f"a role must be one of {', '.join(get_args(Role))} - at {text.rpartition(' - at ')[2]}"


def _text_bytes(content: str | list[Part] | None) -> int:
    if content is None:
        return 0
    if isinstance(content, str):
        return len(content) if content.isascii() else len(content.encode())
    return sum([_text_bytes(part.text) for part in content if part.text])


# Duplicate keys: msgspec keeps the last one silently, a provider might keep the first; what was authorised must be what
# is sent. The two ways in which programs write JSON are recognised at once; other bodies are walked.


def _is_compact(body: bytes, fields: dict[str, msgspec.Raw]) -> bool:
    """Whether the body has the length of its parts: no space between them, so no room for a part that was not kept."""
    return len(body) == 1 + len(fields) * 4 + sum(map(len, fields)) + sum(map(len, fields.values()))


def _is_spaced(body: bytes, fields: dict[str, msgspec.Raw]) -> bool:
    """Whether the body is what Python's `json.dumps` writes for these fields."""
    if len(body) > 65536 or body[1:2] != b'"':
        return False  # building it twice would cost more than the walk
    return body == b"{" + b", ".join([b'"%b": %b' % (name.encode(), raw) for name, raw in fields.items()]) + b"}"


_KEY = re.compile(rb'[ \t\n\r]*"([^"\\]*+(?:\\.[^"\\]*+)*+)"[ \t\n\r]*:[ \t\n\r]*')
_COMMA = re.compile(rb"[ \t\n\r]*,")
_OPEN = re.compile(rb"[ \t\n\r]*\{")
_CLOSE = re.compile(rb"[ \t\n\r]*\}[ \t\n\r]*")


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
        at = key.end() + len(value)
        comma = _COMMA.match(body, at)
        if comma is None:
            break
        at = comma.end()
    return _CLOSE.fullmatch(body, at) is None  # the walk lost its way: a value only began like the one kept


# Nesting: brackets within strings do not count. All of this is linear, and C code does the counting.

_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b'[]{}"')
_STEPS = bytes.maketrans(b"[]{}", b"\x01\xff\x01\xff")  # read as signed bytes: one level in, one out


def _may_nest_deeper(body: bytes) -> bool:
    """Whether there are more than NESTING_MAX opening brackets at all. `find` is 20 times as fast as `count` where they are rare."""
    left = NESTING_MAX
    for bracket in (b"{", b"["):
        at = body.find(bracket)
        while at >= 0:
            left -= 1
            if left < 0:
                return True
            at = body.find(bracket, at + 1)
    return False


def _depth(body: bytes) -> int:
    """Levels of nesting of valid JSON."""
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # what quotes are left are those around strings
    structure = body.translate(None, _NOT_STRUCTURE).replace(b'""', b"")
    brackets = b"".join(structure.split(b'"')[::2])
    return max(accumulate(memoryview(brackets.translate(_STEPS)).cast("b")), default=0)
