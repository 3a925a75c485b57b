"""The command line as an operator runs it: exit codes, one line of JSON, with the gateway stopped and running."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gateway import cli
from gateway.control.passwords import hash_password, is_password
from gateway.domain.keys import digest
from tests.control.journaling import Writer, generation
from tests.control.process import CATALOG, ControlProcess, write_config


class Done:
    """How one command ended, in a process of its own."""

    def __init__(self, config: Path, *words: str, stdin: str = "") -> None:
        command = [sys.executable, "-m", "gateway", *words, "--config", str(config)]
        process = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=30, check=False)
        self.code, self.stdout, self.stderr = process.returncode, process.stdout, process.stderr

    @classmethod
    def here(cls, config: Path, *words: str) -> Done:
        """The same in this process, which takes a tenth of the time: for one promise in many forms."""
        done = cls.__new__(cls)
        said, complained = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            try:
                done.code = cli.main([*words, "--config", str(config)])
            except SystemExit as end:
                assert isinstance(end.code, int)
                done.code = end.code
        done.stdout, done.stderr = said.getvalue(), complained.getvalue()
        return done

    @property
    def result(self) -> Any:
        assert self.code == 0, self.stderr
        assert self.stdout.count("\n") == 1
        return json.loads(self.stdout)

    def refusal(self, code: int) -> str:
        """The message of a failure with this exit code."""
        assert (self.code, self.stdout) == (code, ""), (self.code, self.stdout, self.stderr)
        assert self.stderr.count("\n") == 1
        message: str = json.loads(self.stderr)["error"]["message"]
        return message


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, CATALOG.replace('provider = "north"', 'provider = "north"\ntag = "north/fp8"'))


@pytest.fixture(params=["stopped", "running"])
def gateway(request: pytest.FixtureRequest, config: Path) -> Any:
    """A config whose gateway is stopped, or runs."""
    if request.param == "stopped":
        yield config
        return
    with ControlProcess(config):
        yield config


def test_accounts_keys_and_credits(gateway: Path) -> None:
    account = Done(gateway, "account", "create", "--email", "Ann@Example.com", "--usd", "10.00").result
    assert account.keys() == {"account_id", "key", "management_key"}
    assert re.fullmatch(r"user_[0-9a-f]{24}", account["account_id"])
    assert re.fullmatch(r"sk-or-v1-[0-9a-f]{64}", account["key"]) and account["key"] != account["management_key"]

    owner = ("--account", account["account_id"])
    key = Done(gateway, "key", "create", *owner, "--name", "ci", "--limit", "5", "--limit-reset", "monthly", "--management").result
    assert key == {"key": key["key"], "hash": digest(key["key"])}

    added = Done(gateway, "credits", "add", *owner, "--usd", "0.000000001", "--note", "a nano").stdout
    assert json.loads(added, parse_float=Decimal) == {"balance_usd": Decimal("10.000000001")}
    assert Done(gateway, "credits", "add", *owner, "--usd", "10", "--with-fee").result["fee_usd"] == 0.8
    verified = Done(gateway, "ledger", "verify").result
    assert verified == {"ok": True, "accounts": 1, "generations": 0, "difference_nanos": 0}

    assert "exists" in Done(gateway, "account", "create", "--email", "ann@example.COM").refusal(1)
    assert "no such account" in Done(gateway, "credits", "add", "--account", "user_none", "--usd", "1").refusal(1)
    assert "no such account" in Done(gateway, "key", "create", "--account", "user_none", "--name", "x").refusal(1)
    assert "must not be negative" in Done(gateway, "credits", "add", *owner, "--usd", "-1").refusal(1)
    with contextlib.closing(sqlite3.connect(gateway.parent / "var/gateway.db")) as db:
        dump = "\n".join(db.iterdump())
        row = db.execute("SELECT management, limit_nanos, limit_reset FROM keys WHERE digest = ?", (key["hash"],)).fetchone()
    assert row == (1, 5_000_000_000, "monthly")
    assert not any(secret in dump for secret in (account["key"], account["management_key"], key["key"]))


def test_account_rules_are_shown_and_changed(gateway: Path) -> None:
    """`north/fp8` is an endpoint's tag, `north` its provider."""
    account = ("--account", Done(gateway, "account", "create", "--email", "ann@example.com").result["account_id"])
    shown = {
        "account_id": account[1],
        "train_paid": False,
        "train_free": False,
        "publish_free": False,
        "zdr": False,
        "log_prompts": False,
        "allow": [],
        "ignore": [],
    }
    assert Done(gateway, "account", "set", *account).result == shown
    shown |= {"train_paid": True, "zdr": True, "allow": ["north", "north/fp8"]}
    assert Done(gateway, "account", "set", *account, "--train-paid", "on", "--zdr", "on", "--allow", "North, north/fp8,").result == shown
    shown |= {"train_paid": False, "train_free": True, "publish_free": True, "allow": [], "ignore": ["north"]}
    given = ("--train-paid", "off", "--train-free", "on", "--publish-free", "on", "--allow", "", "--ignore", "north")
    assert Done(gateway, "account", "set", *account, *given).result == shown
    assert Done(gateway, "account", "set", *account).result == shown

    assert "no such account" in Done(gateway, "account", "set", "--account", "user_none", "--zdr", "on").refusal(1)
    for option, wrong in (("--ignore", "nor th"), ("--allow", "south"), ("--allow", "north,north/int4")):
        refused = Done(gateway, "account", "set", *account, option, wrong).refusal(1)
        assert refused.startswith(f"{option[2:]}: {wrong.rpartition(',')[2]!r} is not a provider's slug")
    assert Done(gateway, "account", "set", *account).result == shown
    assert "must be on or off" in Done(gateway, "account", "set", *account, "--zdr", "yes").refusal(2)


@pytest.mark.parametrize(
    "usd", ["-1", "0.0000000001", "4611686018.427387905", "9223372036.854775808", "1e30", "NaN", "ten", "", "1,5", "\uff11"]
)
def test_amounts_that_cannot_be_are_refused(config: Path, usd: str) -> None:
    assert Done.here(config, "account", "create", "--email", "a@b.c", f"--usd={usd}").refusal(1).startswith("usd: ")


@pytest.mark.parametrize(
    "email", ["", "a", "a@", "@b", "a b@c.d", "a@b@c", "ä@b.c", "a@b..c", "a@-b", "a@b.c\n", "x" * 65 + "@b.c", "a@" + "b" * 254]
)
def test_addresses_that_cannot_be_are_refused(config: Path, email: str) -> None:
    done = Done.here(config, "account", "create", f"--email={email}")
    if email.strip() == "a@b.c":
        assert done.result  # blanks around it are the shell's
    else:
        assert done.refusal(1).startswith("email: ")


def test_a_password_is_kept_as_an_argon2_hash(config: Path) -> None:
    assert Done(config, "account", "create", "--email", "a@b.c", "--password-stdin", stdin="correct horse\nrest").result
    with contextlib.closing(sqlite3.connect(config.parent / "var/gateway.db")) as db:
        [(stored,)] = db.execute("SELECT password_hash FROM accounts").fetchall()
    assert stored.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert is_password("correct horse", stored) and not is_password("correct horsf", stored)
    assert hash_password("correct horse") != stored  # salted
    assert "8 characters" in Done(config, "account", "create", "--email", "b@b.c", "--password-stdin", stdin="short\n").refusal(1)


def test_a_ledger_that_differs_is_exit_1_and_names_the_account(gateway: Path) -> None:
    account = Done(gateway, "account", "create", "--email", "a@b.c", "--usd", "1").result["account_id"]
    with contextlib.closing(sqlite3.connect(gateway.parent / "var/gateway.db")) as db:
        db.execute("UPDATE balances SET nanos = nanos + 5 WHERE book = ?", (account,))
        db.commit()
    done = Done(gateway, "ledger", "verify")
    report = json.loads(done.stdout)
    assert (done.code, report["ok"], report["difference_nanos"]) == (1, False, 5)
    assert account in report["problems"][0]


def test_a_stopped_gateway_s_journals_are_read_before_the_ledger_is_verified(config: Path) -> None:
    account = Done(config, "account", "create", "--email", "a@b.c", "--usd", "1").result["account_id"]
    dead, alive = (Writer(config.parent / "var/journal", name) for name in ("dead", "alive"))
    for writer in (dead, alive):
        writer.append(*(generation(account, 5) for _ in range(1500)))
    dead.write(b"\0\0\0")
    dead.die()
    done = Done(config, "ledger", "verify")
    assert done.result == {"ok": True, "accounts": 1, "generations": 3000, "difference_nanos": 0}
    [cut] = [json.loads(line) for line in done.stderr.splitlines()]
    assert (cut["event"], cut["bytes"]) == ("journal_cut", 3)
    assert {path.name for path in (config.parent / "var/journal").iterdir()} == {alive.name, "corrupt"}
    alive.write(b"\0\0\0")
    undrained = Done(config, "ledger", "verify")
    assert undrained.code == 2
    assert json.loads(undrained.stdout) == {"ok": None, "accounts": 1, "generations": 3000, "difference_nanos": 0}
    alive.die()
    assert Done(config, "ledger", "verify").result["generations"] == 3000


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["account"],
        ["account", "create"],
        ["credits", "add", "--account", "x"],
        ["key", "create", "--account", "x", "--name", "y", "--limit-reset", "hourly"],
        ["serve", "--port", "70000"],
        ["serve", "--workers", "-1"],
        ["fly"],
    ],
)
def test_wrong_usage_is_exit_2(config: Path, words: list[str]) -> None:
    assert "--help" in Done.here(config, *words).refusal(2)


def test_the_exit_code_of_a_refusal_is_the_processs(config: Path) -> None:
    assert Done(config, "account", "create", "--email", "a@b.c", "--usd=-1").refusal(1) == "usd: must not be negative"
    assert "--help" in Done(config, "fly").refusal(2)


def test_help_tells_the_exit_codes() -> None:
    for words in ([], ["credits", "add"]):
        done = subprocess.run([sys.executable, "-m", "gateway", *words, "--help"], capture_output=True, text=True, check=True, timeout=30)
        assert "exit codes:" in done.stdout


def test_check_tells_every_problem(config: Path) -> None:
    assert Done(config, "check").result == {"ok": True, "problems": []}
    (config.parent / "catalog.toml").write_text(
        CATALOG.replace('prompt = "0.0000025"', 'prompt = "-1"').replace("context_length", "context")
    )
    config.write_text(config.read_text() + "prot = 1\n")
    done = Done(config, "check")
    report = json.loads(done.stdout)
    assert (done.code, report["ok"]) == (1, False)
    assert {problem["key"] for problem in report["problems"]} >= {
        "server.prot",
        "models[0].context",
        "models[0].endpoints[0].pricing.prompt",
    }
    assert all(problem.keys() == {"file", "key", "message", "warning"} for problem in report["problems"])
    assert len(done.stderr.splitlines()) == len(report["problems"])


def test_a_warning_is_no_failed_check(config: Path) -> None:
    (config.parent / "catalog.toml").write_text(CATALOG.replace("data = {", 'api_key_env = "NO_SUCH_VARIABLE_SET"\ndata = {'))
    [problem] = Done(config, "check").result["problems"]
    assert problem["warning"] is True


def test_a_config_that_cannot_be_read_is_exit_1(config: Path) -> None:
    assert "cannot be read" in Done(config.with_name("none.toml"), "ledger", "verify").refusal(1)
    config.write_text("[server]\nport = 'x'\n")
    assert "server.port" in Done(config, "ledger", "verify").refusal(1)


def test_a_store_that_cannot_be_opened_is_exit_3(config: Path) -> None:
    (config.parent / "var").mkdir()
    (config.parent / "var/gateway.db").write_bytes(b"no database" * 1000)
    Done(config, "ledger", "verify").refusal(3)
    config.write_text('[store]\nurl = "postgresql://localhost/x"\n')
    assert "SQLite" in Done(config, "ledger", "verify").refusal(3)


def test_a_gateway_that_starts_is_waited_for(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Done(config, "ledger", "verify").result
    with (config.parent / "var/gateway.db.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        timer = threading.Timer(1.0, lambda: fcntl.flock(lock, fcntl.LOCK_UN))
        timer.start()
        started_s = time.monotonic()
        assert Done(config, "ledger", "verify").result
        assert time.monotonic() - started_s >= 1
        timer.join()
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(cli, "STARTING_S", 0.5)
        started_s = time.monotonic()
        assert "does not answer" in Done.here(config, "ledger", "verify").refusal(3)
        assert time.monotonic() - started_s >= 0.5


def test_a_gateway_that_dies_on_a_command_leaves_its_outcome_unknown(config: Path) -> None:
    assert Done(config, "ledger", "verify").result
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(config.parent / "var/run/admin.sock"))
    listener.listen()

    def die() -> None:
        connection, _ = listener.accept()
        connection.recv(10)
        connection.close()

    dying = threading.Thread(target=die)
    dying.start()
    assert "unknown" in Done(config, "credits", "add", "--account", "x", "--usd", "1").refusal(3)
    dying.join()
    listener.close()


def test_commands_work_on_from_any_folder_and_long_paths(tmp_path: Path) -> None:
    folder = tmp_path / ("long-" * 30)
    folder.mkdir()
    config = write_config(folder)
    with ControlProcess(config):
        assert Done(Path(os.path.relpath(config)), "account", "create", "--email", "a@b.c").result["account_id"]
