"""Passwords at rest: scrypt with its parameters beside the hash, so that they can be raised without locking anyone out.

Hashing takes some 50 ms of CPU and 16 MiB: call it off the event loop.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets

COST = 2**14
BLOCK = 8
PARALLEL = 1
LENGTH_MIN = 8
BYTES_MAX = 1024

FORM = re.compile(r"scrypt\$(\d{1,8})\$(\d{1,3})\$(\d{1,3})\$([A-Za-z0-9+/=]{16,64})\$([A-Za-z0-9+/=]{44,88})")


def hash_password(password: str) -> str:
    """`scrypt$n$r$p$salt$hash`, salt and hash in base64. Raises ValueError: too short or too long."""
    if len(password) < LENGTH_MIN:
        raise ValueError(f"a password needs at least {LENGTH_MIN} characters")
    if len(password.encode()) > BYTES_MAX:
        raise ValueError(f"a password has at most {BYTES_MAX} bytes")
    salt = secrets.token_bytes(16)
    digest = hashlib.scrypt(password.encode(), salt=salt, n=COST, r=BLOCK, p=PARALLEL)
    return f"scrypt${COST}${BLOCK}${PARALLEL}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def is_password(password: str, stored: str) -> bool:
    """Whether this is the password that `stored` was made of. Constant time over equal lengths."""
    form = FORM.fullmatch(stored)
    if form is None or len(password.encode()) > BYTES_MAX:
        return False
    n, r, p = (int(part) for part in form.groups()[:3])
    salt, digest = (base64.b64decode(part) for part in form.groups()[3:])
    found = hashlib.scrypt(password.encode(), salt=salt, n=n, r=r, p=p, maxmem=256 * n * r, dklen=len(digest))
    return hmac.compare_digest(found, digest)
