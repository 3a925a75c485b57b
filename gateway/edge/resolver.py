"""Names to addresses, without ever blocking the loop or letting a resolver's trouble become ours.

`getaddrinfo` runs in threads and tells no TTL, so an answer is fresh for `FRESH_S`; after that it still serves while a
new one is fetched, and keeps serving when that fails. Literal addresses and `localhost` cost nothing extra.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable

FRESH_S = 10.0
RETRY_S = 1.0  # after a failed refresh
NAMES_MAX = 4096


class _Entry:
    __slots__ = ("addresses", "fresh_until", "refresh")

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.fresh_until = 0.0
        self.refresh: asyncio.Task[None] | None = None


class Resolver:
    """A cache in front of the system's resolver. `on_changed(host)` is called when a name's addresses have changed."""

    def __init__(self, on_changed: Callable[[str], None] = lambda host: None) -> None:
        self._entries: dict[str, _Entry] = {}
        self._on_changed = on_changed
        self._loop = asyncio.get_running_loop()

    async def resolve(self, host: str, port: int) -> list[str]:
        """Addresses of `host`, in the order to try. Raises OSError when none was ever known."""
        if _is_address(host):
            return [host]
        entry = self._entries.get(host)
        if entry is None:
            if len(self._entries) >= NAMES_MAX:
                self._entries.clear()
            entry = self._entries[host] = _Entry()
        self._refresh_if_stale(entry, host, port)
        if not entry.addresses and entry.refresh is not None:
            await asyncio.shield(entry.refresh)
        if not entry.addresses:
            raise OSError("name does not resolve")
        return entry.addresses

    def keep_fresh(self, host: str, port: int) -> None:
        """Look a known name up again once it is stale: connections may be used for ever without one being opened."""
        entry = self._entries.get(host)
        if entry is not None:
            self._refresh_if_stale(entry, host, port)

    def _refresh_if_stale(self, entry: _Entry, host: str, port: int) -> None:
        if self._loop.time() >= entry.fresh_until and entry.refresh is None:
            entry.refresh = self._loop.create_task(self._refresh(entry, host, port))

    async def _refresh(self, entry: _Entry, host: str, port: int) -> None:
        try:
            found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
        except (OSError, UnicodeError):  # the latter for what cannot be a name at all
            entry.fresh_until = self._loop.time() + RETRY_S
        else:
            entry.fresh_until = self._loop.time() + FRESH_S
            changed = bool(entry.addresses) and set(addresses) != set(entry.addresses)
            entry.addresses = addresses
            if changed:
                self._on_changed(host)
        finally:
            entry.refresh = None

    async def close(self) -> None:
        for entry in self._entries.values():
            if entry.refresh is not None:
                entry.refresh.cancel()
                await asyncio.gather(entry.refresh, return_exceptions=True)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
