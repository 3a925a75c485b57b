"""Names are looked up without blocking, and followed when they move (UPS-11)."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from multidict import CIMultiDictProxy

from gateway.domain.errors import ConnectFailed, GatewayError
from gateway.edge import resolver as resolving
from gateway.edge.resolver import Resolver
from gateway.edge.upstream import Call, CallListener, Origin, Pool
from tests.conftest import eventually
from tests.edge.stage import RawCall, RawProvider, completion, plain
from tests.timing import again_if_untimely, in_time

NAME = "north.example"
FRESH_S = 0.2
REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: north.example\r\nContent-Length: 0\r\n\r\n"


class Names:
    """In place of the system's resolver: addresses, a delay, and a count of questions. No addresses: an error."""

    def __init__(self) -> None:
        self.addresses = ["127.0.0.1"]
        self.delay_s = 0.0
        self.questions = 0
        self.error: Exception = socket.gaierror(socket.EAI_NONAME, "no such name")

    async def getaddrinfo(self, host: str, port: int, **_: object) -> list[Any]:
        self.questions += 1
        await asyncio.sleep(self.delay_s)
        if not self.addresses:
            raise self.error
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.addresses]


class Listening(CallListener):
    """Keeps what a call tells."""

    def __init__(self) -> None:
        self.status = 0
        self.error: GatewayError | None = None
        self.ended = asyncio.Event()

    def on_head(self, status: int, headers: CIMultiDictProxy[str]) -> None:
        self.status = status

    def on_data(self, data: bytes) -> None: ...

    def on_end(self) -> None:
        self.ended.set()

    def on_failed(self, error: GatewayError) -> None:
        self.error = error
        self.ended.set()


@pytest.fixture
async def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    found = Names()
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", found.getaddrinfo)
    monkeypatch.setattr(resolving, "FRESH_S", FRESH_S)
    monkeypatch.setattr(resolving, "RETRY_S", FRESH_S)
    return found


@pytest.fixture
async def changes() -> list[str]:
    return []


@pytest.fixture
async def resolver(names: Names, changes: list[str]) -> AsyncIterator[Resolver]:
    running = Resolver(changes.append)
    yield running
    await running.close()


async def aged(names: Names, resolver: Resolver) -> None:
    """Returns once what is known has been looked up again."""
    asked = names.questions
    await asyncio.sleep(FRESH_S)
    await resolver.resolve(NAME, 80)
    await eventually(lambda: names.questions > asked)
    await asyncio.sleep(names.delay_s + 0.01)


async def test_ups_11_an_address_needs_no_look_up(resolver: Resolver, names: Names) -> None:
    assert await resolver.resolve("127.0.0.9", 80) == ["127.0.0.9"]
    assert await resolver.resolve("::1", 80) == ["::1"]
    assert names.questions == 0


async def test_ups_11_one_question_serves_all_who_wait_for_it_and_all_who_come_soon_after(
    resolver: Resolver, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolving, "FRESH_S", 60.0)
    names.delay_s = 0.05
    assert await asyncio.gather(*(resolver.resolve(NAME, 80) for _ in range(20))) == [["127.0.0.1"]] * 20
    assert await resolver.resolve(NAME, 80) == ["127.0.0.1"]
    assert names.questions == 1


async def test_ups_11_a_slow_look_up_blocks_neither_the_loop_nor_the_known_address(resolver: Resolver, names: Names) -> None:
    await resolver.resolve(NAME, 80)
    names.delay_s = 5.0
    await asyncio.sleep(FRESH_S)
    began = time.monotonic()
    assert await resolver.resolve(NAME, 80) == ["127.0.0.1"]
    assert time.monotonic() - began < 2.5  # and not the five seconds of the look-up
    await eventually(lambda: names.questions == 2)


@again_if_untimely
async def test_ups_11_the_real_resolver_runs_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object, **__: object) -> list[Any]:
        time.sleep(0.3)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    running = Resolver()
    asked = asyncio.create_task(running.resolve(NAME, 80))
    lag_s_max = 0.0
    while not asked.done():
        before = time.monotonic()
        await asyncio.sleep(0.005)
        lag_s_max = max(lag_s_max, time.monotonic() - before - 0.005)
    assert asked.result() == ["127.0.0.1"]
    in_time(lag_s_max, 0.05)


@pytest.mark.parametrize(
    "error", [socket.gaierror(socket.EAI_AGAIN, "try again"), OSError("network is down"), UnicodeError("label too long")]
)
async def test_ups_11_a_failing_resolver_keeps_what_is_known(
    resolver: Resolver, names: Names, changes: list[str], error: Exception
) -> None:
    await resolver.resolve(NAME, 80)
    names.addresses, names.error = [], error
    for _ in range(3):
        await aged(names, resolver)
        assert await resolver.resolve(NAME, 80) == ["127.0.0.1"]
    assert changes == []


@pytest.mark.parametrize("error", [socket.gaierror(socket.EAI_NONAME, "no such name"), UnicodeError("label too long")])
async def test_ups_11_a_name_never_known_is_an_error_and_asked_again_later(resolver: Resolver, names: Names, error: Exception) -> None:
    names.addresses, names.error = [], error
    for _ in range(3):
        with pytest.raises(OSError, match="does not resolve"):
            await resolver.resolve(NAME, 80)
    assert names.questions == 1
    names.addresses = ["127.0.0.7"]
    await asyncio.sleep(FRESH_S)
    assert await resolver.resolve(NAME, 80) == ["127.0.0.7"]


async def test_ups_11_a_new_address_is_used_and_told_once(resolver: Resolver, names: Names, changes: list[str]) -> None:
    await resolver.resolve(NAME, 80)
    names.addresses = ["127.0.0.2"]
    await aged(names, resolver)
    assert await resolver.resolve(NAME, 80) == ["127.0.0.2"]
    await aged(names, resolver)
    assert changes == [NAME]


async def test_ups_11_the_cache_is_bounded(resolver: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolving, "NAMES_MAX", 10)
    for number in range(100):
        await resolver.resolve(f"{number}.example", 80)
    assert len(resolver._entries) <= 10


# A pool over it.


@pytest.fixture
async def providers() -> AsyncIterator[tuple[RawProvider, RawProvider]]:
    """The same port at two addresses."""

    async def script(call: RawCall) -> None:
        call.keep = True
        if b"slow" in call.head:
            await asyncio.sleep(0.5)
        await call.write(plain(completion()))

    async with RawProvider() as old:
        new = RawProvider(host="127.0.0.2")
        await new.open(old.port)
        old.script = new.script = script
        yield old, new
        await new.__aexit__()


@pytest.fixture
async def open_pool(names: Names, providers: tuple[RawProvider, RawProvider]) -> AsyncIterator[Callable[[], Pool]]:
    opened: list[Pool] = []

    def retire(_: str) -> None:
        for pool in opened:
            pool.retire()

    resolver = Resolver(retire)

    def open_one() -> Pool:
        opened.append(Pool(Origin(NAME, providers[0].port), resolver=resolver, tls=None, calls_max=100))
        return opened[-1]

    yield open_one
    for pool in opened:
        await pool.close()
    await resolver.close()


async def asked(pool: Pool, request: bytes = REQUEST) -> Listening:
    listening = Listening()
    pool.call(request, listening, connect_s=2.0)
    await asyncio.wait_for(listening.ended.wait(), 5.0)
    return listening


async def test_ups_11_kept_connections_to_an_old_address_are_given_up(
    names: Names, open_pool: Callable[[], Pool], providers: tuple[RawProvider, RawProvider]
) -> None:
    old, new = providers
    pool = open_pool()
    assert (await asked(pool)).status == 200
    slow = asyncio.create_task(asked(pool, REQUEST.replace(b"Host: ", b"X-Is: slow\r\nHost: ")))
    await old.called(2)
    assert (await asked(pool)).status == 200
    assert old.connections == 2 and new.connections == 0
    names.addresses = ["127.0.0.2"]
    await asyncio.sleep(FRESH_S)
    pool.sweep()  # once a second in an edge: no connection is opened, so nobody else asks for the name
    await eventually(lambda: old.open_connections == 1)
    assert (await slow).status == 200  # in use, so it may end in peace
    await eventually(lambda: old.open_connections == 0)
    assert (await asked(pool)).status == 200
    assert (old.connections, new.connections) == (2, 1)


async def test_ups_11_the_next_address_is_tried_when_one_does_not_answer(
    names: Names, open_pool: Callable[[], Pool], providers: tuple[RawProvider, RawProvider]
) -> None:
    old, new = providers
    pool = open_pool()
    await old.__aexit__()
    names.addresses = ["127.0.0.1", "127.0.0.2"]
    assert (await asked(pool)).status == 200
    assert len(new.calls) == 1
    await old.open()


async def test_ups_11_a_name_that_does_not_resolve_in_time_fails_to_connect(names: Names, open_pool: Callable[[], Pool]) -> None:
    names.delay_s = 5.0
    listening = Listening()
    began = time.monotonic()
    pool = open_pool()
    pool.call(REQUEST, listening, connect_s=0.2)
    await asyncio.wait_for(listening.ended.wait(), 20.0)
    assert isinstance(listening.error, ConnectFailed)
    assert time.monotonic() - began < 2.5  # and not the five seconds of the look-up
    assert pool.calls == 0


async def test_a_call_given_up_while_connecting_leaves_a_connection_for_the_next(
    names: Names, open_pool: Callable[[], Pool], providers: tuple[RawProvider, RawProvider]
) -> None:
    names.delay_s = 0.1
    pool = open_pool()
    call: Call = pool.call(REQUEST, Listening(), connect_s=2.0)
    call.cancel()
    assert pool.calls == 0 and pool.in_use
    await eventually(lambda: providers[0].connections == 1)
    assert (await asked(pool)).status == 200
    assert (providers[0].connections, len(providers[0].calls)) == (1, 1)
