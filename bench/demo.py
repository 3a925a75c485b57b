"""The demo: two simulated providers and one gateway in front of them, in the foreground, without any secret.

    python -m bench.demo

State lives in var/demo: the same account on every run, a new key each time. A busy port means the next free one, and a
demo that runs already means a folder of its own, var/demo-2. Ctrl-C (or SIGTERM) drains the gateway, then ends the providers.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import signal
import socket
import sys
import time
import tomllib
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.children import ChildFailed, child, output_of, ready_url

REPOSITORY = Path(__file__).parent.parent
STATES = [REPOSITORY / "var" / name for name in ("demo", *(f"demo-{number}" for number in range(2, 10)))]
CONFIG, ACCOUNT, STORE, LOCK = "gateway.toml", "account.json", "gateway.db", "demo.lock"  # in the state's folder

PROVIDERS = {  # name -> rhythm; the base URL that stands for it in config/demo-catalog.toml
    "North": ("ttft_ms=250;tokens_per_s=60;tokens=80", "http://127.0.0.1:9001/v1"),
    "South": ("ttft_ms=600;tokens_per_s=35;tokens=80", "http://127.0.0.1:9002/v1"),
}
THINKER = ("--model", "thinker", "reasoning_deltas=40")
PORTS_TRIED = 100
DRAIN_S = 3.0  # nobody wants to wait for a demo


class DemoError(Exception):
    """The demo cannot go on; `str(error)` says why and what to do."""


async def run() -> None:
    """Until Ctrl-C. Raises DemoError or ChildFailed."""
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    try:
        with free_state() as (state, lock):
            await show(state, stopped, lock)
    except (DemoError, ChildFailed):
        if not stopped.is_set():  # Ctrl-C in the middle of the start also ends the children
            raise


@contextlib.contextmanager
def free_state() -> Iterator[tuple[Path, int]]:
    """The first folder that no other demo uses, and the descriptor that locks it: the kernel gives it back however we end.

    Raises DemoError.
    """
    for state in STATES:
        state.mkdir(parents=True, exist_ok=True)
        with (state / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield state, lock.fileno()
            return
    raise DemoError(f"{len(STATES)} demos run already, in {STATES[0].parent}; end one of them")


async def show(state: Path, stopped: asyncio.Event, lock: int) -> None:
    """Start everything, print how to use it, and wait."""
    async with contextlib.AsyncExitStack() as running:
        catalog = (REPOSITORY / "config" / "demo-catalog.toml").read_text()
        processes: list[Process] = []
        for name, (behaviour, placeholder) in PROVIDERS.items():
            options = ("--name", name, "--behaviour", behaviour, *THINKER)
            process, url = await running.enter_async_context(started(state, name, "bench.provider", *options))
            processes.append(process)
            catalog = catalog.replace(placeholder, f"{url}/v1")
        operations_port = write_config(state, catalog)
        process, url = await running.enter_async_context(
            started(state, "gateway", "gateway", "serve", "--config", str(state / CONFIG), keep=(lock,))
        )
        processes.append(process)
        say_hello(state, url, await new_key(state), operations_port)
        await first(stopped, processes)
        if not stopped.is_set():
            raise DemoError(f"a process of the demo ended by itself; see the logs in {state}")
        print("stopping", flush=True)


@contextlib.asynccontextmanager
async def started(state: Path, name: str, *module: str, keep: Sequence[int] = ()) -> AsyncIterator[tuple[Process, str]]:
    """A child that has said `ready URL`, and that URL; leaving ends it. Raises ChildFailed."""
    log = state / f"{name.lower()}.log"
    async with child([sys.executable, "-m", *module], core=None, log=log, keep=keep) as process:
        yield process, await ready_url(process, log)


async def first(stopped: asyncio.Event, processes: list[Process]) -> None:
    """Returns when the demo is stopped or one of its processes has ended."""
    waits = [asyncio.create_task(stopped.wait()), *(asyncio.create_task(process.wait()) for process in processes)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for task in waits:
        task.cancel()
    await asyncio.gather(*waits, return_exceptions=True)


def write_config(state: Path, catalog: str) -> int:
    """config/demo.toml with this run's catalog and free ports, into the state's folder; returns the operations port."""
    document = tomllib.loads((REPOSITORY / "config" / "demo.toml").read_text())
    server, operations = document["server"], document["operations"]
    server |= {"port": free_port(server["host"], server["port"]), "runtime_dir": "run", "drain_s": DRAIN_S}
    operations["port"] = free_port(operations["host"], operations["port"])
    document["catalog"] = ["catalog.toml"]
    document["store"]["url"] = f"sqlite:///{STORE}"
    document["journal"]["dir"] = "journal"
    (state / "catalog.toml").write_text(catalog)
    (state / CONFIG).write_text(f"# Written by bench/demo.py on every run.\n{render_toml(document)}")
    return int(operations["port"])


def render_toml(document: Mapping[str, Any]) -> str:
    """TOML of scalars and lists of scalars at the top, and one level of tables: the shape of a settings file."""
    tables = {key: value for key, value in document.items() if isinstance(value, Mapping)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in document.items() if key not in tables]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def free_port(host: str, wanted: int) -> int:
    """The first port from `wanted` on that nobody listens on. Raises DemoError."""
    for port in range(wanted, wanted + PORTS_TRIED):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            if port != wanted:
                print(f"port {wanted} is busy, taking {port}")
            return port
    raise DemoError(f"no free port from {wanted} to {wanted + PORTS_TRIED - 1} on {host}")


async def new_key(state: Path) -> str:
    """A fresh key of the demo's account, which is made on the first run. Raises DemoError."""
    try:
        account = json.loads((state / ACCOUNT).read_text())["account_id"]
    except (OSError, ValueError, KeyError):
        created = await admin(state, "account", "create", "--email", "demo@localhost.example", "--usd", "10.00")
        (state / ACCOUNT).write_text(json.dumps({"account_id": created["account_id"]}))
        return str(created["key"])
    created = await admin(state, "key", "create", "--account", account, "--name", time.strftime("demo %Y-%m-%d %H:%M:%S"))
    return str(created["key"])


async def admin(state: Path, group: str, command: str, *arguments: str) -> dict[str, Any]:
    """One admin command's JSON result. Raises DemoError with what it said."""
    try:
        out = await output_of([sys.executable, "-m", "gateway", group, command, "--config", state / CONFIG, *arguments])
    except ChildFailed as error:
        raise DemoError(f"{error}\nremove {state} to begin anew") from None
    result: dict[str, Any] = json.loads(out)
    return result


def say_hello(state: Path, url: str, key: str, operations_port: int) -> None:
    print(
        f"""
base URL    {url}/api/v1
key         {key}
operations  http://127.0.0.1:{operations_port}/metrics  (also /healthz, /readyz)
logs        {state}/*.log

curl -N {url}/api/v1/chat/completions \\
  -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\
  -d '{{"model": "acme/sage-1", "stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}'

Ctrl-C stops the demo.""",
        flush=True,
    )


def main() -> int:
    try:
        asyncio.run(run())
    except (DemoError, ChildFailed) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
