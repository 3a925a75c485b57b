"""Control may die or hang: known keys and running streams do not notice, and nobody is told a lie about a key.

The last tests give an edge a control of their own making, to say and unsay what a store would.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from bench.behaviour import Behaviour
from bench.provider import Provider
from gateway.config import load_settings, read_catalog
from gateway.domain.keys import KeyRecord, digest, label, new_secret
from gateway.link.messages import Grant, Want
from gateway.link.pulse import ChildArgs
from gateway.link.runtime import LINK, RuntimeDir
from gateway.link.server import LinkServer
from gateway.log import Log
from tests.conftest import MODEL, REPOSITORY, RunningGateway, StartGateway, eventually, render_catalog
from tests.processes.test_gateway import SLOW, Callers, asking, calling, start_two, streams_begun
from tests.provider_caller import connected
from tests.timing import again_if_untimely, in_time

REPLACED_S = 2.0


async def ask_with(session: aiohttp.ClientSession, url: str, key: str) -> tuple[int, str | None]:
    """Status and Retry-After of one plain chat."""
    body = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "Hello"}]}
    headers = {"Authorization": f"Bearer {key}", "Connection": "close"}
    async with session.post(f"{url}/api/v1/chat/completions", json=body, headers=headers) as answer:
        await answer.read()
        return answer.status, answer.headers.get("Retry-After")


async def know(callers: Callers) -> None:
    """Every edge has seen the callers' key."""
    assert {await callers.ask() for _ in range(30)} == {200}


async def rejoined(gateway: RunningGateway, edges: int) -> None:
    """The second control has them all. What the first one logged last may have died with it."""
    control = await asyncio.to_thread(gateway.logged, "process_ready", role="control", count=2)
    await asyncio.to_thread(gateway.logged, "edge_joined", count=edges, pid=control["child"])


@again_if_untimely
async def test_killed_control_is_replaced_and_its_edges_serve_on(start_gateway: StartGateway, provider: Provider) -> None:
    provider.set_behaviour(SLOW)
    gateway = start_two(start_gateway, provider)
    unseen = await asyncio.to_thread(gateway.create_account, "grace@example.com")
    control = gateway.logged("process_ready", role="control")["child"]
    async with calling(gateway) as callers, asyncio.TaskGroup() as tasks:
        streams = await streams_begun(tasks, callers, 20)
        provider.set_behaviour(Behaviour())
        await know(callers)
        async with asking(callers), aiohttp.ClientSession() as session:
            os.kill(control, signal.SIGKILL)
            killed = time.monotonic()
            meanwhile = [await ask_with(session, gateway.url, unseen["key"])]
            await asyncio.to_thread(gateway.logged, "process_ready", role="control", count=2)
            in_time(time.monotonic() - killed, REPLACED_S)
            await rejoined(gateway, 2)
            afterwards = await ask_with(session, gateway.url, unseen["key"])
            wrong = await ask_with(session, gateway.url, "sk-or-v1-wrong")
            created = await asyncio.to_thread(gateway.create_account, "new@example.com")
            new = [await ask_with(session, gateway.url, created["key"]) for _ in range(10)]
            served = callers.outcomes[200]
            await eventually(lambda: callers.outcomes[200] >= served + 20)
    assert set(callers.outcomes) == {200}
    assert [stream.result()[-1] for stream in streams] == [None] * 20
    assert meanwhile == [(503, "1")]
    assert (afterwards, wrong) == ((200, None), (401, None))
    assert new == [(200, None)] * 10


@again_if_untimely
async def test_hung_control_is_replaced_and_an_unknown_key_is_never_called_wrong(start_gateway: StartGateway, provider: Provider) -> None:
    gateway = start_two(start_gateway, provider, hang_s=1.0)
    unseen = await asyncio.to_thread(gateway.create_account, "grace@example.com")
    control = gateway.logged("process_ready", role="control")["child"]
    async with calling(gateway) as callers, aiohttp.ClientSession() as session:
        await know(callers)
        async with asking(callers):
            os.kill(control, signal.SIGSTOP)
            stopped = time.monotonic()
            meanwhile = await asyncio.gather(*(ask_with(session, gateway.url, key) for key in (unseen["key"], "sk-or-v1-wrong") * 3))
            await asyncio.to_thread(gateway.logged, "process_ready", role="control", count=2)
            in_time(time.monotonic() - stopped, 1.0 + REPLACED_S)
            await rejoined(gateway, 2)
            assert await ask_with(session, gateway.url, unseen["key"]) == (200, None)
            assert await ask_with(session, gateway.url, "sk-or-v1-wrong") == (401, None)
    assert set(meanwhile) == {(503, "1")}
    assert set(callers.outcomes) == {200}


async def test_a_runtime_directory_that_was_cleared_away_is_made_anew(start_gateway: StartGateway, provider: Provider) -> None:
    """Without its sockets nobody would find control any more: no new edge, no command, no route of its own."""
    gateway = start_two(start_gateway, provider)
    async with calling(gateway) as callers:
        await know(callers)
        shutil.rmtree(gateway.folder / "run")
        os.kill(gateway.health()["edges"][0], signal.SIGKILL)
        await rejoined(gateway, 2)
        assert str(gateway.folder / "run") in gateway.logged("sockets_lost")["reason"]
        await know(callers)
        await asyncio.to_thread(gateway.admin, "credits", "add", "--account", gateway.account_id, "--usd", "1")
    assert await asyncio.to_thread(gateway.stop) == 0


async def test_routes_of_control_say_that_they_come_back(start_gateway: StartGateway, provider: Provider) -> None:
    gateway = start_gateway({"north": f"{provider.url}/v1"})
    control = gateway.logged("process_ready", role="control")["child"]
    os.kill(control, signal.SIGKILL)
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{gateway.url}/api/v1/models") as answer:
            assert answer.status == 503
            assert answer.headers["Retry-After"] == "1"
            assert (await answer.json())["error"]["code"] == 503
        await asyncio.to_thread(gateway.logged, "process_ready", role="control", count=2)
        async with session.get(f"{gateway.url}/api/v1/models") as answer:
            assert answer.status == 200


async def test_a_crowd_that_comes_at_once_waits_for_control_and_nobody_is_told_that_it_restarts(
    start_gateway: StartGateway, provider: Provider
) -> None:
    gateway = start_gateway({"north": f"{provider.url}/v1"})
    control = gateway.logged("process_ready", role="control")["child"]
    async with contextlib.AsyncExitStack() as connections, aiohttp.ClientSession() as session:
        crowd = [await connections.enter_async_context(connected(gateway)) for _ in range(400)]
        callers = Callers(gateway, session)
        await know(callers)
        os.kill(control, signal.SIGSTOP)  # it takes nobody in meanwhile
        try:
            for caller in crowd:
                caller.writer.write(b"GET /api/v1/models HTTP/1.1\r\nHost: gateway.example\r\n\r\n")
            await callers.ask()  # the edge has a turn after them
        finally:
            os.kill(control, signal.SIGCONT)
        async with asyncio.timeout(20.0):
            statuses = [(await caller.head())[0] for caller in crowd]
    assert set(statuses) == {200}


async def test_ops_08_reloads_good_and_bad_cost_no_request_and_no_stream(start_gateway: StartGateway, provider: Provider) -> None:
    provider.set_behaviour(SLOW)
    north = {"north": f"{provider.url}/v1"}
    gateway = start_two(start_gateway, provider)

    async def listed(session: aiohttp.ClientSession) -> set[str]:
        async with session.get(f"{gateway.url}/api/v1/models") as answer:
            return {row["id"] for row in (await answer.json())["data"]}

    async with (
        Provider(name="South") as south,
        calling(gateway) as callers,
        asyncio.TaskGroup() as tasks,
        aiohttp.ClientSession() as session,
    ):
        streams = await streams_begun(tasks, callers, 10)
        provider.set_behaviour(Behaviour())
        async with asking(callers):
            good = render_catalog({**north, "south": f"{south.url}/v1"}, {MODEL: ("north",), "acme/new": ("south",)})
            gateway.catalog.write_text(good)
            gateway.signal(signal.SIGHUP)
            await asyncio.to_thread(gateway.logged, "catalog_reloaded")
            assert await listed(session) == {MODEL, "acme/new"}
            body = {"model": "acme/new", "messages": [{"role": "user", "content": "Hello"}]}
            headers = {"Authorization": f"Bearer {gateway.key}", "Connection": "close"}
            for _ in range(20):  # every edge knows
                async with session.post(f"{gateway.url}/api/v1/chat/completions", json=body, headers=headers) as answer:
                    assert answer.status == 200
            for count, bad in enumerate(("[[", good.replace('"north"', '"nobody"', 1), good.replace("131072", "-1")), start=1):
                gateway.catalog.write_text(bad)
                gateway.signal(signal.SIGHUP)
                await asyncio.to_thread(gateway.logged, "catalog_refused", count=count)
                assert await listed(session) == {MODEL, "acme/new"}
            # The streams' own provider goes: they end in peace.
            gateway.catalog.write_text(render_catalog({"south": f"{south.url}/v1"}, {MODEL: ("south",)}))
            gateway.signal(signal.SIGHUP)
            await asyncio.to_thread(gateway.logged, "catalog_reloaded", count=2)
            served = len(south.books.entries)
            await eventually(lambda: len(south.books.entries) >= served + 5)
            assert await listed(session) == {MODEL}
    assert set(callers.outcomes) == {200}
    assert [stream.result()[-1] for stream in streams] == [None] * 10


# An edge and a control of the test's own.


class Stand:
    """One edge process and the link's server in this process. `keys` is what the store would say."""

    def __init__(self, folder: Path, url: str) -> None:
        folder.mkdir()
        (folder / "catalog.toml").write_text(render_catalog({"north": url}))
        self.config = folder / "gateway.toml"
        self.config.write_text('[server]\nruntime_dir = "run"\ndrain_s = 1.0\n[journal]\ndir = "journal"\n')
        self.keys: dict[str, KeyRecord] = {}
        self.joined = asyncio.Event()
        self.url = ""
        self.link: LinkServer
        self._controls = 0
        self._settings = load_settings(self.config)
        self._runtime = RuntimeDir(Path(self._settings.server.runtime_dir))

    def new_key(self, **changed: Any) -> str:
        """A key of the store; its secret."""
        secret = new_secret()
        record = KeyRecord(digest=digest(secret), account_id="user_1", name="one", label=label(secret))
        self.keys[record.digest] = msgspec.structs.replace(record, **changed)
        return secret

    def _grant(self, edge: str, want: Want) -> None:
        self.link.send_to(edge, Grant(want.resource, 10**12))

    async def open_link(self) -> None:
        self._controls += 1

        async def find(digests: Iterable[str]) -> dict[str, KeyRecord]:
            return {each: self.keys[each] for each in digests if each in self.keys}

        catalog, _ = read_catalog(self._settings)
        self.joined.clear()
        self.link = LinkServer(
            address=self._runtime.socket(LINK),
            incarnation=f"control-{self._controls}",
            catalog=catalog,
            find_keys=find,
            on_joined=lambda _: self.joined.set(),
            on_left=lambda _: None,
            on_report=lambda *_: None,
            on_want=self._grant,
            log=Log("control"),
        )
        await self.link.start()

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Link and edge."""
        await self.open_link()
        try:
            async with self.running_edge():
                yield
        finally:
            await self.link.stop()

    @contextlib.asynccontextmanager
    async def running_edge(self) -> AsyncIterator[None]:
        with contextlib.ExitStack() as opened:
            listener = opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))
            ours, theirs = (opened.enter_context(end) for end in socket.socketpair())
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            args = ChildArgs(config=str(self.config), incarnation="edge-1", pulse_fd=theirs.fileno(), slot=0, listen_fd=listener.fileno())
            edge = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "gateway.edge", msgspec.json.encode(args).decode(),
                pass_fds=(listener.fileno(), theirs.fileno()), stderr=asyncio.subprocess.DEVNULL, cwd=REPOSITORY,
            )  # fmt: skip
            try:
                await asyncio.wait_for(self.joined.wait(), 10.0)
                yield
            finally:
                edge.terminate()
                await asyncio.wait_for(edge.wait(), 10.0)
                ours.close()


@pytest.fixture
async def stand(tmp_path: Path, provider: Provider) -> AsyncIterator[Stand]:
    made = Stand(tmp_path / "stand", f"{provider.url}/v1")
    async with made.opened():
        yield made


@again_if_untimely
async def test_aut_06_a_key_is_refused_within_a_second_of_its_revocation_on_warm_connections(stand: Stand) -> None:
    gone, disabled, expired = stand.new_key(), stand.new_key(), stand.new_key()
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]})

    async def refused_after(session: aiohttp.ClientSession, key: str) -> float:
        began = time.monotonic()
        while time.monotonic() - began < 10.0:
            headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
            async with session.post(f"{stand.url}/api/v1/chat/completions", data=body, headers=headers) as answer:
                error = await answer.json()
                if answer.status != 200:
                    assert (answer.status, error["error"]["code"]) == (401, 401)
                    break
        return time.monotonic() - began

    async with aiohttp.ClientSession() as session:
        for key in (gone, disabled, expired):
            assert (await ask_with(session, stand.url, key))[0] == 200
        record = stand.keys.pop(digest(gone))
        stand.link.push_key(record.digest, None)
        in_time(await refused_after(session, gone), 1.0)
        stand.keys[digest(disabled)] = msgspec.structs.replace(stand.keys[digest(disabled)], disabled=True)
        stand.link.push_key(digest(disabled), stand.keys[digest(disabled)])
        in_time(await refused_after(session, disabled), 1.0)
        stand.keys[digest(expired)] = msgspec.structs.replace(stand.keys[digest(expired)], expires_at_s=int(time.time()))
        stand.link.push_key(digest(expired), stand.keys[digest(expired)])
        in_time(await refused_after(session, expired), 1.0)


@again_if_untimely
async def test_a_key_made_just_after_it_was_tried_in_vain_works_at_once(stand: Stand) -> None:
    secret = stand.new_key()
    record = stand.keys.pop(digest(secret))
    async with aiohttp.ClientSession() as session:
        assert (await ask_with(session, stand.url, secret))[0] == 401
        stand.keys[record.digest] = record
        stand.link.push_key(record.digest, record)
        pushed = time.monotonic()
        async with asyncio.timeout(20.0):
            while (await ask_with(session, stand.url, secret))[0] != 200:
                pass
        in_time(time.monotonic() - pushed, 1.0)


@again_if_untimely
async def test_a_revocation_that_an_edge_missed_is_made_up_for_when_it_joins_again(stand: Stand) -> None:
    missed, kept = stand.new_key(), stand.new_key()
    async with aiohttp.ClientSession() as session:
        for key in (missed, kept):
            assert (await ask_with(session, stand.url, key))[0] == 200
        await stand.link.stop()
        del stand.keys[digest(missed)]
        for key in (missed, kept):  # control is away: what is known stands
            assert (await ask_with(session, stand.url, key))[0] == 200
        await stand.open_link()
        await asyncio.wait_for(stand.joined.wait(), 20.0)
        joined = time.monotonic()
        async with asyncio.timeout(20.0):
            while (await ask_with(session, stand.url, missed))[0] != 401:
                pass
        in_time(time.monotonic() - joined, 1.0)
        assert (await ask_with(session, stand.url, kept))[0] == 200
