"""What was said in an exchange, read out of the caller's body and of the answer as the caller got it.

Lenient on purpose: what cannot be read as what it should be (it was cut at [content] exchange_bytes_max, say) is shown as the text
that it is. The first choice counts: there are no others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec

from gateway.control.content import Exchange

_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """`messages` as the caller wrote them, or else a `prompt`."""

    messages: msgspec.Raw | None = None
    prompt: str = ""
    completion: str | None = None
    reasoning: str | None = None
    error: Failure | None = None


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """The error that the caller was told."""

    status: int | None = None
    message: str | None = None
    provider_name: str | None = None
    raw: str | None = None


class _Request(msgspec.Struct, frozen=True):
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()


def read_exchange(exchange: Exchange) -> Said:
    """May take some milliseconds for a large one."""
    messages, prompt = _input(exchange.request)
    completion, reasoning, error = _output(exchange.answer)
    return Said(messages=messages, prompt=prompt, completion=completion, reasoning=reasoning, error=error)


def _input(body: bytes) -> tuple[msgspec.Raw | None, str]:
    try:
        request = msgspec.json.decode(body, type=_Request)
    except _UNREADABLE:
        return None, body.decode(errors="replace")
    if bytes(request.messages).startswith(b"["):
        return request.messages, ""
    prompt = _decoded(bytes(request.prompt))
    if isinstance(prompt, str):
        return None, _text(prompt)
    if isinstance(prompt, list) and prompt and all(isinstance(part, str) for part in prompt):
        return None, _text("\n".join(prompt))
    return None, bytes(request.prompt or request.messages).decode(errors="replace")  # tokens, by their numbers


def _output(answer: bytes) -> tuple[str | None, str | None, Failure | None]:
    if answer.lstrip().startswith(b"{"):
        whole = _decoded(answer)
        documents = [whole] if isinstance(whole, dict) else []
        if not documents:
            return answer.decode(errors="replace"), None, None
    else:
        documents = list(_events(answer))
    completion: list[str] = []
    reasoning: list[str] = []
    error: Failure | None = None
    for document in documents:
        if isinstance(document.get("error"), dict):
            error = _failure(document["error"])
        choice = _first(document.get("choices"))
        for part in (choice.get("delta"), choice.get("message"), choice):
            if isinstance(part, dict):
                completion += _texts(part.get("content"), part.get("text"))
                reasoning += _texts(part.get("reasoning") or part.get("reasoning_content"))
    return _joined(completion), _joined(reasoning), error


def _events(stream: bytes) -> Iterator[dict[str, Any]]:
    """Every event's object. A cut one at the end, comments and `[DONE]` are none."""
    for event in stream.replace(b"\r\n", b"\n").split(b"\n\n"):
        lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
        document = _decoded(b"\n".join(lines))
        if isinstance(document, dict):
            yield document


def _first(choices: Any) -> dict[str, Any]:
    if isinstance(choices, list):
        for choice in choices:
            if isinstance(choice, dict) and choice.get("index", 0) == 0:
                return choice
    return {}


def _texts(*values: Any) -> Iterator[str]:
    """Of a text, or of a list of parts that hold one."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from (part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str))


def _failure(error: dict[str, Any]) -> Failure:
    metadata = error.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    status, raw = error.get("code"), metadata.get("raw")
    return Failure(
        status=status if isinstance(status, int) else None,
        message=_optional(error.get("message")),
        provider_name=_optional(metadata.get("provider_name")),
        raw=_optional(raw) if raw is None or isinstance(raw, str) else json.dumps(raw),
    )


def _optional(value: Any) -> str | None:
    return _text(value) if isinstance(value, str) else None


def _joined(texts: list[str]) -> str | None:
    return _text("".join(texts)) or None


def _text(text: str) -> str:
    """Surrogates that came one by one become the character they are; one that stayed alone, a replacement."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _decoded(data: bytes) -> Any:
    """JSON; None for what is none. The standard library's: it lets half a surrogate pair pass, whose other half is in the next event."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
