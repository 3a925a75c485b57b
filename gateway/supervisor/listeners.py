"""The public listeners: one socket per edge slot, all on one port, kept open as long as callers may come.

With SO_REUSEPORT the kernel gives each socket a queue of its own and spreads connections evenly; a socket that is closed
takes its queue with it. So the supervisor holds every one of them and lends slot n's to each edge n, old and new.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Self

BACKLOG = 4096  # per slot; the kernel lowers it to net.core.somaxconn


class ListenError(Exception):
    """The address cannot be listened on. `str(error)` says which and why."""


class Listeners:
    """`count` listening sockets of one address; `sockets[n]` belongs to slot n."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        self.sockets = sockets

    @classmethod
    def open(cls, host: str, port: int, count: int) -> Self:
        """Bind and listen on all of them. Port 0: the kernel picks one for all. Raises ListenError."""
        with contextlib.ExitStack() as opened:
            sockets: list[socket.socket] = []
            try:
                family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
                for _ in range(count):
                    sockets.append(opened.enter_context(socket.socket(family, socket.SOCK_STREAM)))
                    _bind(sockets[-1], address, alone=len(sockets) == 1)
                    address = sockets[0].getsockname()
                for each in sockets:
                    each.listen(BACKLOG)
                    each.setblocking(False)
            except OSError as error:
                raise ListenError(f"cannot listen on {_authority(host, port)}: {error.strerror or error}") from None
            opened.pop_all()
            return cls(sockets)

    def url(self, *, tls: bool) -> str:
        host, port = self.sockets[0].getsockname()[:2]
        return f"{'https' if tls else 'http'}://{_authority(host, port)}"

    def close(self) -> None:
        for each in self.sockets:
            each.close()


def _bind(listener: socket.socket, address: tuple[object, ...], *, alone: bool) -> None:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past the TIME_WAIT of an earlier run
    if listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # "::" means both families
    if not alone:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(address)
    if alone:
        # The first one binds without the option, so another gateway on this port is an error instead of a silent share of
        # its connections; set before listen(), the option still makes it a full member of the group.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
