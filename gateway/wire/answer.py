"""A whole JSON answer of a provider: is it one, what does it say, and how does it read in our name."""

from __future__ import annotations

import msgspec

from gateway.wire.completion import NO_ERROR, id_of, is_filled_object, normalised_choices, unveil, veil


class NotAnAnswer(Exception):
    """The body is not a completion: not JSON, no choices, or an error object in a 200 (`error`, as bytes)."""

    def __init__(self, error: bytes | None = None) -> None:
        super().__init__()
        self.error = error


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A provider's answer, in our name."""

    body: bytes  # without usage
    upstream_id: str
    finish_reason: str | None
    native_finish_reason: str | None
    usage: bytes | None  # the provider's usage object
    content_bytes: int = 0  # of text, counted only where there is no usage

    def render(self, usage: bytes) -> bytes:
        """The body with this `usage` object."""
        return self.body[:-1] + b',"usage":' + usage + b"}"


_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_encode = msgspec.json.Encoder().encode
_OURS = ("id", "model", "provider", "choices", "usage", "error")


def rewrite(body: bytes, generation_id: str, model: str, provider: str) -> Answer:
    """Read and rewrite a provider's JSON answer. Raises NotAnAnswer."""
    try:
        body.decode()
        return _rewritten(body, generation_id, model, provider)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError):
        veiled = veil(body)
        if veiled is None:
            raise NotAnAnswer from None
    answer = rewrite(veiled, generation_id, model, provider)
    return msgspec.structs.replace(answer, body=unveil(answer.body))


def _rewritten(body: bytes, generation_id: str, model: str, provider: str) -> Answer:
    fields = _fields_decoder.decode(body)
    error = bytes(fields.get("error", b""))
    if error not in NO_ERROR:
        raise NotAnAnswer(error)
    choices = normalised_choices(fields["choices"])
    if not choices:
        raise NotAnAnswer
    usage = fields["usage"] if "usage" in fields and is_filled_object(fields["usage"]) else None
    out: dict[str, object] = {"id": generation_id, "provider": provider, "model": model}
    out.update((name, raw) for name, raw in fields.items() if name not in _OURS)
    out.setdefault("system_fingerprint", None)
    out["choices"] = choices
    finished = next((choice for choice in choices if choice["finish_reason"]), {})
    return Answer(
        body=_encode(out),
        upstream_id=id_of(fields["id"]) if "id" in fields else "",
        finish_reason=_text(finished.get("finish_reason")),
        native_finish_reason=_text(finished.get("native_finish_reason")),
        usage=bytes(usage) if usage is not None else None,
        content_bytes=0 if usage is not None else _content_bytes(fields["choices"]),
    )


class _Said(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    message: _Said | None = None
    text: str | None = None


_said_decoder = msgspec.json.Decoder(list[_Choice])


def _content_bytes(choices: msgspec.Raw) -> int:
    """Bytes of text made; where it is not plain text (tool calls, parts), of the JSON that carries it."""
    try:
        said = _said_decoder.decode(choices)
    except msgspec.DecodeError:
        return len(choices)
    texts = [choice.text for choice in said]
    texts += [text for choice in said if (m := choice.message) is not None for text in (m.content, m.reasoning, m.reasoning_content)]
    return sum(len(text.encode()) for text in texts if text) or (len(choices) if b'"tool_calls"' in bytes(choices) else 0)


def _text(value: object) -> str | None:
    """A choice's member that is plain or still raw JSON."""
    if isinstance(value, msgspec.Raw):
        value = msgspec.json.decode(value)
    return value if isinstance(value, str) else None
