"""What a caller has read of a streamed answer, so that another endpoint can go on from there; and the events that go on.

Only streams whose callers asked for continuation are read: it costs a decoding per event. Texts are kept as they stand in
JSON, between the quotes: halves of a surrogate pair that a provider sent in two events become one character by being
joined, and nothing is decoded and encoded in between.
"""

from __future__ import annotations

import re

import msgspec
from msgspec import Raw

from gateway.wire.completion import unveil, veil
from gateway.wire.shape import Shape
from gateway.wire.sse import Splicer

TEXT_BYTES_MAX = 1_048_576  # a longer answer is not kept, and not continued

_fields_decoder = msgspec.json.Decoder(dict[str, Raw])
_choices_decoder = msgspec.json.Decoder(list[dict[str, Raw]])
_encode = msgspec.json.Encoder().encode
_REASONING = frozenset(("reasoning", "reasoning_content", "reasoning_details"))
# What no prefill brings back.
_BESIDE_TEXT = frozenset(("tool_calls", "function_call", "refusal", "images", "audio"))
_NOTHING = (b"null", b'""', b"[]", b"{}")
_HALF_AT_END = re.compile(rb"(?:^|[^\\])(?:\\\\)*\\u[dD][89abAB][0-9a-fA-F]{2}\Z")


class Transcript:
    """An answer as its caller has read it, whichever endpoints it came from."""

    __slots__ = ("created", "is_text", "reasoned", "text")

    def __init__(self) -> None:
        self.text = bytearray()  # the inside of a JSON string
        self.reasoned = False
        self.is_text = True  # False: there was more than reasoning and text, or more than is kept
        self.created = b""  # the first event's word

    @property
    def can_go_on(self) -> bool:
        """Whether its text is all that an endpoint must be given to go on: no thought and no call was cut in the middle."""
        return self.is_text and bool(self.text or not self.reasoned) and self.plain() is not None

    def plain(self) -> str | None:
        """The text; None where half a character stands in it, which no provider would take."""
        return _plain(self.text)

    def read(self, text: bytes) -> None:
        """`text` was passed on."""
        if self.is_text:
            self.text += text
            if len(self.text) > TEXT_BYTES_MAX:
                self.is_text = False
                self.text.clear()


class TranscribingSplicer(Splicer):
    """Splices, and keeps a transcript of what it passes.

    `goes_on`: the answer began elsewhere, so what the caller has had once (role, time of creation, reasoning) does not come
    again. `repeats`: the provider may begin with the very text that it is to go on from. Half a character waits for its
    other half: if the stream breaks between them, the caller has seen neither.
    """

    __slots__ = ("_at", "_begun_with", "_goes_on", "_repeated", "_transcript", "_waiting", "_waiting_text")

    def __init__(
        self, generation_id: str, model: str, provider: str, shape: Shape, transcript: Transcript, *, goes_on: bool, repeats: bool
    ) -> None:
        super().__init__(generation_id, model, provider, shape)
        self._transcript = transcript
        self._goes_on = goes_on
        self._begun_with = (transcript.plain() or "") if repeats else ""
        self._at = 0  # so much of it was repeated
        self._repeated = b""  # this, which is withheld
        self._waiting = self._waiting_text = b""

    def splice(self, block: bytes) -> bytes:
        events = super().splice(block)
        out = b"".join([self._passed(event) for event in events.split(b"\n\n") if event])
        return out + self._told(b"", b"", ends=True) if self.done else out

    def final_event(self, usage: bytes) -> bytes:
        event = super().final_event(usage)
        if not (self._goes_on and self._transcript.created):
            return event
        return b"data: %b\n\n" % _encode(_fields_decoder.decode(event[6:]) | {"created": Raw(self._transcript.created)})

    def limit_event(self, kind: str, created_s: int) -> bytes:
        """The word of an end at the caller's limit, where the provider's was lost."""
        said = b'"text":""' if kind == "text" else b'"delta":{}'
        name = b"text_completion" if kind == "text" else b"chat.completion.chunk"
        choice = b'{"index":0,%b,"finish_reason":"length","native_finish_reason":"length"}' % said
        created = bytes(self._transcript.created) or b"%d" % created_s
        return b'data: {%b,"object":"%b","created":%b,"choices":[%b]}\n\n' % (self._head, name, created, choice)

    def _passed(self, event: bytes) -> bytes:
        """The event as the caller is to have it; b"" for not, or not yet."""
        before, data = _parts(event)
        if not data:
            return event + b"\n\n"
        try:
            fields = _fields_decoder.decode(data)
            is_veiled = False
        except (msgspec.DecodeError, RecursionError):
            data = veil(data) or b""
            is_veiled = True
        try:
            if is_veiled:
                fields = _fields_decoder.decode(data)
            choices = _choices_decoder.decode(fields.get("choices", b"[]"))
            choice = choices[0] if choices else {}
            delta = _fields_decoder.decode(choice["delta"]) if _is_filled(choice.get("delta")) else {}
        except (msgspec.DecodeError, RecursionError):
            self._transcript.is_text = False
            return self._told(event + b"\n\n", b"", ends=True)
        self._note(fields, choices, delta)
        name, holder = ("content", delta) if "delta" in choice else ("text", choice)
        text = _inside(holder.get(name))
        ends = _is_filled(choice.get("finish_reason"))
        if self._goes_on:
            text = self._new(unveil(text) if is_veiled else text, ends=ends)
            data = self._going_on(fields, choice, delta, holder, name, text)
            return self._told(b"%bdata: %b\n\n" % (before, data) if data else b"", text, ends=ends)
        return self._told(event + b"\n\n", unveil(text) if is_veiled else text, ends=ends)

    def _note(self, fields: dict[str, Raw], choices: list[dict[str, Raw]], delta: dict[str, Raw]) -> None:
        transcript = self._transcript
        if not transcript.created and "created" in fields:
            transcript.created = bytes(fields["created"])
        in_parts = bytes(delta.get("content", b"")).startswith(b"[")
        if in_parts or len(choices) > 1 or any(_is_filled(delta.get(each)) for each in _BESIDE_TEXT):
            transcript.is_text = False
        elif not self._goes_on and any(_is_filled(delta.get(each)) for each in _REASONING):
            transcript.reasoned = True

    def _going_on(
        self, fields: dict[str, Raw], choice: dict[str, Raw], delta: dict[str, Raw], holder: dict[str, Raw], name: str, text: bytes
    ) -> bytes:
        """The data of an event in a stream that began elsewhere; b"" when nothing of it is new."""
        if text or name in holder:
            holder[name] = Raw(b'"%b"' % text)
        said = {each: raw for each, raw in delta.items() if each != "role" and each not in _REASONING}
        if choice:
            if not text and not _is_filled(choice.get("finish_reason")) and not any(_is_filled(raw) for raw in said.values()):
                return b""
            if "delta" in choice:
                choice["delta"] = Raw(_encode(said))
            fields["choices"] = Raw(_encode([choice]))
        if self._transcript.created:
            fields["created"] = Raw(self._transcript.created)
        return _encode(fields)

    def _new(self, text: bytes, *, ends: bool) -> bytes:
        """The text without what repeats the text before it; what seemed to repeat it and proves not to comes with what proves it."""
        if not self._begun_with or not (text or ends):
            return text
        plain, at = _plain(text), self._at
        if plain is not None and self._begun_with.startswith(plain, at) and not ends:
            self._at += len(plain)
            self._repeated += text
            if self._at < len(self._begun_with):
                return b""
            text = b""
        elif plain is not None and plain.startswith(self._begun_with[at:]):
            text = _encode(plain[len(self._begun_with) - at :])[1:-1]
        else:
            text = self._repeated + text
        self._begun_with, self._repeated = "", b""
        return text

    def _told(self, event: bytes, text: bytes, *, ends: bool) -> bytes:
        """The event, if it leaves no half of a character behind; with what waited for it."""
        if self._waiting:
            event, text = self._waiting + event, self._waiting_text + text
            self._waiting = self._waiting_text = b""
        if not ends and _HALF_AT_END.search(text):
            self._waiting, self._waiting_text = event, text
            return b""
        self._transcript.read(text)
        return event


def _parts(event: bytes) -> tuple[bytes, bytes]:
    """The lines before an event's data, and the data."""
    if event.startswith(b"data: "):
        return b"", event[6:]
    at = event.find(b"\ndata: ")
    return (event[: at + 1], event[at + 7 :]) if at >= 0 else (event, b"")


def _is_filled(raw: Raw | None) -> bool:
    return raw is not None and bytes(raw) not in _NOTHING


def _inside(raw: Raw | None) -> bytes:
    """What stands between the quotes of a JSON string; of anything else nothing."""
    text = bytes(raw) if raw is not None else b""
    return text[1:-1] if text.startswith(b'"') else b""


def _plain(text: bytes | bytearray) -> str | None:
    try:
        return msgspec.json.decode(b'"' + text + b'"', type=str)
    except msgspec.DecodeError:
        return None
