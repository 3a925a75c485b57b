"""Minimal reading of a request body: what we must know of it, and the bytes to send on.

Only the top level is split (`dict[str, Raw]`), the fields we act on are decoded and checked, everything else stays as
the caller's bytes. Unknown fields pass on, except those that belong to the gateway or would steer a provider.
Source: OpenRouter chat and completion request fields, read 2026-11.
"""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Annotated, Literal, get_args

import msgspec

from gateway.domain.errors import BadRequest
from gateway.wire.media import tokens_beyond
from gateway.wire.unserved import NO_PRESETS, SERVER_TOOL, Plugin, require_no_server_tools, require_served_plugins

NESTING_MAX = 128
MEMBERS_MAX = 1024  # at the top level: each costs time of its own, and no API has a tenth as many
_TOO_DEEP = f"the body is nested deeper than {NESTING_MAX} levels"

Kind = Literal["chat", "text"]

# Ours to act on, never a provider's to see.
_GATEWAY_FIELDS = frozenset(
    "model models provider route plugins transforms preset usage session_id trace debug cache_control_ttl max_tool_calls "
    "stop_server_tools_when image_config include_reasoning service_tier".split()  # whose tiers have prices that no catalog entry has
)
# A provider that is itself a gateway would obey these: a caller must not steer where our credentials go.
_STEERING_FIELDS = frozenset(
    "api_base base_url api_key api_version api_type extra_headers extra_body extra_query headers organization "
    "custom_llm_provider custom_host deployment_id azure_endpoint vertex_credentials vertex_project aws_access_key_id "
    "aws_secret_access_key litellm_params user_config mock_response fallbacks".split()
)
# What endpoints may or may not support, in the contract's words.
_PARAMETERS = frozenset(
    "temperature top_p top_k min_p top_a frequency_penalty presence_penalty repetition_penalty seed stop logprobs top_logprobs logit_bias "
    "tools tool_choice parallel_tool_calls response_format structured_outputs reasoning include_reasoning reasoning_effort verbosity "
    "max_tokens max_completion_tokens web_search_options".split()
)
_NO_NAMES: frozenset[str] = frozenset()
_MODALITIES = {"image_url": "image", "input_audio": "audio", "file": "file", "video_url": "video", "input_video": "video"}
_OPENING_CHARS = 512  # of each message that tells conversations apart
_DROPPED = _GATEWAY_FIELDS | _STEERING_FIELDS | {"stream", "stream_options"}

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Tokens = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


_ZeroToOne = Annotated[float, msgspec.Meta(ge=0, le=1)]
_ZeroToTwo = Annotated[float, msgspec.Meta(ge=0, le=2)]
_Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]


class Part(msgspec.Struct, frozen=True, gc=False):
    """One part of a message's content. Data URLs count as media, never as text."""

    type: str
    text: str | None = None
    # Only their size counts, as that of what is no text.
    image_url: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    input_audio: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    file: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    video_url: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    input_video: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class Message(msgspec.Struct, frozen=True, gc=False):
    role: Role
    content: str | list[Part] | None = None


class RequestFields(msgspec.Struct, gc=False):
    """The fields that are looked at, with their ranges. The rest is skipped here and passes on as it is."""

    model: _Name | None = None
    models: Annotated[list[_Name], msgspec.Meta(max_length=32)] | None = None
    stream: bool | None = None
    stream_options: dict[str, msgspec.Raw] | None = None
    max_tokens: _Tokens | None = None
    max_completion_tokens: _Tokens | None = None
    temperature: _ZeroToTwo | None = None
    top_p: _ZeroToOne | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    min_p: _ZeroToOne | None = None
    top_a: _ZeroToOne | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    repetition_penalty: _ZeroToTwo | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=1)] | None = None
    best_of: Annotated[int, msgspec.Meta(ge=1, le=1)] | None = None
    stop: Annotated[str, msgspec.Meta(max_length=65536)] | Annotated[list[str], msgspec.Meta(max_length=16)] | None = None
    logprobs: bool | Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, msgspec.Meta(ge=-100, le=100)]], msgspec.Meta(max_length=4096)] | None = None
    tools: list[dict[str, msgspec.Raw]] | None = None
    tool_choice: str | dict[str, msgspec.Raw] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, msgspec.Raw] | None = None
    reasoning: dict[str, msgspec.Raw] | None = None
    user: Annotated[str, msgspec.Meta(max_length=1024)] | None = None
    session_id: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    metadata: dict[str, str] | None = None
    provider: dict[str, msgspec.Raw] | None = None
    route: Annotated[str, msgspec.Meta(pattern=r"^(fallback|sort)\Z")] | None = None
    plugins: list[Plugin] | None = None
    preset: None = None  # there are none
    transforms: list[str] | None = None
    usage: dict[str, msgspec.Raw] | None = None
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)] | None = None
    prompt: str | list[str | int | list[int]] | None = None


_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_known_decoder = msgspec.json.Decoder(RequestFields)
_string_encoder = msgspec.json.Encoder()
# The name of a field that passes on, as it stands in a forwarded body.
_NAMES = {
    name: b',"%b":' % name.encode() for name in (*RequestFields.__struct_fields__, "reasoning_effort", "verbosity") if name not in _DROPPED
}
_LOOKED_AT = frozenset(_NAMES) | _DROPPED  # what other fields say, a provider may write out into the prompt: `functions`, `documents`
_LIMITS = (_NAMES["max_tokens"], _NAMES["max_completion_tokens"])
_STREAM = b',"stream":true,"stream_options":{"include_usage":true}'
_BARE_STREAM = b',"stream":true'


class Envelope(msgspec.Struct, frozen=True, gc=False):
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
    provider: msgspec.Raw | None = None  # the caller's wishes
    route: str | None = None
    parameters: frozenset[str] = _NO_NAMES  # those that the body has; looked at only where endpoints may differ in them
    modalities: frozenset[str] = _NO_NAMES  # of the prompt, beside text
    forces_tool: bool = False
    opening: tuple[str, ...] = ()  # what the conversation began with
    shared: tuple[bytes | msgspec.Raw, ...] = ()  # the body after the model's name, in pieces: the same for every attempt

    def body_for(self, upstream_model: str, limit_name: str | None = None, *, stream_options: bool = True) -> bytes:
        """The request body for a provider, `model` in its own words.

        `limit_name` is the one of the two names of the token limit that it knows (None: both, or nobody said): a limit
        under the other name would be refused, or worse, ignored. `stream_options`: whether the provider takes that member.
        """
        shared = self.shared
        if limit_name is not None and self.max_tokens is not None and _NAMES[limit_name] not in shared:
            shared = tuple([_NAMES[limit_name] if piece in _LIMITS else piece for piece in shared])
        if self.stream and not stream_options:
            shared = (*shared[:-2], _BARE_STREAM, shared[-1])
        # Joined once: a 5 MiB image cost 6 ms in copies when the pieces were concatenated on the way.
        return b"".join((b'{"model":', _string_encoder.encode(upstream_model), *shared))


def parse(body: bytes, kind: Kind) -> Envelope:
    """Read a request body. Raises BadRequest, naming the field and what it must be, never echoing it."""
    fields, passed = _split(body)
    try:
        known = _known_decoder.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _complaint(error) from None
    model, models = known.model, known.models
    if models:
        model, *models = dict.fromkeys([name for name in (model, *models) if name])  # each once
    if not model:
        raise BadRequest("model is required: a string such as author/name")
    if known.plugins:
        require_served_plugins(known.plugins)
    max_tokens = known.max_tokens
    if known.max_completion_tokens is not None:  # both are sent, and a provider may know but one of them
        max_tokens = max(known.max_completion_tokens, max_tokens or 0)
    messages = known.messages
    if messages is not None and kind == "chat":
        count = len(messages)
        text_bytes, bytes_max, images, modalities = _said(messages, fields["messages"])
        first = messages[0].content
        opening = (first[:_OPENING_CHARS],) if isinstance(first, str) else ()
        if count > 1 and isinstance(second := messages[1].content, str):
            opening = (*opening, second[:_OPENING_CHARS])
    else:
        count = images = 0
        modalities, opening = _NO_NAMES, ()
        text_bytes, bytes_max = _prompt(known.prompt, fields, kind)
    # What is not text is too short for it, mostly.
    if len(body) - text_bytes > 2 * NESTING_MAX and _may_nest_deeper(body) and _depth(body) > NESTING_MAX:
        raise BadRequest(_TOO_DEEP)
    # What a chat template writes out into the prompt.
    if known.tools is not None:
        tools = fields["tools"]
        bytes_max += len(tools)
        if bytes(tools).find(SERVER_TOOL) >= 0:
            require_no_server_tools(tools)
    if known.response_format is not None:
        bytes_max += len(fields["response_format"])
    if not _LOOKED_AT.issuperset(fields):
        bytes_max += sum([len(raw) for name, raw in fields.items() if name not in _LOOKED_AT])
    return Envelope(
        kind,
        model,
        tuple(models) if models else (),
        known.stream is True,
        max_tokens,
        text_bytes,
        bytes_max,
        count,
        images,
        known.reasoning is not None or "reasoning_effort" in fields,
        known.user or "",
        known.session_id or "",
        fields["provider"] if known.provider is not None else None,
        known.route,
        _PARAMETERS & fields.keys() if known.tools or known.response_format or known.provider or "verbosity" in fields else _NO_NAMES,
        modalities,
        known.tool_choice is not None and known.tool_choice not in ("auto", "none"),
        opening,
        (*passed, _stream_member(known.stream_options), b"}") if known.stream else (*passed, b"}"),
    )


def _split(body: bytes) -> tuple[dict[str, msgspec.Raw], list[bytes | msgspec.Raw]]:
    """The members of the body, each named once, and what of it passes on. Raises BadRequest."""
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
    passed, size = _passed(fields)
    # Without space between its parts there is no room for a part that was not kept.
    if len(body) != size and not _is_spaced(body, fields) and repeats_key(body, fields):
        raise BadRequest("the body repeats a top-level key")
    return fields, passed


def _complaint(error: Exception) -> BadRequest:
    """What is wrong with a field that is looked at."""
    if not isinstance(error, msgspec.ValidationError):
        return BadRequest("the body is not valid JSON")
    # msgspec names types, limits and the path, never the value (but for roles).
    reason, _, path = _without_value(error).rpartition(" - at `$.")
    path = path.rstrip("`")
    name = re.split(r"[.\[]", path, maxsplit=1)[0]
    if name == "preset":
        return BadRequest(NO_PRESETS)
    where = path[len(name) :]
    return BadRequest(f"{name}: {reason}" + (f" - at `${where}`" if where else ""))


def _passed(fields: dict[str, msgspec.Raw]) -> tuple[list[bytes | msgspec.Raw], int]:
    """The members that pass on as they are, in pieces; and the length of the whole body, written without any space."""
    pieces: list[bytes | msgspec.Raw] = []
    size = 1 + 4 * len(fields)  # braces, quotes, colons and commas
    for name, raw in fields.items():
        size += len(name) + len(raw)
        if (known_name := _NAMES.get(name)) is not None:
            pieces += (known_name, raw)
        elif name not in _DROPPED:
            pieces += (b"," + _string_encoder.encode(name) + b":", raw)
    return pieces, size


def _stream_member(options: dict[str, msgspec.Raw] | None) -> bytes:
    return b',"stream":true,"stream_options":' + msgspec.json.encode({**options, "include_usage": True}) if options else _STREAM


def _said(messages: list[Message], raw: msgspec.Raw) -> tuple[int, int, int, frozenset[str]]:
    """Of a chat: bytes of text, the most tokens that any tokenizer makes of it, images, and what it has beside text."""
    text_bytes = media_more = images = 0  # tokens that media may be, beyond the bytes that stand for them
    kinds: set[str] = set()
    for message in messages:
        content = message.content
        if isinstance(content, str):
            text_bytes += len(content) if content.isascii() else len(content.encode())
        elif content is not None:
            for part in content:
                if part.type == "text":
                    text_bytes += _text_bytes(part.text)
                else:
                    media = (part.image_url, part.input_audio, part.file, part.video_url, part.input_video)
                    media_more += tokens_beyond([each for each in media if isinstance(each, msgspec.Raw)], part.type)
                    images += part.type == "image_url"
                    kinds.add(part.type)
    modalities = frozenset([_MODALITIES[kind] for kind in kinds if kind in _MODALITIES]) if kinds else _NO_NAMES
    # But for media all of the JSON is text, names of tools and their arguments included.
    return text_bytes, len(raw) + media_more, images, modalities


def _prompt(prompt: str | list[str | int | list[int]] | None, fields: dict[str, msgspec.Raw], kind: Kind) -> tuple[int, int]:
    """The same of a bare prompt. Raises BadRequest when there is none to speak of."""
    if prompt is None:
        raise BadRequest("messages is required: a list of at least one message" if kind == "chat" else "prompt is required")
    if isinstance(prompt, list) and len(prompt) > 1 and set(map(type, prompt)) != {int}:
        raise BadRequest("prompt: one a request; each further one would be an answer of its own, so send it in a request of its own")
    size = len(fields["prompt"])
    return _text_bytes(prompt) if isinstance(prompt, str) else size, size


def _without_value(error: msgspec.ValidationError) -> str:
    """msgspec's words; only of a wrong enum member, here a role, it repeats the value."""
    text = str(error)
    if not text.startswith("Invalid enum value"):
        return text
    return f"a role must be one of {', '.join(get_args(Role))} - at {text.rpartition(' - at ')[2]}"


def _text_bytes(text: str | None) -> int:
    return 0 if text is None else len(text) if text.isascii() else len(text.encode())


# Duplicate keys: msgspec keeps the last one silently, a provider might keep the first; what was authorised must be what
# is sent. The two ways in which programs write JSON are recognised at once; other bodies are walked.


def _is_spaced(body: bytes, fields: dict[str, msgspec.Raw]) -> bool:
    """Whether the body is what Python's `json.dumps` writes for these fields."""
    if len(body) > 65536 or body[1:2] != b'"':
        return False  # building it twice would cost more than the walk
    return body == b"{" + b", ".join([b'"%b": %b' % (name.encode(), raw) for name, raw in fields.items()]) + b"}"


_KEY = re.compile(rb'[ \t\n\r]*"([^"\\]*+(?:\\.[^"\\]*+)*+)"[ \t\n\r]*:[ \t\n\r]*')
_COMMA = re.compile(rb"[ \t\n\r]*,")
_OPEN = re.compile(rb"[ \t\n\r]*\{")
_CLOSE = re.compile(rb"[ \t\n\r]*\}[ \t\n\r]*")


def repeats_key(body: bytes, fields: dict[str, msgspec.Raw]) -> bool:
    """Whether a body has a top-level key twice. `fields` is what was read of it: a key that was seen, or whose value is not the one
    kept, is a repeat."""
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

FEW_BRACKETS = 16  # are found one by one also in a short body
_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b'[]{}"')
_STEPS = bytes.maketrans(b"[]{}", b"\x01\xff\x01\xff")  # read as signed bytes: one level in, one out


def _may_nest_deeper(body: bytes) -> bool:
    """Whether there are more than NESTING_MAX opening brackets at all. Where they are rare, `count` takes 20 times as long as `find`."""
    left = few = FEW_BRACKETS if len(body) < 16384 else NESTING_MAX
    find = body.find
    for bracket in (b"{", b"["):
        at = find(bracket)
        while at >= 0 and left:
            left -= 1
            at = find(bracket, at + 1)
    return not left and (few == NESTING_MAX or body.count(b"{") + body.count(b"[") > NESTING_MAX)


def _depth(body: bytes) -> int:
    """Levels of nesting of valid JSON."""
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # what quotes are left are those around strings
    structure = body.translate(None, _NOT_STRUCTURE).replace(b'""', b"")
    brackets = b"".join(structure.split(b'"')[::2])
    return max(accumulate(memoryview(brackets.translate(_STEPS)).cast("b")), default=0)
