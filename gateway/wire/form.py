"""What one upstream writes around what changes from event to event, learned from its events: a stream's own `Form`.

What an endpoint's streams share is in its `wire.shape`; here is that with the id of this stream, and what replaces it.
"""

from __future__ import annotations

import re

import msgspec
from msgspec import UNSET, Raw

from gateway.wire.chunk import Chunk
from gateway.wire.completion import id_of, is_left_out
from gateway.wire.shape import Rest, Shape

OURS = frozenset(("id", "model", "provider"))
_LEARNED_WITH = frozenset(("id", "model", "choices"))
_CREATED = re.compile(rb'"created":\d+,')
_BEGUN = re.compile(rb'data: \{"id":"([ !#-\[\]-~]*)')  # an id of plain ASCII

_encode = msgspec.json.Encoder().encode
_SPECIAL = bytes(range(32)) + b'"\\'  # what does not stand in a JSON string as it is
NOTHING = b"\0"  # what no event begins with
_NO_RESTS: dict[bytes, Rest] = {}


class Form:
    """What is exchanged in the events of one stream. "old" is the provider's, "new" ours. `shape`: of the endpoint."""

    __slots__ = (
        "_fingerprint_null", "_first_data", "_head", "_head_new", "_head_old", "_lead_new", "_lead_old", "_nulls", "_opening", "_rests",
        "_shape", "_tail_new", "_tail_old", "_trail_new", "_trail_old", "_usage_null", "upstream_id",
    )  # fmt: skip

    def __init__(self, generation_id: str, model: str, provider: str, shape: Shape) -> None:
        self._shape = shape
        self._head = b'"id":"%b","provider":%b,"model":%b' % (generation_id.encode(), _encode(provider), _encode(model))
        self._first_data = b""  # the first event
        self.upstream_id: str | None = None
        self._opening = NOTHING  # what an event begins with, up to `choices`
        # The same as JSON, and after `choices` where our members are there.
        self._head_old, self._head_new = NOTHING, b""
        self._tail_old, self._tail_new = b"", b""
        # All of an event but its text, before and after it, from `data: ` to the empty line.
        self._lead_old, self._lead_new = NOTHING, b""
        self._trail_old = self._trail_new = b""
        self._nulls: tuple[bytes, ...] = ()  # members after `choices` to leave out, as this upstream writes them
        self._usage_null = self._fingerprint_null = False
        self._rests = _NO_RESTS  # the shape's, in a stream of the common form

    def _learn_common(self, data: bytes, chunk: Chunk) -> None:
        """The same at a glance, of the commonest form: no space between, the id first, and no null to leave out.

        Before `choices` stand plain members, so that the first `,"choices":[` is at the top: in texts its quotes would be escaped.
        """
        at = data.find(b',"choices":[') + 1
        head, their_id, their_model = data[:at], b'{"id":%b,' % chunk.id, b'"model":%b,' % chunk.model
        if (
            head.startswith(their_id)
            and head.find(their_model) >= 0
            and head.count(b'"id":') == head.count(b'"model":') == 1
            and head.find(b"{", 1) < 0
            and head.find(b"[") < 0
            and chunk.usage is chunk.error is chunk.provider is UNSET
            and bytes(chunk.system_fingerprint or b"") != b"null"
            and (b'"object":"chat.completion.chunk",' in head or b'"object":"text_completion",' in head)
            and _CREATED.search(head)
        ):
            self._first_data = data
            self.upstream_id = id_of(chunk.id)
            self._head_old, self._opening = head, b"data: " + head
            kept = head[len(their_id) :].replace(their_model, b"")
            self._head_new = b"data: {%b,%b" % (self._head, kept)
            self._tail_new = b"\n\n"
            shape = self._shape
            self._rests = shape.rests
            if their_id.startswith(b'{"id":"'):
                shape.after_id, shape.after_id_new = head[len(their_id) - len(b'",') :], kept

    def _begin_alike(self, event: bytes) -> None:
        """The same without a look into it, where another stream of the endpoint began so in all but the id."""
        shape = self._shape
        begun = _BEGUN.match(event)
        if begun is None or not event.startswith(shape.after_id, begun.end()):
            return
        opening = self._opening = event[: begun.end() + len(shape.after_id)]
        head = opening[len(b"data: ") :]
        self._first_data = head[:-1] + b"}"  # what follows was not looked at yet
        self.upstream_id = begun[1].decode()
        self._head_old, self._head_new, self._tail_new = head, b"data: {%b,%b" % (self._head, shape.after_id_new), b"\n\n"
        self._rests = shape.rests
        if shape.text_before:
            self._lead_old, self._trail_old = opening + shape.text_before, shape.text_after
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
            self._head_old, self._opening = head, b"data: " + head
            self._head_new = b"data: {" + b",".join([self._head, *missing]) + b"," + self._kept(before, fields)
            if OURS.isdisjoint(names[at:]):
                self._tail_old, self._tail_new = b"", b"\n\n"
                self._nulls = tuple(member for name, member in after if is_left_out(name, fields[name]))
            else:
                self._tail_old, self._tail_new = tail, self._kept(after, fields) + b"}\n\n"
                self._nulls = ()
            self._usage_null = "usage" in fields and bytes(fields["usage"]) == b"null"
            self._fingerprint_null = bytes(fields.get("system_fingerprint", b"")) == b"null"
            return

    def _kept(self, members: list[tuple[str, bytes]], fields: dict[str, Raw]) -> bytes:
        return b"".join([member for name, member in members if name not in OURS and not is_left_out(name, fields[name])])

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


def is_plain(text: bytes) -> bool:
    """Whether this may stand in a JSON string as it is."""
    if len(text.translate(None, _SPECIAL)) != len(text):
        return False
    if text.isascii():
        return True
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
