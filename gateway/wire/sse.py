"""Server-sent events, cut and spliced as bytes.

`EventCutter` turns network chunks into blocks of whole events; `Splicer` puts our id, model and provider into each event
and tells what it carried. Each event is decoded, but only into the few members we act on, and its text is not taken
apart: what stands around `choices` (the upstream's id and model, the same in every event) is learned and exchanged as a
run of bytes. Whatever differs is put together anew. Forwarding never depends on where the network cut.
Sources: WHATWG server-sent events grammar; OpenAI and OpenRouter chunk shapes, read 2026-11.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, Raw, UnsetType

from gateway.wire.completion import NO_ERROR, id_of, is_filled_object, normalised_choices, unveil, veil

DONE = b"data: [DONE]\n\n"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class LineTooLong(Exception):
    """An event grew over the limit without ending."""


class EventCutter:
    """Network chunks in, blocks of whole events out, with LF line ends. What is incomplete waits, up to a limit."""

    __slots__ = ("_after_cr", "_limit", "_pending", "_started")

    def __init__(self, line_bytes_max: int) -> None:
        self._limit = line_bytes_max
        self._pending = bytearray()
        self._after_cr = False  # the last byte was CR: a following LF belongs to it
        self._started = False

    def feed(self, data: bytes) -> bytes:
        """All whole events up to now, as one block; b"" when none ended. Raises LineTooLong."""
        if not self._started:
            data = self._without_mark(data)
        if self._after_cr or b"\r" in data:
            data = self._normalised(data)
        pending = self._pending
        if not pending:
            if data.endswith(b"\n\n"):
                return data
        elif data.startswith(b"\n") and pending.endswith(b"\n"):  # the border itself was cut in two
            data = bytes(pending) + data
            pending.clear()
        end = data.rfind(b"\n\n") + 2
        if end < 2:
            pending += data
            if len(pending) > self._limit:
                raise LineTooLong
            return b""
        block = bytes(pending) + data[:end] if pending else data[:end]
        pending[:] = data[end:]
        if len(pending) > self._limit:
            raise LineTooLong
        return block

    def _without_mark(self, data: bytes) -> bytes:
        """A byte order mark may open the stream; as long as the first bytes may become one they wait."""
        data = bytes(self._pending) + data
        self._pending.clear()
        if len(data) < len(_BYTE_ORDER_MARK) and _BYTE_ORDER_MARK.startswith(data):
            self._pending += data
            return b""
        self._started = True
        return data.removeprefix(_BYTE_ORDER_MARK)

    def _normalised(self, data: bytes) -> bytes:
        """CRLF and lone CR become LF, at once: a CR at the end is a line end, and a LF right after it is dropped."""
        if not data:
            return data
        ends_in_cr = data.endswith(b"\r")
        if self._after_cr:
            data = data.removeprefix(b"\n")
        self._after_cr = ends_in_cr
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


class Delta(msgspec.Struct, frozen=True, gc=False):
    """What an event adds. Reasoning and tool calls are content: tokens were made."""

    role: str | UnsetType | None = UNSET
    content: str | list[Raw] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    reasoning_details: list[Raw] | UnsetType | None = UNSET
    refusal: str | None = None
    tool_calls: list[Raw] | UnsetType | None = UNSET
    function_call: Raw = Raw()
    images: list[Raw] | None = None
    audio: Raw = Raw()

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


class ChunkChoice(msgspec.Struct, frozen=True, gc=False):
    index: int | UnsetType = UNSET
    delta: Delta | None = None
    text: str | None = None  # legacy completions
    finish_reason: str | UnsetType | None = UNSET


class Chunk(msgspec.Struct, frozen=True, gc=False):
    choices: list[ChunkChoice] | None = None
    usage: Raw | UnsetType = UNSET
    error: Raw | UnsetType = UNSET
    provider: Raw | UnsetType = UNSET


_OURS = frozenset(("id", "model", "provider"))
# Optional members of a chunk that strict clients refuse as null: absent, or with a value.
_NOT_NULL = frozenset(("usage", "system_fingerprint", "error"))

_chunk_decoder = msgspec.json.Decoder(Chunk)
_fields_decoder = msgspec.json.Decoder(dict[str, Raw])
_json_decoder = msgspec.json.Decoder(Raw)
_encode = msgspec.json.Encoder().encode
_CONTROL = bytes(range(32))
_NO_CHOICES = (b"", b"[]", b"null")


class Splicer:
    """Rewrites the events of one attempt and keeps account of them. One per attempt, fed block by block.

    After each `splice`: `content_events` counts events that added output, `finish_reason` is the provider's word,
    `usage` the last usage object as bytes, `error` an in-band error object as bytes, `done` whether `[DONE]` came.
    Nothing passes after an error or `[DONE]`. `dropped` counts events whose data was not an object.
    """

    __slots__ = (
        "_head",
        "_head_new",
        "_head_old",
        "_last_fields",
        "_lead_new",
        "_lead_old",
        "_nulls",
        "_tail_new",
        "_tail_old",
        "_trail_new",
        "_trail_old",
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
        self._head = b'"id":' + _encode(generation_id) + b',"provider":' + _encode(provider) + b',"model":' + _encode(model)
        # Learned: what stands before `choices` (as yet, what no event begins with), and after it where our members are there.
        self._head_old, self._head_new = b"\0", b""
        self._tail_old, self._tail_new = b"", b""
        self._nulls: tuple[bytes, ...] = ()  # members after `choices` to leave out, as this upstream writes them
        self._usage_null = False
        # Learned: all of an event but its text, before and after it.
        self._lead_old = self._lead_new = self._trail_old = self._trail_new = b""
        self._last_fields: dict[str, Raw] = {}  # of the event that carried usage and nothing else, or of the first one
        self.content_events = 0
        self.finish_reason: str | None = None
        self.usage: bytes | None = None
        self.error: bytes | None = None
        self.done = False
        self.dropped = 0
        self.upstream_id: str | None = None

    def splice(self, block: bytes) -> bytes:
        """The block for the caller: whole events, or b"" when nothing is to be sent."""
        out: list[bytes] = []
        at = 0
        while at < len(block) and not self.done and self.error is None:
            if self._lead_old and block.startswith(self._lead_old, at):
                run_end = self._text_run(block, at, out)
                if run_end:
                    at = run_end
                    continue
            border = block.index(b"\n\n", at)
            event = block[at:border]
            at = border + 2
            if event.startswith(b"data: ") and b"\n" not in event:
                out.append(self._data(event[6:]))
            elif event:
                out.append(self._lines(event.strip(b"\n").split(b"\n")))
        return out[0] if len(out) == 1 else b"".join(out)

    def _text_run(self, block: bytes, at: int, out: list[bytes]) -> int:
        """Events that differ in nothing but a plain text from one that was decoded need no decoding: where they end; 0: not so."""
        lead, trail = self._lead_old, self._trail_old
        last = block.rfind(trail, at + len(lead))
        if last < 0:
            return 0
        texts = block[at + len(lead) : last].split(trail + lead)
        text = b"\0".join(texts)  # no text holds a NUL: control bytes are refused
        if b'"' in text or b"\\" in text or not all(texts) or len(text.translate(None, _CONTROL)) != len(text) - len(texts) + 1:
            return 0
        if not text.isascii():
            try:
                text.decode()
            except UnicodeDecodeError:
                return 0
        self.content_events += len(texts)
        out.append(self._lead_new + (self._trail_new + self._lead_new).join(texts) + self._trail_new)
        return last + len(trail)

    def _learn_text(self, data: bytes, spliced: bytes, content: str) -> None:
        """What stands around the text of an event of the common kind: one choice, one text."""
        text = _encode(content)
        if text in data and data.count(text) == 1 and spliced.count(text) == 1:
            lead, trail = data.split(text)
            self._lead_old, self._trail_old = b'data: %b"' % lead, b'"%b\n\n' % trail
            lead, trail = spliced.split(text)
            self._lead_new, self._trail_new = lead + b'"', b'"' + trail

    def _lines(self, lines: list[bytes]) -> bytes:
        """An event by the grammar: its data lines joined; comments and the other fields go on as they are."""
        said = [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:") or line == b"data"]
        others = b"".join([line + b"\n" for line in lines if line.startswith((b":", b"event:", b"id:", b"retry:"))])
        if not said:
            return others and others + b"\n"
        data = b"\n".join(said)
        if len(said) > 1 and _is_json(data):
            data = data.replace(b"\n", b" ")  # between tokens: strings hold no bare line ends
        event = self._data(data)
        return event and others + event

    def _data(self, data: bytes) -> bytes:
        """The event for this data, b"" when there is to be none."""
        try:
            if not data.isascii():
                data.decode()
            chunk = _chunk_decoder.decode(data)
        except msgspec.ValidationError:
            return self._odd(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return self._undecodable(data)
        if chunk.error is not UNSET and bytes(chunk.error) not in NO_ERROR:
            self.error = bytes(chunk.error)
            return b""
        adds = False
        clean = True  # goes on as it is: not finished, nothing missing, no null where strict clients refuse one
        for choice in chunk.choices or ():
            delta = choice.delta
            if delta is not None:
                adds = adds or bool(delta.content) or delta.adds()
                clean = clean and delta.role is not None and delta.tool_calls is not None and delta.reasoning_details is not None
            if choice.text:
                adds = True
            if choice.finish_reason is not None or choice.index is UNSET:
                clean = False
                self.finish_reason = choice.finish_reason or self.finish_reason
        if adds:
            self.content_events += 1
        usage_null = False
        if chunk.usage is not UNSET:
            usage_null = bytes(chunk.usage) == b"null"
            if is_filled_object(chunk.usage):
                self.usage = bytes(chunk.usage)
        if (
            clean
            and data.startswith(self._head_old)
            and data.endswith(self._tail_old)
            and (usage_null if self._usage_null else chunk.usage is UNSET)
            and chunk.error is UNSET
            and chunk.provider is UNSET
        ):
            rest = data[len(self._head_old) : len(data) - len(self._tail_old)]
            for null in self._nulls:
                rest = rest.replace(null, b"", 1)
            spliced = self._head_new + rest + self._tail_new
            if not self._lead_old and adds and chunk.choices and len(chunk.choices) == 1:
                delta = chunk.choices[0].delta
                if delta is not None and isinstance(delta.content, str) and delta.content:
                    self._learn_text(data, spliced, delta.content)
            return spliced
        return self._rebuilt(data, clean)

    def _odd(self, data: bytes) -> bytes:
        """An object of unusual types passes all the same; whether it adds output can only be guessed."""
        try:
            fields = _fields_decoder.decode(data)
        except (msgspec.DecodeError, RecursionError):
            return self._undecodable(data)
        error, usage = fields.get("error", Raw()), fields.get("usage", Raw())
        if bytes(error) not in NO_ERROR:
            self.error = bytes(error)
            return b""
        if len(fields.get("choices", b"")) > 4:  # longer than null
            self.content_events += 1
        if is_filled_object(usage):
            self.usage = bytes(usage)
        return self._rebuilt(data, True)

    def _undecodable(self, data: bytes) -> bytes:
        """The end, or an event with half a surrogate pair; anything else is dropped."""
        if data.strip() == b"[DONE]":
            self.done = True
            return b""
        veiled = veil(data)
        if veiled is None:
            self.dropped += 1
            return b""
        return unveil(self._data(veiled))

    def _rebuilt(self, data: bytes, clean: bool) -> bytes:
        fields = _fields_decoder.decode(data)
        if not self._last_fields:
            self._last_fields = {name: fields[name] for name in ("object", "created") if name in fields}
        if is_filled_object(fields.get("usage", Raw())) and bytes(fields.get("choices", b"")) in _NO_CHOICES:
            self._last_fields = fields  # told once, at the end, with what it costs
            return b""
        if not self.upstream_id and "id" in fields:
            self.upstream_id = id_of(fields["id"])
        members = [self._head]
        for name, raw in fields.items():
            if name in _OURS or _is_left_out(name, raw):
                continue
            members.append(_encode(name) + b":" + (bytes(raw) if clean or name != "choices" else _encode(normalised_choices(raw))))
        if clean:
            self._learn(data, fields)
        return b"data: {" + b",".join(members) + b"}\n\n"

    def final_event(self, usage: bytes) -> bytes:
        """The event that carries usage: ours, with what else the provider said beside its own."""
        members = [self._head]
        for name, raw in self._last_fields.items():
            if name not in _OURS and name not in ("choices", "usage") and not _is_left_out(name, raw):
                members.append(_encode(name) + b":" + bytes(raw).replace(b"\n", b" "))
        return b"data: {" + b",".join(members) + b',"choices":[],"usage":' + usage + b"}\n\n"

    def _learn(self, data: bytes, fields: dict[str, Raw]) -> None:
        """What this upstream writes around `choices`. After it only what we exchange is learned, for the rest may vary."""
        if "choices" not in fields:
            return
        names = list(fields)
        at = names.index("choices")
        for comma, colon in ((b",", b":"), (b", ", b": ")):
            before = [(name, _encode(name) + colon + bytes(fields[name]) + comma) for name in names[:at]]
            after = [(name, comma + _encode(name) + colon + bytes(fields[name])) for name in names[at + 1 :]]
            head = b"{" + b"".join([member for _, member in before])
            tail = b"".join([member for _, member in after]) + b"}"
            if not (data.startswith(head) and data.endswith(tail)):
                continue
            self._head_old = head
            self._head_new = b"data: {" + self._head + b"," + self._kept(before, fields)
            if _OURS.isdisjoint(names[at:]):
                self._tail_old, self._tail_new = b"", b"\n\n"
                self._nulls = tuple(member for name, member in after if _is_left_out(name, fields[name]))
            else:
                self._tail_old, self._tail_new = tail, self._kept(after, fields) + b"}\n\n"
                self._nulls = ()
            self._usage_null = "usage" in fields and bytes(fields["usage"]) == b"null"
            return

    def _kept(self, members: list[tuple[str, bytes]], fields: dict[str, Raw]) -> bytes:
        return b"".join([member for name, member in members if name not in _OURS and not _is_left_out(name, fields[name])])


def _is_json(data: bytes) -> bool:
    try:
        _json_decoder.decode(data)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def _is_left_out(name: str, raw: Raw) -> bool:
    if name not in _NOT_NULL:
        return False
    return name in ("usage", "error") or bytes(raw) == b"null"


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
