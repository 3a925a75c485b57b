"""Applications: each is known by where it is, and has a number that stays the same. None is on record."""

from __future__ import annotations

import hashlib
from urllib.parse import urlsplit

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


def app_id(site: str) -> int:
    """Of the host (and port) of an application's pages."""
    return int.from_bytes(hashlib.sha256(site.lower().encode()).digest()[:4]) >> 1


def app_of(referer: str, title: str) -> int | None:
    """Of the application that says so of itself. One on somebody's own machine is known by its title as well; without, it is none."""
    try:
        parts = urlsplit(referer)
        host = parts.hostname
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not host:
        return None
    if host in LOCAL_HOSTS:
        return app_id(f"{parts.netloc} {title}") if title else None
    return app_id(parts.netloc)
