"""Kept content through a whole control process: from an edge's link to the disk, over kill and rotation, and nowhere in clear."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, UnixConnector

from gateway import cli
from gateway.control import administration
from gateway.control.content.store import ROTATED_AT_ONCE, ContentStore
from gateway.domain.content_keys import new_key, read_keys
from gateway.link.messages import VERSION, Content, EdgeMessage, Hello, frame
from gateway.link.runtime import ADMIN, LINK, PUBLIC
from tests.control import kept
from tests.control.process import ControlProcess, write_config

VARIABLE = "GATEWAY_CONTENT_KEY"
CANARY = "canary-5c1b7e"


def said(number: int, account: str = "user_ann", text: str = "") -> Content:
    """An exchange that began just now: real controls delete what is old as they start."""
    return kept.said(number, account, text, created_at_ms=int(time.time() * 1000))


@contextlib.asynccontextmanager
async def edge(control: ControlProcess, incarnation: str = "edge-a") -> AsyncIterator[asyncio.StreamWriter]:
    """The end of a link that has said hello. What comes back is read and thrown away."""
    reader, writer = await asyncio.open_unix_connection(str(control.runtime / LINK))
    reading = asyncio.create_task(reader.read())
    send(writer, Hello(version=VERSION, slot=0, incarnation=incarnation, pid=1))
    try:
        yield writer
    finally:
        writer.close()
        await reading


def send(writer: asyncio.StreamWriter, *messages: EdgeMessage) -> None:
    writer.writelines(map(frame, messages))


async def counted(control: ControlProcess, series: str) -> float:
    _, text, _ = await control.ask(ADMIN, "GET", "/metrics")
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(series))


async def count_of(control: ControlProcess, series: str, count: float) -> None:
    """Until so many are counted."""
    async with asyncio.timeout(10):
        while await counted(control, series) < count:
            await asyncio.sleep(0.05)


async def new_account(control: ControlProcess, email: str, *, log_prompts: bool = True) -> dict[str, Any]:
    status, account, _ = await control.ask(ADMIN, "POST", "/accounts", {"email": email})
    assert status == 200
    status, rules, _ = await control.ask(ADMIN, "POST", "/rules", {"account_id": account["account_id"], "log_prompts": log_prompts})
    assert (status, rules["log_prompts"]) == (200, log_prompts)
    found: dict[str, Any] = account
    return found


async def read_back(control: ControlProcess, content: Content, key: str) -> tuple[int, Any]:
    """Status and JSON of `/generation/content`."""
    async with ClientSession("http://control", connector=UnixConnector(str(control.runtime / PUBLIC))) as session:
        headers = {"Authorization": f"Bearer {key}"}
        async with session.get("/api/v1/generation/content", params={"id": content.generation_id}, headers=headers) as answer:
            return answer.status, await answer.json()


def stop(control: ControlProcess) -> None:
    assert control.terminate() == 0
    control.kill()  # nothing is left of it but the test's end of its pulse


def start(control: ControlProcess, keys: str) -> None:
    control.environ[VARIABLE] = keys
    control.start()


def run(config: Path, *words: str, keys: str = "") -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, VARIABLE: keys}
    command = [sys.executable, "-m", "gateway", *words, "--config", str(config)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=False)


def on_disk(folder: Path) -> dict[str, bytes]:
    """Every file below, sockets aside."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def test_what_edges_tell_is_stored_and_nowhere_on_the_disk_or_in_a_log_in_clear(tmp_path: Path) -> None:
    with ControlProcess(write_config(tmp_path), {VARIABLE: new_key()}) as control:
        ann = await new_account(control, "ann@example.com")
        bob = await new_account(control, "bob@example.com", log_prompts=False)
        ours = [said(number, ann["account_id"], CANARY) for number in range(50)]
        async with edge(control) as writer:
            send(writer, *ours, said(100, bob["account_id"], CANARY), said(101, "user_nobody", CANARY))
            await count_of(control, 'gateway_content_dropped_total{reason="off"}', 2)
            await count_of(control, "gateway_content_stored_total", 50)
        running = on_disk(tmp_path)
        status, body = await read_back(control, ours[7], ann["key"])
        assert status == 200 and body["data"]["output"]["completion"] == f"answer {CANARY}"
        assert (await read_back(control, ours[7], bob["key"]))[0] == (await read_back(control, said(100), bob["key"]))[0] == 404
        assert control.terminate() == 0
    for files in (running, on_disk(tmp_path)):
        assert any(name.endswith("/content.sqlite") for name in files) and any(name.endswith("/control.log") for name in files)
        assert not [name for name, data in files.items() if CANARY.encode() in data]


async def test_off_by_default_stores_nothing(tmp_path: Path) -> None:
    with ControlProcess(write_config(tmp_path), {VARIABLE: new_key()}) as control:
        _, account, _ = await control.ask(ADMIN, "POST", "/accounts", {"email": "ann@example.com"})
        async with edge(control) as writer:
            send(writer, said(1, account["account_id"], CANARY))
            await count_of(control, 'gateway_content_dropped_total{reason="off"}', 1)
        assert (await read_back(control, said(1), account["key"]))[0] == 404
        assert await counted(control, "gateway_content_stored_total") == 0


async def test_a_control_that_is_killed_loses_nothing_that_was_counted(tmp_path: Path) -> None:
    with ControlProcess(write_config(tmp_path), {VARIABLE: new_key()}) as control:
        account = await new_account(control, "ann@example.com")
        async with edge(control) as writer:
            send(writer, *(said(number, account["account_id"]) for number in range(20)))
            await count_of(control, "gateway_content_stored_total", 20)
        control.kill()
        control.start()
        for number in range(20):
            assert (await read_back(control, said(number), account["key"]))[0] == 200
        assert await counted(control, "gateway_content_stored_total") >= 20


async def test_keys_are_rotated_while_control_runs_and_while_it_does_not(tmp_path: Path) -> None:
    old, new, newest = new_key(), new_key(), new_key()
    config = write_config(tmp_path)
    with ControlProcess(config, {VARIABLE: old}) as control:
        account = await new_account(control, "ann@example.com")
        async with edge(control) as writer:
            send(writer, *(said(number, account["account_id"], CANARY) for number in range(40)))
            await count_of(control, "gateway_content_stored_total", 40)
        stop(control)
        start(control, f"{new},{old}")
        done = await asyncio.to_thread(run, config, "content", "rotate")  # the command's own environment has no say
        assert (done.returncode, json.loads(done.stdout)) == (0, {"rotated": 40, "unreadable": 0}), done.stderr
        assert json.loads((await asyncio.to_thread(run, config, "content", "rotate")).stdout) == {"rotated": 0, "unreadable": 0}
        stop(control)

        lost = await asyncio.to_thread(lambda: run(config, "content", "rotate", keys=newest))
        assert (lost.returncode, json.loads(lost.stdout)) == (1, {"rotated": 0, "unreadable": 40})
        done = await asyncio.to_thread(lambda: run(config, "content", "rotate", keys=f"{newest},{new}"))
        assert (done.returncode, json.loads(done.stdout)) == (0, {"rotated": 40, "unreadable": 0})
        start(control, newest)
        status, body = await read_back(control, said(39), account["key"])
        assert status == 200 and CANARY in body["data"]["output"]["completion"]
        stop(control)
        start(control, old)
        status, body = await read_back(control, said(39), account["key"])
        assert status == 500 and "which the gateway was not given" in body["error"]["message"] and CANARY not in str(body)
    assert not any(key in str(on_disk(tmp_path)) for key in (old, new, newest))


async def test_a_rotation_goes_on_over_as_many_answers_as_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = new_key(), new_key()
    config = write_config(tmp_path)
    store = ContentStore(tmp_path / "var/content.sqlite", read_keys(old), total_bytes_max=1 << 30)
    await store.add([said(number) for number in range(ROTATED_AT_ONCE * 3)])  # so that the last part is an empty one
    await store.close()
    monkeypatch.setenv(VARIABLE, f"{new},{old}")
    monkeypatch.setattr(administration, "ROTATION_S", 0.0)
    assert await asyncio.to_thread(cli.main, ["content", "rotate", "--config", str(config)]) == 0
    assert json.loads(capsys.readouterr().out) == {"rotated": ROTATED_AT_ONCE * 3, "unreadable": 0}


async def test_a_content_file_that_fails_is_nobody_elses_trouble(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    (tmp_path / "var").mkdir()
    (tmp_path / "var/content.sqlite").write_bytes(b"no database, this" * 1000)
    with ControlProcess(config, {VARIABLE: new_key()}) as control:
        account = await new_account(control, "ann@example.com")
        async with edge(control) as writer:
            send(writer, *(said(number, account["account_id"]) for number in range(5)))
            await count_of(control, 'gateway_content_dropped_total{reason="failed"}', 5)
            status, added, _ = await control.ask(ADMIN, "POST", "/credits", {"account_id": account["account_id"], "usd": "1"})
            assert (status, added) == (200, {"balance_usd": 1})
        assert (await read_back(control, said(1), account["key"]))[0] == 503
        assert control.terminate() == 0  # with its last log line
        assert [line["reason"] for line in control.log() if line["event"] == "content_dropped"] == ["failed"]


def test_a_fresh_key_is_one_that_is_taken() -> None:
    made = [subprocess.run([sys.executable, "-m", "gateway", "content", "key"], capture_output=True, text=True, check=True, timeout=30)]
    made.append(subprocess.run(made[0].args, capture_output=True, text=True, check=True, timeout=30))
    results = [json.loads(each.stdout) for each in made]
    assert results[0] != results[1] and all(re.fullmatch("[A-Za-z0-9+/]{43}=", result["key"]) for result in results)
    assert all(re.fullmatch("[0-9a-f]{16}", result["id"]) for result in results)


@pytest.mark.parametrize("running", [False, True], ids=["stopped", "running"])
def test_without_a_key_the_operator_is_told_which_variable_is_missing(tmp_path: Path, running: bool) -> None:
    config = write_config(tmp_path)
    with ControlProcess(config, {VARIABLE: ""}) if running else contextlib.nullcontext():
        account = json.loads(run(config, "account", "create", "--email", "ann@example.com").stdout)["account_id"]
        for words in (("account", "set", "--account", account, "--log-prompts", "on"), ("content", "rotate")):
            refused = run(config, *words)
            assert refused.returncode == 1 and f"the variable {VARIABLE} ([content] key_env) is not set" in refused.stderr
        shown = json.loads(run(config, "account", "set", "--account", account, "--log-prompts", "off").stdout)
        assert shown["log_prompts"] is False
    assert not (tmp_path / "var/content.sqlite").exists()


def test_control_does_not_start_with_a_malformed_key_and_names_it_without_showing_it(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    control = ControlProcess(config, {VARIABLE: f"{new_key()},hunter2"})
    with pytest.raises(AssertionError, match="not ready"):
        control.start()
    [refused] = [line for line in control.log() if line["event"] == "config_refused"]
    assert (refused["file"], refused["key"]) == ("environment", VARIABLE) and "key 2 of 2" in refused["message"]
    assert "hunter2" not in str(control.log())
    checked = run(config, "check", keys="hunter2")
    assert checked.returncode == 1 and VARIABLE in checked.stderr and "hunter2" not in checked.stderr + checked.stdout
