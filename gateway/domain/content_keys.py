"""Keys that kept prompts are encrypted with, as an operator hands them over: read here, used in control alone.

A key's text is never repeated, in no message and no repr: a fault is told by its place in the list.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets

KEY_BYTES = 32  # AES-256
_TEXT = re.compile(r"[A-Za-z0-9+/]{43}=?")


class ContentKey:
    """One key. `id` names it beside every record it sealed, and tells nothing of it."""

    __slots__ = ("id", "secret")

    def __init__(self, secret: bytes) -> None:
        """Raises ValueError for anything but 32 bytes."""
        if len(secret) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes")
        self.secret = secret
        self.id = hashlib.sha256(b"gateway content key\0" + secret).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"<ContentKey {self.id}>"


def read_keys(text: str) -> tuple[ContentKey, ...]:
    """Keys of a comma-separated list, the newest first; none for a text of blanks. Raises ValueError with the place of the first fault."""
    if not text.strip():
        return ()
    parts = [part.strip() for part in text.split(",")]
    keys: dict[str, ContentKey] = {}
    for place, part in enumerate(parts, 1):
        # The URL-safe alphabet is the same number in other letters.
        plain = part.replace("-", "+").replace("_", "/")
        if not _TEXT.fullmatch(plain):
            which = f"key {place} of {len(parts)}" if len(parts) > 1 else "the key"
            raise ValueError(f"{which} is not base64 of {KEY_BYTES} bytes; `gateway content key` makes one")
        key = ContentKey(base64.b64decode(plain.rstrip("=") + "="))
        keys.setdefault(key.id, key)
    return tuple(keys.values())


def new_key() -> str:
    """The text of a fresh key."""
    return base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()
