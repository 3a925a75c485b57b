"""The public listeners: one port, one queue a slot, nobody else on it."""

from __future__ import annotations

import contextlib
import socket

import pytest

from gateway.supervisor.listeners import ListenError, Listeners


def test_all_slots_share_the_port_that_the_kernel_chose() -> None:
    with contextlib.closing(Listeners.open("127.0.0.1", 0, 3)) as listeners:
        ports = {each.getsockname()[1] for each in listeners.sockets}
        assert len(ports) == 1
        assert listeners.url(tls=False) == f"http://127.0.0.1:{ports.pop()}"


def test_ipv6_is_written_in_brackets() -> None:
    with contextlib.closing(Listeners.open("::1", 0, 2)) as listeners:
        port = listeners.sockets[0].getsockname()[1]
        assert listeners.url(tls=True) == f"https://[::1]:{port}"
        socket.create_connection(("::1", port)).close()


@pytest.mark.parametrize("count", [1, 2])
def test_a_port_of_another_gateway_is_an_error_and_not_shared(count: int) -> None:
    with contextlib.closing(Listeners.open("127.0.0.1", 0, count)) as taken:
        port = taken.sockets[0].getsockname()[1]
        with pytest.raises(ListenError, match=rf"127\.0\.0\.1:{port}: Address already in use"):
            Listeners.open("127.0.0.1", port, count)


def test_a_host_that_does_not_exist_is_named() -> None:
    with pytest.raises(ListenError, match=r"nowhere\.invalid:80"):
        Listeners.open("nowhere.invalid", 80, 1)


def test_the_kernel_spreads_connections_over_the_slots() -> None:
    with contextlib.ExitStack() as opened:
        listeners = opened.enter_context(contextlib.closing(Listeners.open("127.0.0.1", 0, 2)))
        address = listeners.sockets[0].getsockname()
        for _ in range(64):
            opened.enter_context(socket.create_connection(address))
        accepted = []
        for each in listeners.sockets:
            accepted.append(0)
            with contextlib.suppress(BlockingIOError):
                while True:
                    opened.enter_context(each.accept()[0])
                    accepted[-1] += 1
        assert sum(accepted) == 64
        assert min(accepted) >= 64 * 0.2  # hashed by the kernel: 32 expected, standard deviation 4
