"""Server-sent events, cut and spliced as bytes.

`EventCutter` turns network chunks into blocks of whole events; `Splicer` puts our id, model and provider into a block
and tells what it carried. The common shape (one `data: {...}` line per event, the upstream's id and model repeated
verbatim) is rewritten by replacing bytes that were learned from the first event; whatever differs is decoded, event by
event. Forwarding never depends on where the network cut.
Sources: WHATWG server-sent events grammar; OpenAI and OpenRouter chunk shapes, read 2026-11.
"""

from __future__ import annotations

import msgspec

DONE = b"data: [DONE]\n\n"


class LineTooLong(Exception):
    """An event grew over the limit without ending."""


class EventCutter:
    """Network chunks in, blocks of whole events out, with LF line ends. What is incomplete waits, up to a limit."""

    __slots__ = ("_after_cr", "_limit", "_pending", "_started")

    def __init__(self, line_bytes_max: int) -> None:
        self._limit = line_bytes_max
        self._pending: list[bytes] = []
        self._after_cr = False  # the last byte was CR: a following LF belongs to it
        self._started = False

    def feed(self, data: bytes) -> bytes:
        """All whole events up to now, as one block; b"" when none ended. Raises LineTooLong."""
        if not self._started:
            data = self._without_bom(data)
        if self._after_cr or b"\r" in data:
            data = self._normalised(data)
        if not self._pending:
            if data.endswith(b"\n\n"):
                return data
        elif self._pending[-1].endswith(b"\n") and data.startswith(b"\n"):
            # The border itself was cut in two.
            data = b"".join(self._pending) + data
            self._pending.clear()
        end = data.rfind(b"\n\n") + 2
        if end < 2:
            self._hold(data)
            return b""
        block = b"".join((*self._pending, data[:end])) if self._pending else data[:end]
        self._pending.clear()
        if end < len(data):
            self._hold(data[end:])
        return block

    def _hold(self, data: bytes) -> None:
        if not data:
            return
        self._pending.append(data)
        if sum(map(len, self._pending)) > self._limit:
            raise LineTooLong
        if len(self._pending) > 64:  # many tiny pieces: keep the sum above cheap
            self._pending[:] = [b"".join(self._pending)]

    def _without_bom(self, data: bytes) -> bytes:
        self._started = True
        return data.removeprefix(b"\xef\xbb\xbf")

    def _normalised(self, data: bytes) -> bytes:
        """CRLF and lone CR become LF, at once: a CR at the end is a line end, and a LF right after it is dropped."""
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
            if not data:
                self._after_cr = False
                return data
        self._after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


class Delta(msgspec.Struct, frozen=True):
    """What an event adds. Reasoning and tool calls are content: tokens were made."""

    content: str | list[msgspec.Raw] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    reasoning_details: list[msgspec.Raw] | None = None
    refusal: str | None = None
    tool_calls: list[msgspec.Raw] | None = None
    function_call: msgspec.Raw = msgspec.Raw()
    images: list[msgspec.Raw] | None = None
    audio: msgspec.Raw = msgspec.Raw()

    def adds(self) -> bool:
        return bool(
            self.content
            or self.reasoning
            or self.reasoning_content
            or self.tool_calls
            or self.reasoning_details
            or self.refusal
            or self.images
            or len(self.function_call) > 4  # longer than null
            or len(self.audio) > 4
        )


class ChunkChoice(msgspec.Struct, frozen=True):
    index: int = 0
    delta: Delta | None = None
    text: str | None = None  # legacy completions
    finish_reason: str | None = None
    native_finish_reason: str | None = None


class Chunk(msgspec.Struct, frozen=True):
    id: str | int | None = None
    model: str | None = None
    choices: list[ChunkChoice] | None = None
    usage: msgspec.Raw = msgspec.Raw()
    error: msgspec.Raw = msgspec.Raw()

    def adds(self) -> bool:
        return any((choice.delta is not None and choice.delta.adds()) or choice.text for choice in self.choices or ())

    def finish(self) -> str | None:
        return next((choice.finish_reason for choice in self.choices or () if choice.finish_reason), None)


# Optional members of a chunk that strict clients refuse as null: absent, or with a value.
_NOT_NULL = ("usage", "system_fingerprint", "error")

_chunk_decoder = msgspec.json.Decoder(Chunk)
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_encode = msgspec.json.Encoder().encode


class Splicer:
    """Rewrites the events of one attempt and keeps account of them. One per attempt, fed block by block.

    After each `splice`: `content_events` counts events that added output, `finish_reason` is the provider's word,
    `usage` the last usage object as bytes, `error` an in-band error object as bytes, `done` whether `[DONE]` came.
    """

    __slots__ = (
        "_finish_null",
        "_head",
        "_id_new",
        "_id_old",
        "_model_new",
        "_model_old",
        "_nulls",
        "_specials",
        "_usage_key",
        "_usage_null",
        "content_events",
        "done",
        "dropped",
        "error",
        "finish_reason",
        "upstream_id",
        "usage",
    )

    def __init__(self, generation_id: str, model: str, provider: str) -> None:
        self._id_new = b'"id":' + _encode(generation_id) + b',"provider":' + _encode(provider)
        self._model_new = b'"model":' + _encode(model)
        self._head = self._id_new + b"," + self._model_new
        self._id_old = b""  # learned; empty: decode every event
        self._model_old = b""
        self._finish_null = self._usage_key = self._usage_null = b""
        self._nulls: tuple[bytes, ...] = ()  # members to leave out, as this upstream writes them
        self._specials: tuple[bytes, ...] = ()
        self.content_events = 0
        self.finish_reason: str | None = None
        self.usage: bytes | None = None
        self.error: bytes | None = None
        self.done = False
        self.dropped = 0
        self.upstream_id: str | None = None

    def splice(self, block: bytes) -> bytes:
        """The block for the caller: whole events, or b"" when nothing is to be sent."""
        if self._id_old and (plain := self._plain(block)) is not None:
            return plain
        return self._mixed(block)

    def _plain(self, block: bytes) -> bytes | None:
        """Replace bytes where every event has the learned shape and only adds output; None where one differs."""
        events = block.count(b"\n\n")
        if (
            block.count(self._id_old) != events
            or block.count(self._model_old) != events
            or block.count(self._finish_null) != events
            or block.count(b'data: {"') != events
            or block.count(b"}\n\n") != events
            or block.count(b"\n") != 2 * events  # one line each: no comments, no names
            or block.count(self._usage_key) != block.count(self._usage_null)
            or b'"error"' in block
            or not (block.isascii() or _is_utf8(block))
        ):
            return None
        self.content_events += events
        for null in self._nulls:
            block = block.replace(null, b"")
        return block.replace(self._id_old, self._id_new).replace(self._model_old, self._model_new)

    def _mixed(self, block: bytes) -> bytes:
        """Decode what may differ: the first event of all, and what follows the first sign of an end."""
        out: list[bytes] = []
        while not self._id_old and self.upstream_id is None and block:
            first, _, block = block.partition(b"\n\n")
            out.append(self._event(first))
        if self._id_old and block:
            marks = [at for at in map(block.find, self._specials) if at >= 0]
            border = block.rfind(b"\n\n", 0, min(marks)) + 2 if marks else 0
            if border > 2 and (plain := self._plain(block[:border])) is not None:
                out.append(plain)
                block = block[border:]
            elif not marks and (plain := self._plain(block)) is not None:
                out.append(plain)
                block = b""
        out.extend([self._event(event) for event in block.split(b"\n\n") if event])
        return b"".join(out)

    def _event(self, event: bytes) -> bytes:
        """One event, decoded. Comments pass; what is neither an object nor `[DONE]` is dropped and counted, as is all after the end."""
        if self.done or self.error is not None:
            return b""
        if event.startswith(b"data: ") and b"\n" not in event:
            data = event[6:]
        else:
            data = _data_of(event)
            if not data:
                return event + b"\n\n" if event.startswith(b":") and b"\n" not in event else b""
        if data == b"[DONE]":
            self.done = True
            return b""
        try:
            chunk = _chunk_decoder.decode(data)
            fields = _fields_decoder.decode(data)
            data.decode()
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self.dropped += 1
            return b""
        if len(chunk.error) > 4:
            self.error = bytes(chunk.error)
            return b""
        if self.upstream_id is None:
            self.upstream_id = str(chunk.id) if chunk.id is not None else ""
            self._learn(data, chunk, fields)
        if chunk.adds():
            self.content_events += 1
        finish = chunk.finish()
        if finish is not None:
            self.finish_reason = finish
        if len(chunk.usage) > 4:
            self.usage = bytes(chunk.usage)
        return b"data: {" + self._head + self._rest(fields, chunk, finish) + b"}\n\n"

    def _rest(self, fields: dict[str, msgspec.Raw], chunk: Chunk, finish: str | None) -> bytes:
        parts = [b""]
        for name, raw in fields.items():
            if name in ("id", "model", "provider") or (name in _NOT_NULL and raw == b"null"):
                continue
            value = _with_native_finish(raw) if finish is not None and name == "choices" else bytes(raw)
            parts.append(_encode(name) + b":" + value.replace(b"\n", b" "))
        return b",".join(parts)

    def _learn(self, data: bytes, chunk: Chunk, fields: dict[str, msgspec.Raw]) -> None:
        """Find the bytes of id and model as this upstream writes them; both must stand exactly once."""
        if chunk.id is None or chunk.model is None or "provider" in fields:
            return
        for colon in (b":", b": "):
            id_old = b'"id"' + colon + bytes(fields["id"])
            model_old = b'"model"' + colon + bytes(fields["model"])
            if data.count(id_old) == 1 and data.count(model_old) == 1:
                self._id_old, self._model_old = id_old, model_old
                self._finish_null = b'"finish_reason"' + colon + b"null"
                self._usage_key = b'"usage"' + colon
                comma = b", " if colon == b": " else b","
                nulls = {name: comma + b'"' + name.encode() + b'"' + colon + b"null" for name in _NOT_NULL}
                self._nulls = tuple(null for null in nulls.values() if null in data)
                self._usage_null = nulls["usage"] if nulls["usage"] in data else b"\0"  # stands in no event
                self._specials = (b'"finish_reason"' + colon + b'"', self._usage_key + b"{", b"data: [DONE]", b'"error"')
                return


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _data_of(event: bytes) -> bytes:
    """The data of an event by the grammar: all its data lines, joined. Comments and other fields do not count."""
    lines = []
    for line in event.split(b"\n"):
        if line == b"data":
            lines.append(b"")
        elif line.startswith(b"data:"):
            lines.append(line[5:].removeprefix(b" "))
    return b"\n".join(lines)


def _with_native_finish(choices: msgspec.Raw) -> bytes:
    """`choices` with `native_finish_reason` beside each finish reason, which is normalised."""
    decoded = msgspec.json.decode(choices, type=list[dict[str, msgspec.Raw]])
    return _encode([normalised_choice(choice) for choice in decoded])


_FINISH_REASONS = {
    "stop": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "eos": "stop",
    "length": "length",
    "max_tokens": "length",
    "tool_calls": "tool_calls",
    "tool_use": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
    "safety": "content_filter",
    "error": "error",
}


def normalised_choice(choice: dict[str, msgspec.Raw]) -> dict[str, object]:
    """A choice whose `finish_reason` is of the contract's vocabulary; the provider's word is `native_finish_reason`."""
    out: dict[str, object] = dict(choice)
    raw = choice.get("finish_reason")
    native = msgspec.json.decode(raw, type=str | None) if raw is not None else None
    out["finish_reason"] = _FINISH_REASONS.get(native.lower(), "stop") if native else None
    if "native_finish_reason" not in choice:
        out["native_finish_reason"] = native
    return out


def error_event(body: dict[str, object], generation_id: str, model: str, provider: str, created_s: int, kind: str) -> bytes:
    """The one in-band event that ends a broken stream. `body` is the error object with an integer `code`."""
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error", "native_finish_reason": "error"}
    if kind == "text":
        choice = {"index": 0, "text": "", "finish_reason": "error", "native_finish_reason": "error"}
    event = {
        "id": generation_id,
        "provider": provider,
        "model": model,
        "object": "chat.completion.chunk" if kind == "chat" else "text_completion",
        "created": created_s,
        "error": body,
        "choices": [choice],
    }
    return b"data: " + _encode(event) + b"\n\n"
