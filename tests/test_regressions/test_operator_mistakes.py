"""What an operator gets wrong costs a clear message, and never the gateway that runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.config import ConfigError, check, load_settings
from tests.conftest import REPOSITORY, START_S_MAX, RunningGateway, StartGateway, fetch, render_catalog


@pytest.fixture
def running(start_gateway: StartGateway) -> RunningGateway:
    return start_gateway({"north": "http://127.0.0.1:9/v1"})


def test_an_emptied_catalog_is_refused_at_a_reload(running: RunningGateway) -> None:
    good = running.catalog.read_text()
    running.catalog.write_text("")  # as some editors leave a file for a moment
    running.signal(signal.SIGHUP)
    running.logged("catalog_refused")
    models = json.loads(fetch(f"{running.url}/api/v1/models/count")[1])
    assert models["data"]["count"] == 1
    running.catalog.write_text(good)
    running.signal(signal.SIGHUP)
    running.logged("catalog_reloaded")


def test_a_second_gateway_in_the_same_folder_is_refused_at_once_and_changes_nothing(running: RunningGateway) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "gateway", "serve", "--config", str(running.config)],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=START_S_MAX / 2, check=False,
    )  # fmt: skip
    assert second.returncode == 1 and second.stdout == ""
    assert "another gateway runs in" in json.loads(second.stderr.splitlines()[-1])["error"]
    assert running.health()["status"] == "ok"
    assert not [line for line in running.log if line["event"] == "edge_left"]
    running.create_account("bob@example.com")


def test_a_number_of_thousands_of_digits_is_a_problem_with_file_and_key(tmp_path: Path) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text(f"[server]\nport = {'9' * 5000}\n")
    with pytest.raises(ConfigError) as refused:
        load_settings(config)
    problem = refused.value.problems[0]
    assert problem.file == str(config) and problem.message.startswith("not TOML")


def test_a_catalog_named_within_a_table_is_told_where_it_belongs(tmp_path: Path) -> None:
    """TOML has no way back to the top level: what is added to the end of a file belongs to its last table."""
    config = tmp_path / "gateway.toml"
    (tmp_path / "models.toml").write_text(render_catalog({"north": "http://127.0.0.1:9/v1"}))
    config.write_text('[operations]\nport = 0\ncatalog = ["models.toml"]\n')
    assert [str(problem) for problem in check(config, {})] == [
        f"{config}: operations.catalog: belongs to the top level: move it above the first [table]"
    ]


def test_a_byte_order_mark_before_a_config_is_no_part_of_it(tmp_path: Path) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text("\ufeff[server]\nport = 7\n")
    assert load_settings(config, {}).server.port == 7


def test_an_ordinary_stop_warns_of_nothing(running: RunningGateway) -> None:
    """A warning is for a human to look at some day."""
    assert running.stop() == 0
    running.logged("drained")
    assert not [line for line in running.log if line["level"] in ("warning", "error")]


def test_signals_that_reach_the_wrong_process_end_nothing(running: RunningGateway) -> None:
    """`pkill -HUP -f gateway` reaches all of them, and USR1 is one letter beside USR2."""
    before = running.health()
    for pid in (running.pid, before["control"], *before["edges"]):
        os.kill(pid, signal.SIGUSR1)
        os.kill(pid, signal.SIGHUP)
    running.logged("signal_ignored")
    running.logged("catalog_reloaded")
    assert running.health() == before
    for pid in (before["control"], *before["edges"]):
        os.kill(pid, signal.SIGUSR2)
    running.create_account("carl@example.com")
    assert running.health() == before and not [line for line in running.log if line["event"] == "process_ended"]


@pytest.mark.parametrize("damage", ["overwritten", "cut"])
def test_a_damaged_store_is_named_with_what_is_wrong_and_what_to_do(tmp_path: Path, damage: str) -> None:
    gateway = RunningGateway(tmp_path / "g", "")
    store = gateway.folder / "gateway.db"
    gateway.create_account()
    if damage == "overwritten":
        store.write_bytes(b"no database, surely, but some other file that lay in its place" * 100)
    else:
        store.write_bytes(store.read_bytes()[:8000])
    command = [sys.executable, "-m", "gateway", "ledger", "verify", "--config", str(gateway.config)]
    told = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=START_S_MAX, check=False)
    assert told.returncode == 3 and told.stdout == ""
    message = json.loads(told.stderr)["error"]["message"]
    assert str(store) in message and "restore a backup" in message
