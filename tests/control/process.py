"""A real control process on a folder of its own, started as the supervisor starts it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec

from gateway.link.pulse import READY, ChildArgs

CATALOG = """
[[providers]]
slug = "north"
name = "North"
base_url = "http://127.0.0.1:9001/v1"
data = { trains = false, retains = false, zdr = true }

[[models]]
id = "acme/sage-1"
name = "Acme: Sage 1"
context_length = 131072

[[models.endpoints]]
provider = "north"
upstream_model = "sage-1"
max_completion_tokens = 8192
pricing = { prompt = "0.0000025", completion = "0.00001" }
"""


def write_config(folder: Path, catalog: str = CATALOG) -> Path:
    """A config file with its catalog; everything else at its default, so below this folder."""
    (folder / "catalog.toml").write_text(catalog)
    config = folder / "gateway.toml"
    config.write_text('catalog = ["catalog.toml"]\n[server]\nhang_s = 1\n')
    return config


class ControlProcess:
    """Started and ready inside `with`; killed at the end if it still runs."""

    def __init__(self, config: Path, environ: Mapping[str, str] | None = None) -> None:
        """`environ` comes on top of the tests' own."""
        self.config = config
        self.environ = dict(environ or {})
        self.runtime = config.parent / "var/run"
        self._starts = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def start(self) -> None:
        self._starts += 1
        self.pulse, theirs = socket.socketpair()
        with theirs, (self.config.parent / "control.log").open("ab") as log:
            args = ChildArgs(config=str(self.config), incarnation=f"control-{self._starts}", pulse_fd=theirs.fileno())
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gateway.control", msgspec.json.encode(args).decode()],
                pass_fds=[theirs.fileno()], stderr=log, env={**os.environ, **self.environ},
            )  # fmt: skip
        self.wait_ready()

    def wait_ready(self) -> None:
        deadline_s = time.monotonic() + 15
        while time.monotonic() < deadline_s:
            if select.select([self.pulse], [], [], 0.5)[0]:
                beats = self.pulse.recv(100)
                if READY in beats:
                    return
                if not beats:
                    break
        self.kill(own_s=5)
        raise AssertionError(f"not ready: {self.log()}")

    def kill(self, *, own_s: float = 0) -> None:
        """End it the hard way, unless it ends by itself within `own_s`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(own_s)
        self.process.kill()
        self.process.wait(10)
        self.pulse.close()

    def terminate(self) -> int:
        os.kill(self.process.pid, signal.SIGTERM)
        return self.process.wait(10)

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.config.parent / "control.log").read_text().splitlines()]

    async def ask(self, socket_name: str, method: str, path: str, body: Any = None) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON (or text) and headers of an answer on one of its HTTP sockets."""
        connector = aiohttp.UnixConnector(str(self.runtime / socket_name))
        async with (
            aiohttp.ClientSession("http://control", connector=connector) as session,
            session.request(method, path, json=body) as answer,
        ):
            text = await answer.text()
            return (
                answer.status,
                json.loads(text) if answer.content_type == "application/json" else text,
                {str(name): value for name, value in answer.headers.items()},
            )
