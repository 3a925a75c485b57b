"""A whole JSON answer of a provider: is it one, what does it say, and how does it read in our name."""

from __future__ import annotations

import msgspec

from gateway.wire.sse import normalised_choice


class NotAnAnswer(Exception):
    """The body is not a completion: not JSON, no choices, or an error object in a 200 (`error`, as bytes)."""

    def __init__(self, error: bytes | None = None) -> None:
        super().__init__()
        self.error = error


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A provider's answer, in our name."""

    body: bytes
    upstream_id: str
    finish_reason: str | None
    usage: bytes | None  # the provider's usage object


_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_choices_decoder = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_scalar = msgspec.json.Decoder(str | int | None)
_encode = msgspec.json.Encoder().encode


def rewrite(body: bytes, generation_id: str, model: str, provider: str) -> Answer:
    """Read and rewrite a provider's JSON answer. Raises NotAnAnswer."""
    try:
        body.decode()
        fields = _fields_decoder.decode(body)
        if len(fields.get("error", b"")) > 4:  # longer than null
            raise NotAnAnswer(bytes(fields["error"]))
        choices = _choices_decoder.decode(fields["choices"])
        upstream_id = _scalar.decode(fields["id"]) if "id" in fields else None
        rewritten = [normalised_choice(choice) for choice in choices]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError):
        raise NotAnAnswer from None
    if not choices:
        raise NotAnAnswer
    usage = fields.pop("usage", None)
    for ours in ("id", "model", "provider", "choices"):
        fields.pop(ours, None)
    out: dict[str, object] = {"id": generation_id, "provider": provider, "model": model, **fields}
    out.setdefault("system_fingerprint", None)
    out["choices"] = rewritten
    if usage is not None and len(usage) > 4:
        out["usage"] = usage
    return Answer(
        body=_encode(out),
        upstream_id=str(upstream_id or ""),
        finish_reason=next((str(choice["finish_reason"]) for choice in rewritten if choice.get("finish_reason")), None),
        usage=bytes(usage) if usage is not None and len(usage) > 4 else None,
    )
