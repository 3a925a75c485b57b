"""How many tokens a part of a prompt may be that is no text: images, files, sounds and videos.

A model makes no more tokens of what is sent along than that has bytes. What is only referred to, by an address or an id, may be as
long as a model takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

MEDIA_TOKENS_MAX = 4096  # of an image; providers count 85 to 3,000
UNKNOWN_TOKENS = 1 << 40  # as many as fit


class _Media(msgspec.Struct, frozen=True, gc=False):
    """A file, a sound or a video, as far as it says where it is."""

    url: str | None = None
    data: str | None = None
    file_data: str | None = None
    file_id: str | None = None


_decoder = msgspec.json.Decoder(_Media)


def tokens_beyond(media: Sequence[msgspec.Raw], kind: str) -> int:
    """The most tokens of a part of this kind, beyond the bytes of `media`, which are counted anyway."""
    if media and kind != "image_url" and not all(map(_is_here, media)):
        return UNKNOWN_TOKENS
    more = MEDIA_TOKENS_MAX - sum(map(len, media))
    return more if kind == "image_url" else max(0, more)


def _is_here(raw: msgspec.Raw) -> bool:
    """Whether it is sent along, and not only referred to."""
    try:
        media = _decoder.decode(raw)
    except msgspec.ValidationError:
        return False
    urls = [each for each in (media.url, media.file_data) if each is not None]
    return media.file_id is None and bool(urls or media.data) and all(each.startswith("data:") for each in urls)
