"""Server-sent events, cut and spliced as bytes.

`wire.cutter` turns network chunks into blocks of whole events; `Splicer` puts our id, model and provider into each event
and tells what it carried. An event is decoded only into the few members we act on; what stands around `choices` (the
upstream's id and model, the same in every event) is learned and exchanged as a run of bytes. Events that differ from one
that was decoded in a plain text alone are not decoded at all, nor are those that an earlier stream of the endpoint had
(`wire.shape`); whatever differs otherwise is put together anew. What is sent never depends on where the network cut.
Sources: WHATWG server-sent events grammar; OpenAI and OpenRouter chunk shapes, read 2026-11.
"""

from __future__ import annotations

import re

import msgspec
from msgspec import UNSET, Raw

from gateway.wire.chunk import Chunk
from gateway.wire.completion import (
    NO_ERROR,
    CallNumbers,
    error_of,
    id_of,
    is_bare_error,
    is_filled_object,
    is_json,
    is_left_out,
    missing_members,
    normal_finish,
    normalised_choices,
    unveil,
    veil,
    with_native_finish,
)
from gateway.wire.shape import Rest, Shape

DONE = b"data: [DONE]\n\n"


_OURS = frozenset(("id", "model", "provider"))
_LEARNED_WITH = frozenset(("id", "model", "choices"))
_CREATED = re.compile(rb'"created":\d+,')

_chunk_decoder = msgspec.json.Decoder(Chunk)
_fields_decoder = msgspec.json.Decoder(dict[str, Raw])
_encode = msgspec.json.Encoder().encode
_CONTROL = bytes(range(32))
_RUN_BYTES_MAX = 16384  # events of changing kinds make runs start again and again
_NO_CHOICES = (b"", b"[]", b"null")
_NO_RESTS: dict[bytes, Rest] = {}


class Splicer:
    """Rewrites the events of one attempt and keeps account of them. One per attempt, fed block by block. `shape`: of the endpoint.

    After each `splice`: `content_events` counts events that added output, `finish_reason` is the provider's word,
    `usage` the last usage object as bytes, `error` an in-band error as JSON, whatever its form, `done` whether `[DONE]` came.
    Nothing passes after an error or `[DONE]`. `dropped` counts events whose data was not an object.
    """

    __slots__ = (
        "_fingerprint_null", "_first_data", "_head", "_head_new", "_head_old", "_last_data", "_lead_new", "_lead_old", "_nulls",
        "_numbers", "_rests", "_shape", "_tail_new", "_tail_old", "_trail_new", "_trail_old", "_usage_null", "content_events", "done",
        "dropped", "error", "finish_reason", "upstream_id", "usage",
    )  # fmt: skip

    def __init__(self, generation_id: str, model: str, provider: str, shape: Shape) -> None:
        self._shape = shape
        self._rests = _NO_RESTS  # the shape's, in a stream of the common form
        self._head = b'"id":' + _encode(generation_id) + b',"provider":' + _encode(provider) + b',"model":' + _encode(model)
        # Learned: what stands before `choices` (as yet, what no event begins with), and after it where our members are there.
        self._head_old, self._head_new = b"\0", b""
        self._tail_old, self._tail_new = b"", b""
        self._nulls: tuple[bytes, ...] = ()  # members after `choices` to leave out, as this upstream writes them
        self._usage_null = self._fingerprint_null = False
        # Learned: all of an event but its text, before and after it.
        self._lead_old = self._lead_new = self._trail_old = self._trail_new = b""
        self._first_data = self._last_data = b""  # the first event, and the last one that carried usage and nothing else
        self._numbers: CallNumbers | None = None  # once a tool call came without one
        self.content_events = 0
        self.finish_reason: str | None = None
        self.usage: bytes | None = None
        self.error: bytes | None = None
        self.done = False
        self.dropped = 0
        self.upstream_id: str | None = None

    def splice(self, block: bytes) -> bytes:
        """The block for the caller: whole events, or b"" when nothing is to be sent."""
        lead, trail = self._lead_old, self._trail_old
        if lead and block.startswith(lead) and block.endswith(trail) and not self.done and self.error is None:
            text = block[len(lead) : -len(trail)]
            if text and _is_plain(text):  # one event of the common kind
                self.content_events += 1
                return b"%b%b%b" % (self._lead_new, text, self._trail_new)
        out: list[bytes] = []
        at = 0
        while at < len(block) and not self.done and self.error is None:
            if self._lead_old and block.startswith(self._lead_old, at):
                run_end = self._text_run(block, at, out)
                if run_end:
                    at = run_end
                    continue
            border = block.find(b"\n\n", at)
            event = block[at:border] if border >= 0 else b""  # no border: one more empty line
            at = border + 2 if border >= 0 else len(block)
            if event == b"data: [DONE]":
                self.done = True
            elif event.startswith(b"data: ") and b"\n" not in event:
                out.append(self._data(event[6:]))
            elif event:
                out.append(self._lines(event.strip(b"\n").split(b"\n")))
        return out[0] if len(out) == 1 else b"".join(out)

    def _text_run(self, block: bytes, at: int, out: list[bytes]) -> int:
        """Events that differ in nothing but a plain text from one that was decoded need no decoding: where they end; 0: none.

        A run ends before the next escape, which is where plain text ends, so that each byte is looked at only once or twice.
        """
        lead, trail = self._lead_old, self._trail_old
        begin = at + len(lead)
        limit = at + _RUN_BYTES_MAX
        escape = block.find(b"\\", begin, limit)
        last = block.rfind(trail, begin, escape if escape >= 0 else limit)
        if last < 0:
            return 0
        texts = block[begin:last].split(trail + lead)
        if not (all(texts) and _is_plain(b" ".join(texts))):  # an event of another kind stands between
            plain = next(i for i, text in enumerate(texts) if not (text and _is_plain(text)))
            if plain == 0:
                return 0
            del texts[plain:]
            last = begin + sum(map(len, texts)) + (plain - 1) * len(trail + lead)
        self.content_events += len(texts)
        out.append(self._lead_new + (self._trail_new + self._lead_new).join(texts) + self._trail_new)
        return last + len(trail)

    def _learn_text(self, data: bytes, spliced: bytes, content: str) -> None:
        """What stands around the text of an event of the common kind: one choice, one text."""
        text = _encode(content)
        if data.count(text) == 1 and spliced.count(text) == 1:
            lead, trail = data.split(text)
            self._lead_old, self._trail_old = b'data: %b"' % lead, b'"%b\n\n' % trail
            if self._rests is self._shape.rests:
                self._shape.text_before, self._shape.text_after = self._lead_old[len(b"data: ") + len(self._head_old) :], self._trail_old
            lead, trail = spliced.split(text)
            self._lead_new, self._trail_new = lead + b'"', b'"' + trail

    def _lines(self, lines: list[bytes]) -> bytes:
        """An event by the grammar: its data lines joined; comments and the other fields go on as they are."""
        said = [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:") or line == b"data"]
        others = b"".join([line + b"\n" for line in lines if line.startswith((b":", b"event:", b"id:", b"retry:"))])
        if not said:
            return others and others + b"\n"
        data = b"\n".join(said)
        if b"event: error" in lines or b"event:error" in lines:
            self.error = error_of(data)
            return b""
        if len(said) > 1 and is_json(data):
            data = data.replace(b"\n", b" ")  # between tokens: strings hold no bare line ends
        event = self._data(data)
        return event and others + event

    def _data(self, data: bytes) -> bytes:
        """The event for this data, b"" when there is to be none."""
        if not self._first_data and self._shape.after_id:
            self._begin_alike(data)
        if self._rests and data.startswith(self._head_old):
            known = self._rests.get(data[len(self._head_old) :])
            if known is not None and self._numbers is None:
                self.finish_reason = known.finish or self.finish_reason
                return b"%b%b\n\n" % (self._head_new, known.spliced)
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
        if not chunk.choices:
            if chunk.usage is not UNSET and is_filled_object(chunk.usage):
                self.usage = bytes(chunk.usage)
                self._last_data = data  # told once, at the end, with what it costs
                return b""
            if chunk.choices is None and is_bare_error(data):
                self.error = data
                return b""
        adds, finish, clean = self._account(chunk)
        usage_null = False
        if chunk.usage is not UNSET:
            usage_null = bytes(chunk.usage) == b"null"
            if is_filled_object(chunk.usage):
                self.usage = bytes(chunk.usage)
        if self.error is not None:
            return b""
        if clean and not self._first_data:
            self._learn_common(data, chunk)
        if (
            clean
            and data.startswith(self._head_old)
            and data.endswith(self._tail_old)
            and (usage_null if self._usage_null else chunk.usage is UNSET)
            and chunk.error is UNSET
            and chunk.provider is UNSET
            and (chunk.system_fingerprint is UNSET or self._fingerprint_null or bytes(chunk.system_fingerprint) != b"null")
        ):
            rest = told = data[len(self._head_old) : len(data) - len(self._tail_old)]
            for null in self._nulls:
                rest = rest.replace(null, b"", 1)
            if finish is not None:
                rest = with_native_finish(rest, finish)
                if not rest:
                    return self._rebuilt(data, False)
            if not adds and self._rests is self._shape.rests and chunk.usage is UNSET:
                self._shape.remember(told, rest, finish)
            spliced = self._head_new + rest + self._tail_new
            if not self._lead_old and adds and finish is None and chunk.choices and len(chunk.choices) == 1:
                delta = chunk.choices[0].delta
                if delta is not None and isinstance(delta.content, str) and delta.content:
                    self._learn_text(data, spliced, delta.content)
            return spliced
        return self._rebuilt(data, clean and finish is None)

    def _account(self, chunk: Chunk) -> tuple[bool, str | None, bool]:
        """Whether it adds output, the end that it tells, and whether it goes on as it is: nothing missing, no null where strict clients
        refuse one.
        """
        adds = False
        finish: str | None = None
        clean = True
        for choice in chunk.choices or ():
            delta = choice.delta
            if delta is not None:
                adds = adds or bool(delta.content) or delta.adds()
                clean = clean and delta.role is not None and delta.tool_calls is not None and delta.reasoning_details is not None
                for call in delta.tool_calls or ():
                    if call.index is UNSET:
                        clean = False
                        self._numbers = CallNumbers() if self._numbers is None else self._numbers
            if choice.text:
                adds = True
            if choice.error is not UNSET and bytes(choice.error) not in NO_ERROR:
                self.error = bytes(choice.error)
            if choice.finish_reason:
                self.finish_reason = finish = choice.finish_reason
                if self.error is None and normal_finish(finish) == "error":
                    self.error = _encode({"message": f"finish_reason: {finish}"})
                clean = clean and len(chunk.choices or ()) == 1 and self._numbers is None
            elif choice.finish_reason is not None:  # missing, or an empty text, which is none of the contract's words
                clean = False
            if choice.index is UNSET:
                clean = False
        if adds:
            self.content_events += 1
        return adds, finish, clean

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
        if not self._first_data:
            self._first_data = data
        if is_filled_object(fields.get("usage", Raw())) and bytes(fields.get("choices", b"")) in _NO_CHOICES:
            self._last_data = data
            return b""
        if not self.upstream_id and "id" in fields:
            self.upstream_id = id_of(fields["id"])
        missing = self._missing(fields)
        members = [self._head, *missing]
        for name, raw in fields.items():
            if name in _OURS or is_left_out(name, raw):
                continue
            members.append(
                _encode(name) + b":" + (bytes(raw) if clean or name != "choices" else _encode(normalised_choices(raw, self._numbers)))
            )
        if clean:
            self._learn(data, fields, missing)
        return b"data: {" + b",".join(members) + b"}\n\n"

    def _missing(self, fields: dict[str, Raw]) -> list[bytes]:
        """`object` and `created` where the provider has none; what it has in their place is taken out of `fields`."""
        is_text = b'"text":' in self._first_data and b'"delta"' not in self._first_data
        kind = b'"text_completion"' if is_text else b'"chat.completion.chunk"'
        return missing_members(fields, kind, self._head.split(b'"', 4)[3].decode())

    def final_event(self, usage: bytes) -> bytes:
        """The event that carries usage: ours, with what else the provider said beside its own."""
        data = self._last_data
        rest = data[len(self._head_old) :]
        if self.usage and data.startswith(self._head_old) and rest.startswith(b'"choices":[],') and not self._tail_old:
            before, same, after = rest.partition(self.usage)
            if same and after == b"}":
                return self._head_new + before + usage + b"}\n\n"
        fields = _fields_decoder.decode(data or self._first_data or b"{}")
        if not data:  # the provider told no usage: only what all events have in common
            fields = {name: fields[name] for name in ("object", "created") if name in fields}
        members = [self._head, *self._missing(fields)]
        for name, raw in fields.items():
            if name not in _OURS and name not in ("choices", "usage") and not is_left_out(name, raw):
                members.append(_encode(name) + b":" + bytes(raw).replace(b"\n", b" "))
        return b"data: {" + b",".join(members) + b',"choices":[],"usage":' + usage + b"}\n\n"

    def _learn_common(self, data: bytes, chunk: Chunk) -> None:
        """The same at a glance, of the commonest form: no space between, the id first, and no null to leave out.

        Before `choices` stand plain members, so that the first `,"choices":[` is at the top: in texts its quotes would be escaped.
        """
        at = data.find(b',"choices":[') + 1
        head, their_id, their_model = data[:at], b'{"id":%b,' % chunk.id, b'"model":%b,' % chunk.model
        if (
            head.startswith(their_id)
            and head.count(their_model) == 1
            and b"{" not in head[1:]
            and b"[" not in head
            and chunk.usage is chunk.error is chunk.provider is UNSET
            and bytes(chunk.system_fingerprint or b"") != b"null"
            and (b'"object":"chat.completion.chunk",' in head or b'"object":"text_completion",' in head)
            and _CREATED.search(head)
        ):
            self._first_data = data
            self.upstream_id = id_of(chunk.id)
            self._head_old = head
            kept = head[len(their_id) :].replace(their_model, b"")
            self._head_new = b"data: {%b,%b" % (self._head, kept)
            self._tail_new = b"\n\n"
            shape = self._shape
            self._rests = shape.rests
            if their_id.startswith(b'{"id":"'):
                shape.after_id, shape.after_id_new = head[len(their_id) - len(b'",') :], kept

    def _begin_alike(self, data: bytes) -> None:
        """The same without a look into it, where another stream of the endpoint began so in all but the id."""
        shape = self._shape
        end = data.find(b'"', len(b'{"id":"'))
        their_id = data[len(b'{"id":"') : end]
        if not (data.startswith(shape.after_id, end) and data.startswith(b'{"id":"') and _is_plain(their_id)):
            return
        head = data[: end + len(shape.after_id)]
        self._first_data = head[:-1] + b"}"  # what follows was not looked at yet
        self.upstream_id = their_id.decode()
        self._head_old, self._head_new, self._tail_new = head, b"data: {%b,%b" % (self._head, shape.after_id_new), b"\n\n"
        self._rests = shape.rests
        if shape.text_before:
            self._lead_old, self._trail_old = b"data: %b%b" % (head, shape.text_before), shape.text_after
            self._lead_new, self._trail_new = self._head_new + shape.text_before, shape.text_after

    def _learn(self, data: bytes, fields: dict[str, Raw], missing: list[bytes]) -> None:
        """What this upstream writes around `choices`. After it only what we exchange is learned, for the rest may vary. `missing` are
        members that are ours to add.

        Nothing is learned of an event that does not name both its id and its model: the next one may, in any place.
        """
        if not fields.keys() >= _LEARNED_WITH:
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
            self._rests = _NO_RESTS
            self._head_old = head
            self._head_new = b"data: {" + b",".join([self._head, *missing]) + b"," + self._kept(before, fields)
            if _OURS.isdisjoint(names[at:]):
                self._tail_old, self._tail_new = b"", b"\n\n"
                self._nulls = tuple(member for name, member in after if is_left_out(name, fields[name]))
            else:
                self._tail_old, self._tail_new = tail, self._kept(after, fields) + b"}\n\n"
                self._nulls = ()
            self._usage_null = "usage" in fields and bytes(fields["usage"]) == b"null"
            self._fingerprint_null = bytes(fields.get("system_fingerprint", b"")) == b"null"
            return

    def _kept(self, members: list[tuple[str, bytes]], fields: dict[str, Raw]) -> bytes:
        return b"".join([member for name, member in members if name not in _OURS and not is_left_out(name, fields[name])])


def _is_plain(text: bytes) -> bool:
    """Whether this may stand in a JSON string as it is."""
    if b'"' in text or b"\\" in text or len(text.translate(None, _CONTROL)) != len(text):
        return False
    if text.isascii():
        return True
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
