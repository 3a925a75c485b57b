"""Passwords at rest: Argon2id with its parameters beside the hash, so that they can be raised without locking anyone out.

Hashing takes some 50 ms of CPU and 19 MiB: call it off the event loop.
"""

from __future__ import annotations

import re

import argon2

LENGTH_MIN = 8
BYTES_MAX = 1024

FORM = re.compile(r"\$argon2id\$v=19\$m=\d{1,7},t=\d{1,2},p=\d\$[A-Za-z0-9+/]{11,64}\$[A-Za-z0-9+/]{22,88}")

# The least that OWASP's password storage sheet recommends for Argon2id, read 2026-11.
_HASHER = argon2.PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)
# A hash with these parameters that belongs to nobody: checking against it takes as long as against a real one.
NOBODY = "$argon2id$v=19$m=19456,t=2,p=1$vSqMNH2rcfElWwiBhP9xzg$AT9Mcrl7rYMCh5U9PtgL7MxcYTl0UFij90nexepBNrI"


def hash_password(password: str) -> str:
    """In PHC form, `$argon2id$v=19$m=...`. Raises ValueError: too short or too long."""
    if len(password) < LENGTH_MIN:
        raise ValueError(f"a password needs at least {LENGTH_MIN} characters")
    if len(password.encode("utf-8", "surrogatepass")) > BYTES_MAX:
        raise ValueError(f"a password has at most {BYTES_MAX} bytes")
    try:
        return _HASHER.hash(password)
    except UnicodeEncodeError:
        raise ValueError("a password is Unicode text") from None


def is_password(password: str, stored: str) -> bool:
    """Whether this is the password that `stored` was made of."""
    if len(password) > BYTES_MAX:
        return False
    try:
        return _HASHER.verify(stored, password)
    except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError, UnicodeEncodeError):
        return False
