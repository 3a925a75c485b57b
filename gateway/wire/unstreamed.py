"""Answers to requests for a stream that do not say that they are one: servers that forget the content type, and whole
answers from servers that do not stream what was asked, or not in this case.

What it is, its first bytes tell. A whole answer is put as the events that it would have been.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from gateway.wire.completion import unveil, veil
from gateway.wire.cutter import BYTE_ORDER_MARK

_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b":")
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_choices_decoder = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_encode = msgspec.json.Encoder().encode


def kind_of(begun: bytes) -> Literal["stream", "whole", "neither", ""]:
    """What an answer is that begins so; "": more is to be seen."""
    begun = begun.removeprefix(BYTE_ORDER_MARK).lstrip()
    if begun.startswith(b"{"):
        return "whole"
    if begun.startswith(_FIELDS):
        return "stream"
    return "" if any(field.startswith(begun) for field in (*_FIELDS, BYTE_ORDER_MARK)) else "neither"


def as_events(body: bytes) -> bytes:
    """The events of a completion that came whole, and `[DONE]`. Raises DecodeError, or KeyError, where it is none."""
    try:
        fields = _fields_decoder.decode(body.removeprefix(BYTE_ORDER_MARK))
        choices = _choices_decoder.decode(fields["choices"])
    except msgspec.DecodeError:
        veiled = veil(body)
        if veiled is None:
            raise
        return unveil(as_events(veiled))
    is_chat = any("message" in choice for choice in choices)
    event: dict[str, object] = {**fields, "object": "chat.completion.chunk" if is_chat else "text_completion"}
    event["choices"] = [{"delta" if name == "message" else name: raw for name, raw in choice.items()} for choice in choices]
    data = _encode(event).replace(b"\r", b" ").replace(b"\n", b" ")  # between tokens: strings hold no bare line ends
    return b"data: %b\n\ndata: [DONE]\n\n" % data
