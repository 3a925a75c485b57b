"""The request that lets an endpoint go on with an answer begun elsewhere: the same, and the text so far as what the model has said.

A chat ends in an assistant message with that text, which providers know by different words; a bare prompt just goes on.
Sources: Anthropic, llama.cpp (the bare message), Mistral and DeepSeek (`prefix`), Moonshot and Qwen (`partial`), vLLM and
SGLang (`continue_final_message`) chat references, read 2026-11.
"""

from __future__ import annotations

import msgspec
from msgspec import Raw

from gateway.wire.envelope import Envelope

_messages_decoder = msgspec.json.Decoder(list[Raw])
_fields_decoder = msgspec.json.Decoder(dict[str, Raw])
_encode = msgspec.json.Encoder().encode
_MESSAGES, _PROMPT = b',"messages":', b',"prompt":'
_LIMITS = (b',"max_tokens":', b',"max_completion_tokens":')
_MESSAGE_MARKS = {"mistral": b',"prefix":true', "deepseek": b',"prefix":true', "moonshot": b',"partial":true'}
_BODY_MARKS = (b',"add_generation_prompt":', b',"continue_final_message":')
REPEATS = frozenset(("mistral",))  # their answer begins with the text it was to go on from (vercel/ai#3256)
# A grammar begins anew with each request, and an echo would bring the prompt once more: there a second part fits no first one.
_SHAPED = tuple(
    b',"%b":' % name.encode()
    for name in "structured_outputs guided_json guided_regex guided_choice guided_grammar grammar json_schema regex ebnf echo".split()
)
_FORMAT = b',"response_format":'


def continued(envelope: Envelope, text: bytes, made_tokens: int) -> Envelope | None:
    """The request for the rest of an answer, in the plainest spelling; None where no second part could fit the first.

    `text` is the inside of the JSON string that the caller has read; `made_tokens` were made for it and come off the limit,
    which must have more than those.
    """
    pieces = list(envelope.shared)
    if any(each in pieces for each in _SHAPED) or not _is_free(pieces):
        return None
    if not text:
        return envelope
    name = _MESSAGES if envelope.kind == "chat" else _PROMPT
    at = pieces.index(name) + 1
    longer = _with_message(bytes(pieces[at]), text) if envelope.kind == "chat" else _longer(bytes(pieces[at]), text)
    if longer is None:
        return None
    pieces[at] = longer
    limit = envelope.max_tokens
    if limit is not None:
        limit -= made_tokens
        assert limit > 0
        for each in _LIMITS:
            if each in pieces:
                at = pieces.index(each) + 1
                pieces[at] = b"%d" % max(1, int(bytes(pieces[at])) - made_tokens)
    return msgspec.structs.replace(
        envelope,
        max_tokens=limit,
        prompt_text_bytes=envelope.prompt_text_bytes + len(msgspec.json.decode(b'"%b"' % text, type=str).encode()),
        prompt_bytes_max=envelope.prompt_bytes_max + len(text),
        messages=envelope.messages + (envelope.kind == "chat"),
        shared=tuple(pieces),
    )


def spelled(envelope: Envelope, prefill: str) -> Envelope:
    """A continued chat as this kind of endpoint wants it."""
    pieces = list(envelope.shared)
    if prefill == "vllm":
        for each in _BODY_MARKS:
            if each in pieces:
                at = pieces.index(each)
                del pieces[at : at + 2]
        pieces = [_BODY_MARKS[0], Raw(b"false"), _BODY_MARKS[1], Raw(b"true"), *pieces]
    elif prefill in _MESSAGE_MARKS:
        at = pieces.index(_MESSAGES) + 1
        pieces[at] = b"%b%b}]" % (bytes(pieces[at])[:-2], _MESSAGE_MARKS[prefill])
    return msgspec.structs.replace(envelope, shared=tuple(pieces))


def _is_free(pieces: list[bytes | Raw]) -> bool:
    """Whether the answer may have any form."""
    if _FORMAT not in pieces:
        return True
    said = _fields_decoder.decode(pieces[pieces.index(_FORMAT) + 1])
    return bytes(said.get("type", b"")) == b'"text"'


def _with_message(messages: bytes, text: bytes) -> bytes | None:
    """The messages, the last of which is the model's own, and ends in the text."""
    *before, last = _messages_decoder.decode(messages)
    said = _fields_decoder.decode(last)
    if bytes(said["role"]) == b'"assistant"':  # the caller gave the answer's beginning itself
        longer = _longer(bytes(said.get("content", b"")), text)
        if longer is None or "tool_calls" in said:
            return None
        kept = {name: raw for name, raw in said.items() if name not in ("prefix", "partial")}
        last = Raw(_encode(kept | {"content": Raw(longer)}))
    else:
        before.append(last)
        last = Raw(b'{"role":"assistant","content":"%b"}' % text)
    return b"[%b]" % b",".join([bytes(each) for each in (*before, last)])


def _longer(string: bytes, text: bytes) -> bytes | None:
    """A JSON string with more text at its end; None when it is no string."""
    return b'%b%b"' % (string[:-1], text) if string.startswith(b'"') else None
