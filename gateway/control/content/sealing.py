"""Encryption of what is kept: AES-256-GCM, a random nonce a record, bound to the generation and the account it is of.

A record that is moved to another generation or account, changed in any bit, or was sealed with a key that is not here, is
refused: never is a byte of it shown. Random nonces of 96 bits are good for 2^32 records a key (NIST SP 800-38D, 8.3).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from gateway.control.content import ContentUnreadable, Exchange
from gateway.domain.content_keys import ContentKey

NONCE_BYTES = 12
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Exchange).decode


class Sealed(msgspec.Struct, frozen=True):
    """One record as it lies on the disk."""

    generation_id: str
    account_id: str
    created_at_ms: int
    key_id: str
    nonce: bytes
    data: bytes  # ciphertext and tag


class Sealer:
    """The first of `keys` seals, all of them open."""

    def __init__(self, keys: Sequence[ContentKey]) -> None:
        self._ciphers = {key.id: AESGCM(key.secret) for key in keys}
        self.key_id = keys[0].id if keys else ""  # of the one that seals; "": none does

    def seal(self, generation_id: str, account_id: str, created_at_ms: int, exchange: Exchange) -> Sealed:
        return self._seal(generation_id, account_id, created_at_ms, _encode(exchange))

    def open(self, sealed: Sealed) -> Exchange:
        """Raises ContentUnreadable."""
        return _decode(self._open(sealed))

    def reseal(self, sealed: Sealed) -> Sealed:
        """The same under the newest key and a new nonce. Raises ContentUnreadable."""
        return self._seal(sealed.generation_id, sealed.account_id, sealed.created_at_ms, self._open(sealed))

    def _seal(self, generation_id: str, account_id: str, created_at_ms: int, plain: bytes) -> Sealed:
        nonce = os.urandom(NONCE_BYTES)
        data = self._ciphers[self.key_id].encrypt(nonce, plain, _bound_to(generation_id, account_id))
        return Sealed(generation_id, account_id, created_at_ms, self.key_id, nonce, data)

    def _open(self, sealed: Sealed) -> bytes:
        cipher = self._ciphers.get(sealed.key_id)
        if cipher is None:
            raise ContentUnreadable(f"This content is kept under the key {sealed.key_id}, which the gateway was not given")
        try:
            return cipher.decrypt(sealed.nonce, sealed.data, _bound_to(sealed.generation_id, sealed.account_id))
        except (InvalidTag, ValueError):  # the latter: a nonce of another length
            raise ContentUnreadable("This content is damaged: it is not what was kept") from None


def _bound_to(generation_id: str, account_id: str) -> bytes:
    """The associated data. Neither id holds a zero."""
    return b"content 1\0" + generation_id.encode() + b"\0" + account_id.encode()
