"""Server-sent events, cut and spliced as bytes.

`wire.cutter` turns network chunks into blocks of whole events; `Splicer` puts our id, model and provider into each event
and tells what it carried. An event is decoded only into the few members we act on; what stands around `choices` (the
upstream's id and model, the same in every event) is learned and exchanged as a run of bytes. Events that differ from one
that was decoded in a plain text alone are not decoded at all, nor are those that an earlier stream of the endpoint had
(`wire.shape`); whatever differs otherwise is put together anew. What is sent never depends on where the network cut.
Sources: WHATWG server-sent events grammar; OpenAI and OpenRouter chunk shapes, read 2026-11.
"""

from __future__ import annotations

from operator import itemgetter

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
from gateway.wire.form import NOTHING, OURS, Form, is_plain
from gateway.wire.shape import Shape

DONE = b"data: [DONE]\n\n"


BORDER = b"\n\n"  # of two events

_USAGE_ALONE = b'"choices":[],"usage":{'
_RUN_EVENTS_MAX = 256  # events of changing kinds make runs start again and again
_NO_CHOICES = (b"", b"[]", b"null")

_chunk_decoder = msgspec.json.Decoder(Chunk)
_fields_decoder = msgspec.json.Decoder(dict[str, Raw])
_encode = msgspec.json.Encoder().encode


class Splicer(Form):
    """Rewrites the events of one attempt and keeps account of them. One per attempt, fed block by block.

    After each `splice`: `content_events` counts events that added output, `finish_reason` is the provider's word,
    `usage` the last usage object as bytes, `error` an in-band error as JSON, whatever its form, `done` whether `[DONE]` came.
    Nothing passes after an error or `[DONE]`. `dropped` counts events whose data was not an object.
    """

    __slots__ = ("_last_begin", "_last_data", "_numbers", "content_events", "done", "dropped", "error", "finish_reason", "usage")

    def __init__(self, generation_id: str, model: str, provider: str, shape: Shape) -> None:
        super().__init__(generation_id, model, provider, shape)
        self.content_events = 0
        self.finish_reason: str | None = None
        self.usage: bytes | None = None
        self.error: bytes | None = None
        self.done = False
        self.dropped = 0
        self._last_data = b""  # of the last event that carried usage and no output
        self._last_begin = b""  # ours of it, up to the usage object, where that is all it carried
        self._numbers: CallNumbers | None = None  # once a tool call came without one

    def splice(self, block: bytes) -> bytes:
        """The block for the caller, whole events with LF line ends; or b"" when nothing is to be sent."""
        lead, trail = self._lead_old, self._trail_old
        # One event of the common kind; compared as slices, which take half the time of `startswith`.
        if block[: len(lead)] == lead and block[-len(trail) :] == trail and not self.done and self.error is None:
            text = block[len(lead) : -len(trail)]
            if text and is_plain(text):
                self.content_events += 1
                return b"%b%b%b" % (self._lead_new, text, self._trail_new)
        return self.splice_pieces([event + BORDER for event in block.split(BORDER) if event.strip(b"\n")])[0]

    def splice_pieces(self, pieces: list[bytes]) -> tuple[bytes, int]:
        """The same for what is one event a piece, as the chunks of most providers are; and how many are, the rest being left alone."""
        out: list[bytes] = []
        at, count = 0, len(pieces)
        if self.done or self.error is not None:
            return b"", count
        if not self._first_data and self._shape.after_id and pieces:
            self._begin_alike(pieces[0])
        while at < count:
            event = pieces[at]
            if event.startswith(self._opening):
                if event.startswith(self._lead_old) and (texts := self._texts(pieces, at)):
                    out.append(self._lead_new + (self._trail_new + self._lead_new).join(texts) + self._trail_new)
                    self.content_events += len(texts)
                    at += len(texts)
                    continue
                rest = event[len(self._opening) :]
                known = self._rests.get(rest)
                if known is not None and self._numbers is None:
                    if known.finish:
                        self.finish_reason = known.finish
                    out.append(self._head_new + known.spliced)
                    at += 1
                    continue
                if rest.startswith(_USAGE_ALONE) and self._is_usage(rest):
                    at += 1
                    continue
            if event == DONE:
                self.done = True
            elif event.find(BORDER) != len(event) - 2 or event.partition(b"\r")[1]:
                break
            else:
                out.append(self._lines(event.strip(b"\n").split(b"\n")))
            at += 1
            if self.done or self.error is not None:
                break
        return b"".join(out), at

    def _texts(self, events: list[bytes], at: int) -> list[bytes]:
        """The texts of events from `at` on that differ in nothing but a plain text from one that was decoded: they need no decoding."""
        lead, trail = self._lead_old, self._trail_old
        end = min(len(events), at + _RUN_EVENTS_MAX)
        while end > at and not events[end - 1].endswith(trail):
            end -= 1
        run = events[at:end]
        texts = list(map(itemgetter(slice(len(lead), -len(trail))), run))
        if all(texts) and is_plain(b" ".join(texts)) and lead + (trail + lead).join(texts) + trail == b"".join(run):
            return texts
        for number, (event, text) in enumerate(zip(run, texts, strict=True)):  # an event of another kind stands between
            if not (text and event.startswith(lead) and event.endswith(trail) and is_plain(text)):
                return texts[:number]
        return texts

    def _is_usage(self, rest: bytes) -> bool:
        """Whether the event carries usage and nothing else; then it is taken: usage is told once, at the end, with what it costs."""
        usage = rest[len(_USAGE_ALONE) - 1 : -len(b"}\n\n")]
        is_one_line = rest.endswith(b"}}\n\n") and usage.isascii() and len(usage.splitlines()) == 1
        if not (is_one_line and is_filled_object(usage) and is_json(usage)):
            return False
        self.usage, self._last_data = usage, b""
        self._last_begin = self._head_new + _USAGE_ALONE[:-1]
        return True

    def _lines(self, lines: list[bytes]) -> bytes:
        """An event by the grammar: its data lines joined; comments and the other fields go on as they are."""
        if len(lines) == 1 and lines[0].startswith(b"data: "):
            return self._data(lines[0][6:])
        said = [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:") or line == b"data"]
        others = b"".join([line + b"\n" for line in lines if line.startswith((b":", b"event:", b"id:", b"retry:")) and _is_text(line)])
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
            if chunk.choices is None:
                if is_bare_error(data):
                    self.error = data
                    return b""
                return self._rebuilt(data, False)
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
                self._shape.remember(told + BORDER, rest + BORDER, finish)
            spliced = self._head_new + rest + self._tail_new
            if self._lead_old == NOTHING and adds and finish is None and chunk.choices and len(chunk.choices) == 1:
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
        if bytes(fields.get("choices", b"null")) == b"null":  # which clients look into without a question
            fields["choices"] = Raw(b"[]")
        for name, raw in fields.items():
            if name in OURS or is_left_out(name, raw):
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
        if self._last_begin and not data:
            return self._last_begin + usage + b"}\n\n"
        fields = _fields_decoder.decode(data or self._first_data or b"{}")
        if not data:  # the provider told no usage: only what all events have in common
            fields = {name: fields[name] for name in ("object", "created") if name in fields}
        members = [self._head, *self._missing(fields)]
        for name, raw in fields.items():
            if name not in OURS and name not in ("choices", "usage") and not is_left_out(name, raw):
                members.append(_encode(name) + b":" + bytes(raw).replace(b"\n", b" "))
        return b"data: {" + b",".join(members) + b',"choices":[],"usage":' + usage + b"}\n\n"


def _is_text(line: bytes) -> bool:
    """Clients decode every line before they look at it, comments too."""
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
