"""What an operator gets wrong costs a clear message, and never the gateway that runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.settings import ConfigError, load_settings
from tests.conftest import REPOSITORY, START_S_MAX, RunningGateway, StartGateway, fetch


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
