"""Supervision alone, with edges and a control of a few lines: start, death, hang, roll, reload, drain."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.link.runtime import ADMIN
from tests.conftest import RunningGateway, eventually, fetch, render_catalog
from tests.timing import again_if_untimely, in_time

pytestmark = pytest.mark.timeout(60)
StartFake = Callable[..., RunningGateway]
CATALOG = render_catalog({"north": "http://127.0.0.1:9/v1"})


@pytest.fixture
def make_fake(tmp_path: Path) -> Iterator[StartFake]:
    made: list[RunningGateway] = []

    def make(*, workers: int = 2, **server: Any) -> RunningGateway:
        settings = {"server": {"drain_s": 1.0, **server}}
        made.append(
            RunningGateway(tmp_path / str(len(made)), CATALOG, settings=settings, workers=workers, module="tests.processes.fake_gateway")
        )
        return made[-1]

    with contextlib.ExitStack() as closing:
        yield make
        for gateway in made:
            closing.callback(gateway.close)


@pytest.fixture
def start_fake(make_fake: StartFake) -> StartFake:
    return lambda **options: make_fake(**options).start()


async def facts(gateway: RunningGateway) -> list[tuple[str, Any]]:
    """What control was told, in order."""
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(gateway.folder / "run" / ADMIN))) as session:
        async with session.get("http://control/facts") as answer:
            return [(path, fact) for path, fact in await answer.json()]


def serving_pid(gateway: RunningGateway) -> int:
    return int(fetch(f"{gateway.url}/pid")[1])


def test_ready_is_the_only_line_on_stdout(start_fake: StartFake) -> None:
    gateway = start_fake()
    health = gateway.health()
    assert health["status"] == "ok"
    assert health["supervisor"] == gateway.pid
    assert len(health["edges"]) == 2
    assert gateway.operations_url.endswith(f":{health['operations_port']}")
    assert gateway.ready_status() == 200
    assert serving_pid(gateway) in health["edges"]
    assert gateway.stop() == 0
    assert gateway.stdout == [f"ready {gateway.url}"]


def test_operations_serve_three_paths_and_nothing_else(start_fake: StartFake) -> None:
    gateway = start_fake(workers=1)
    assert fetch(f"{gateway.operations_url}/metrics") == (200, b"up 1\n")
    status, body = fetch(f"{gateway.operations_url}/other")
    assert status == 404
    assert json.loads(body)["error"]["code"] == 404
    status, body = fetch(f"{gateway.operations_url}/healthz", body=b"{}")
    assert status == 405
    assert json.loads(body)["error"]["code"] == 405


@again_if_untimely
def test_operations_answer_while_edge_and_control_hang(start_fake: StartFake) -> None:
    gateway = start_fake(workers=1, hang_s=0)
    health = gateway.health()
    for pid in (health["control"], *health["edges"]):
        os.kill(pid, signal.SIGSTOP)
    try:
        before = time.monotonic()
        status, body = fetch(f"{gateway.operations_url}/metrics")
        assert status == 503
        assert "control does not answer" in json.loads(body)["error"]["message"]
        in_time(time.monotonic() - before, 3.0)
        assert gateway.health()["edges"] == health["edges"]
        assert gateway.health()["status"] == "degraded"
        assert gateway.ready_status() == 503
    finally:
        for pid in (health["control"], *health["edges"]):
            os.kill(pid, signal.SIGCONT)


@again_if_untimely
async def test_ops_02_dead_edge_is_replaced_within_two_seconds_and_control_is_told(start_fake: StartFake) -> None:
    gateway = start_fake()
    died = gateway.logged("process_ready", role="edge", slot=1)
    os.kill(died["child"], signal.SIGKILL)
    before = time.monotonic()
    gateway.logged("process_ready", role="edge", slot=1, count=2)
    in_time(time.monotonic() - before, 2.0)
    assert died["child"] not in gateway.health()["edges"]
    await eventually(lambda: gateway.health()["status"] == "ok")
    told: list[tuple[str, Any]] = []
    async with asyncio.timeout(20.0):
        while len(told) < 3:
            told = await facts(gateway)
    assert ("/reaped", {"slot": 1, "incarnation": died["incarnation"]}) in told
    assert [fact for path, fact in told if path == "/supervisor"] == [
        {"starts": {"edge": 2, "control": 1}},
        {"starts": {"edge": 3, "control": 1}},
    ]


def test_connections_queued_at_a_dead_edge_are_served_by_its_successor(start_fake: StartFake) -> None:
    gateway = start_fake(workers=1)
    edge = gateway.health()["edges"][0]
    os.kill(edge, signal.SIGSTOP)
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    with contextlib.ExitStack() as opened:
        queued = [opened.enter_context(socket.create_connection((host, int(port)))) for _ in range(20)]
        os.kill(edge, signal.SIGKILL)
        for each in queued:
            each.sendall(b"GET /pid HTTP/1.1\r\n\r\n")
        for each in queued:
            each.settimeout(10.0)
            assert each.recv(100).startswith(b"HTTP/1.1 200")


async def test_control_that_was_away_is_told_of_every_reaped_edge(start_fake: StartFake) -> None:
    gateway = start_fake(hang_s=0)
    first = gateway.health()["control"]
    os.kill(first, signal.SIGSTOP)
    died = gateway.logged("process_ready", role="edge", slot=0)
    os.kill(died["child"], signal.SIGKILL)
    gateway.logged("process_ready", role="edge", slot=0, count=2)
    os.kill(first, signal.SIGKILL)
    gateway.logged("process_ready", role="control", count=2)
    told: list[tuple[str, Any]] = []
    async with asyncio.timeout(20.0):
        while len(told) < 2:
            told = await facts(gateway)
    assert sorted(told, key=lambda fact: fact[0]) == [
        ("/reaped", {"slot": 0, "incarnation": died["incarnation"]}),
        ("/supervisor", {"starts": {"edge": 3, "control": 2}}),
    ]


async def test_ops_02_crash_loop_backs_off_and_turns_readiness_red(start_fake: StartFake) -> None:
    gateway = start_fake()
    (gateway.folder / "edge-dies").touch()
    os.kill(gateway.health()["edges"][0], signal.SIGKILL)
    await eventually(lambda: gateway.ready_status() == 503, 20.0)
    assert "slot 0" in json.loads(fetch(f"{gateway.operations_url}/readyz")[1])["reason"]
    assert gateway.health()["status"] == "degraded"
    gateway.logged("process_start_delayed", role="edge", slot=0, timeout_s=10.0)
    (gateway.folder / "edge-dies").unlink()
    await eventually(lambda: gateway.ready_status() == 200, 20.0)
    assert sum(line["event"] == "process_started" and line["role"] == "edge" and line["slot"] == 0 for line in gateway.log) <= 10


@pytest.mark.parametrize("role", ["edge", "control"])
@again_if_untimely
def test_ops_03_hung_process_is_replaced(start_fake: StartFake, role: str) -> None:
    gateway = start_fake(hang_s=1.0)
    hung = gateway.logged("process_ready", role=role, slot=0)
    os.kill(hung["child"], signal.SIGSTOP)
    before = time.monotonic()
    gateway.logged("process_hung", child=hung["child"])
    gateway.logged("process_ready", role=role, slot=0, count=2)
    in_time(time.monotonic() - before, 2.0)  # hang_s, and a second for two cores that others use as well
    health = gateway.health()
    assert hung["child"] not in [health["control"], *health["edges"]]


async def test_a_supervisor_that_was_stopped_itself_kills_nobody(start_fake: StartFake) -> None:
    gateway = start_fake(hang_s=1.0)
    before = gateway.health()
    gateway.signal(signal.SIGSTOP)
    await asyncio.sleep(2.5)  # the passing of time is what is tested
    gateway.signal(signal.SIGCONT)
    await asyncio.sleep(1.2)
    assert gateway.health() == before
    assert not [line for line in gateway.log if line["event"] == "process_hung"]


def test_a_port_in_use_is_one_line_and_exit_code_1(make_fake: StartFake) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        gateway = make_fake(port=taken.getsockname()[1])
        gateway.spawn()
        assert gateway.wait() == 1
        assert gateway.log == [{"error": f"cannot listen on 127.0.0.1:{taken.getsockname()[1]}: Address already in use"}]
        assert gateway.stdout == []


def test_operations_port_in_use_is_named(make_fake: StartFake) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        gateway = make_fake()
        gateway.write_settings({"operations": {"port": taken.getsockname()[1]}})
        gateway.spawn()
        assert gateway.wait() == 1
        assert "[operations]" in gateway.log[-1]["error"]


def test_problems_of_the_configuration_are_one_line_each(make_fake: StartFake) -> None:
    gateway = make_fake(hang_s=-1, colour="blue")
    gateway.spawn()
    assert gateway.wait() == 1
    assert {line["key"] for line in gateway.log} == {"server.hang_s", "server.colour"}


def test_a_journal_that_is_no_folder_stops_the_start_by_name(make_fake: StartFake) -> None:
    gateway = make_fake()
    (gateway.folder / "journal").touch()
    gateway.spawn()
    assert gateway.wait() == 1
    [problem] = gateway.log
    assert (problem["key"], problem["message"]) == ("journal.dir", f"{gateway.folder / 'journal'} is not a folder")


@pytest.mark.parametrize("role", ["edge", "control"])
def test_what_never_gets_ready_ends_the_start_with_a_reason(make_fake: StartFake, role: str) -> None:
    gateway = make_fake(workers=1)
    (gateway.folder / f"{role}-dies").touch()
    gateway.spawn()
    assert gateway.wait(15.0) == 1
    assert gateway.log[-1]["error"].startswith(f"{role} exited with status 1, 5 times before it was ready")
    assert gateway.stdout == []


@again_if_untimely
async def test_ops_01_drain_is_red_first_and_finishes_every_stream(start_fake: StartFake) -> None:
    gateway = start_fake(drain_s=10.0)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        streams = [await session.get(f"{gateway.url}/stream") for _ in range(20)]
        gateway.signal(signal.SIGTERM)
        before = time.monotonic()
        await eventually(lambda: gateway.ready_status() == 503)
        try:
            async with session.get(f"{gateway.url}/pid") as late:  # lame duck: red, and still open
                assert late.status == 200
        except aiohttp.ClientConnectorError:
            in_time(time.monotonic() - before, 0.8)  # later it may be closed
            raise
        assert gateway.health()["status"] == "draining"
        gateway.signal(signal.SIGTERM)  # a second one does not hurry
        for stream in streams:
            assert (await stream.text()).split() == [str(number) for number in range(10)]
            stream.release()
    assert gateway.wait() == 0
    order = [line["role"] for line in gateway.log if line["event"] == "process_ended"]
    assert order == ["edge", "edge", "control"]


def test_three_signals_within_a_second_end_it_at_once(start_fake: StartFake) -> None:
    gateway = start_fake(drain_s=30.0)
    for edge in gateway.health()["edges"]:
        os.kill(edge, signal.SIGSTOP)
    before = time.monotonic()
    gateway.signal(signal.SIGINT)
    gateway.logged("drain_started")
    gateway.signal(signal.SIGTERM)
    time.sleep(0.05)  # two pending signals of one kind are one
    gateway.signal(signal.SIGINT)
    assert gateway.wait() == 1
    assert time.monotonic() - before < 10.0  # and not when drain_s is over


@again_if_untimely
def test_an_edge_that_does_not_leave_is_killed_after_drain_s(start_fake: StartFake) -> None:
    gateway = start_fake(workers=1, drain_s=0.4, hang_s=0)
    os.kill(gateway.health()["edges"][0], signal.SIGSTOP)
    before = time.monotonic()
    assert gateway.stop() == 0
    in_time(time.monotonic() - before, 5.0, at_least=2.0)
    gateway.logged("process_killed", role="edge")


async def test_sigusr2_rolls_every_edge_and_loses_no_request(start_fake: StartFake) -> None:
    gateway = start_fake(drain_s=10.0)
    before = set(gateway.health()["edges"])
    statuses: list[int] = []
    rolled = False

    async def ask(session: aiohttp.ClientSession) -> None:
        while not rolled:
            async with session.get(f"{gateway.url}/pid", headers={"Connection": "close"}) as answer:
                statuses.append(answer.status)
            await asyncio.sleep(0.005)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(ask(session))
            stream = await session.get(f"{gateway.url}/stream")
            gateway.signal(signal.SIGUSR2)
            await asyncio.to_thread(gateway.logged, "rolled", timeout_s=15.0)
            assert len((await stream.text()).split()) == 10
            rolled = True
    assert set(statuses) == {200}
    assert len(statuses) > 20
    after = set(gateway.health()["edges"])
    assert len(after) == 2
    assert not after & before


async def test_a_roll_to_edges_that_die_keeps_the_old(start_fake: StartFake) -> None:
    gateway = start_fake()
    before = gateway.health()
    (gateway.folder / "edge-dies").touch()
    gateway.signal(signal.SIGUSR2)
    await asyncio.to_thread(gateway.logged, "roll_stopped", slot=0)
    assert gateway.health() == before
    assert gateway.ready_status() == 200


def test_sighup_reloads_the_catalog_and_logs_a_refusal_with_file_and_key(start_fake: StartFake) -> None:
    gateway = start_fake(workers=1)
    gateway.signal(signal.SIGHUP)
    assert gateway.logged("catalog_reloaded")["answer"] == {"revision": "2"}
    (gateway.folder / "catalog-is-bad").touch()
    gateway.signal(signal.SIGHUP)
    refused = gateway.logged("catalog_refused")
    assert refused["answer"]["problems"] == [{"file": "catalog.toml", "key": "models[0].id"}]


async def test_kill_9_of_the_supervisor_leaves_nothing(start_fake: StartFake) -> None:
    gateway = start_fake()
    assert len(gateway.processes()) == 4
    gateway.signal(signal.SIGKILL)
    await eventually(lambda: not gateway.processes())


def test_signals_to_the_whole_group_drain_in_order(start_fake: StartFake) -> None:
    """Ctrl-C in a terminal, `timeout`, and shells signal the whole group."""
    gateway = start_fake()
    os.killpg(gateway.pid, signal.SIGINT)
    assert gateway.wait() == 0
    assert [line["role"] for line in gateway.log if line["event"] == "process_ended"] == ["edge", "edge", "control"]
