"""What the events of one endpoint have in common from stream to stream.

A provider writes the same members in the same order in each of its streams; those that begin within the same second
differ, before their first text, in the id alone. Bytes equal to ones that were decoded mean the same, so most streams
need no event decoded but the one that tells usage.
"""

from __future__ import annotations

import msgspec

RESTS_MAX = 64
REST_BYTES_MAX = 1024


class Rest(msgspec.Struct, frozen=True, gc=False):
    """An event without text from `choices` on: what the caller gets in its place, and the end that it tells."""

    spliced: bytes
    finish: str | None


class Shape:
    """Learned from streams of the common form, and only ever replaced as a whole by what a later one shows.

    A head, `{"id":"` up to `choices`, is its id between `{"id":"` and `after_id`; `after_id_new` is what follows our own members in
    its place. A text stands between `text_before` and `text_after`, from `choices` to the end of the event.
    """

    __slots__ = ("after_id", "after_id_new", "rests", "text_after", "text_before")

    def __init__(self) -> None:
        self.after_id = self.after_id_new = b""
        self.text_before = self.text_after = b""
        self.rests: dict[bytes, Rest] = {}  # by their bytes

    def remember(self, rest: bytes, spliced: bytes, finish: str | None) -> None:
        if len(rest) <= REST_BYTES_MAX:
            if len(self.rests) >= RESTS_MAX:
                self.rests.clear()
            self.rests[rest] = Rest(spliced, finish)
