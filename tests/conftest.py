"""The harness of all process-level tests: a whole gateway on kernel-chosen ports, its log as events, its processes counted.

A gateway that leaves a process, or says something on stderr that is not a JSON line, fails the test that used it.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from bench.demo import render_toml
from bench.provider import Provider
from gateway import cli
from tests import timing
from tests.provider_caller import Caller, connected

REPOSITORY = Path(__file__).parent.parent
START_S_MAX = 20.0  # two cores, shared with every other test run
MODEL = "acme/sage-1"
_admin_lock = threading.Lock()  # of sys.stdout, which is one for all threads

Document = Mapping[str, Any]
StartGateway = Callable[..., "RunningGateway"]


async def eventually(predicate: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Returns once `predicate()` is true. Polls, so only for what has no event to wait on. Raises TimeoutError.

    `timeout_s` ends a test that hangs; a promise of time is measured, with `tests.timing`.
    """
    async with asyncio.timeout(timeout_s):
        while not predicate():
            await asyncio.sleep(0.01)


def render_catalog(providers: Mapping[str, str], models: Mapping[str, tuple[str, ...]] | None = None) -> str:
    """A catalog of `providers` (slug -> base URL) and `models` (id -> slugs, in order; default: one model at all of them).

    Prices: 1 USD per million prompt tokens, 2 per million completion tokens. The upstream's name is the part after the slash.
    """
    parts = []
    for slug, url in providers.items():
        parts.append(
            f'[[providers]]\nslug = "{slug}"\nname = "{slug.title()}"\nbase_url = "{url}"\ndata = {{ trains = false, retains = false }}\n'
        )
    for model, slugs in (models or {MODEL: tuple(providers)}).items():
        parts.append(f'[[models]]\nid = "{model}"\nname = "{model}"\ncontext_length = 131072\n')
        for slug in slugs:
            pricing = 'pricing = { prompt = "0.000001", completion = "0.000002" }'
            name = model.partition("/")[2]
            parts.append(f'[[models.endpoints]]\nprovider = "{slug}"\nupstream_model = "{name}"\nmax_completion_tokens = 8192\n{pricing}\n')
    return "\n".join(parts)


class RunningGateway:
    """`python -m gateway serve` in a session of its own. `start()` returns when it said `ready`."""

    def __init__(
        self,
        folder: Path,
        catalog: str,
        *,
        settings: Document | None = None,
        workers: int = 1,
        module: str = "gateway",
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """`settings` are tables laid over the harness's own; `module` is what is run in place of the gateway."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.config = folder / "gateway.toml"
        self.catalog = folder / "catalog.toml"
        self.catalog.write_text(catalog)
        self.write_settings(settings or {})
        self.url = ""
        self.key = ""
        self.account_id = ""
        self.start_s = 0.0  # what the last start took
        self.log: list[dict[str, Any]] = []
        self.noise: list[str] = []  # stderr lines that are not JSON
        self._arguments = [sys.executable, "-m", module, "serve", "--config", str(self.config), "--workers", str(workers)]
        self.environ = {**os.environ, **(environ or {})}  # from its next start on
        self._heard = threading.Condition()
        self._stdout: list[str] = []
        self._process: subprocess.Popen[str] | None = None
        self._readers: list[threading.Thread] = []
        self._pipes_open = 0

    @property
    def pid(self) -> int:
        """The supervisor's."""
        assert self._process is not None
        return self._process.pid

    @property
    def edge(self) -> psutil.Process:
        """The one edge."""
        (pid,) = self.health()["edges"]
        return psutil.Process(pid)

    @property
    def operations_url(self) -> str:
        return f"http://127.0.0.1:{self.logged('operations_listening')['port']}"

    def write_settings(self, settings: Document) -> None:
        document: dict[str, Any] = {
            "catalog": ["catalog.toml"],
            "server": {"port": 0, "runtime_dir": "run", "drain_s": 1.0},  # a test's end waits for a quarter of it
            "operations": {"port": 0},
            "store": {"url": "sqlite:///gateway.db"},
            "journal": {"dir": "journal"},
        }
        for name, value in settings.items():
            document[name] = {**document.get(name, {}), **value} if isinstance(value, Mapping) else value
        self.config.write_text(render_toml(document))

    def spawn(self) -> None:
        """Start the process and do not wait."""
        self.log.clear()
        self._stdout.clear()
        self._process = subprocess.Popen(
            self._arguments,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=REPOSITORY, env=self.environ, start_new_session=True,
        )  # fmt: skip
        self._readers = [
            threading.Thread(target=self._read, args=(self._process.stdout, self._on_stdout), daemon=True),
            threading.Thread(target=self._read, args=(self._process.stderr, self._on_stderr), daemon=True),
        ]
        self._pipes_open = len(self._readers)
        for reader in self._readers:
            reader.start()

    def start(self) -> RunningGateway:
        began = time.monotonic()
        self.spawn()
        self.wait_ready()
        self.start_s = time.monotonic() - began
        return self

    def wait_ready(self, timeout_s: float = START_S_MAX) -> None:
        """Until `ready` was printed. Raises AssertionError when it ended instead, or in time said nothing."""
        self._wait(lambda: bool(self._stdout) or not self._pipes_open, timeout_s, "ready")
        assert self._stdout, f"ended instead of ready: {self._tail()}"
        word, _, self.url = self._stdout[0].partition(" ")
        assert word == "ready"

    @property
    def ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 10.0) -> int:
        """The exit code."""
        assert self._process is not None
        code = self._process.wait(timeout_s)
        for reader in self._readers:
            reader.join(5.0)  # the pipes end with the last process that holds them
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        return code

    def stop(self, timeout_s: float = 10.0) -> int:
        """Drain; returns the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout_s)

    @property
    def stdout(self) -> list[str]:
        return list(self._stdout)

    def logged(self, event: str, *, count: int = 1, timeout_s: float = 10.0, **fields: Any) -> dict[str, Any]:
        """The `count`-th log line of this event with these fields, waited for."""

        def matching() -> list[dict[str, Any]]:
            return [line for line in self.log if line.get("event") == event and fields.items() <= line.items()]

        self._wait(lambda: len(matching()) >= count, timeout_s, f"{event} {fields}")
        return matching()[count - 1]

    def health(self) -> dict[str, Any]:
        """The body of /healthz."""
        found: dict[str, Any] = json.loads(fetch(f"{self.operations_url}/healthz")[1])
        return found

    def ready_status(self) -> int:
        return fetch(f"{self.operations_url}/readyz")[0]

    def metrics(self) -> str:
        """The text of /metrics, "" while control is being replaced."""
        status, body = fetch(f"{self.operations_url}/metrics")
        return body.decode() if status == 200 else ""

    def processes(self) -> list[int]:
        """Live processes of this gateway: those of its session."""
        assert self._process is not None
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return found

    def admin(self, *arguments: str) -> dict[str, Any]:
        """One admin command's JSON result. Runs in this process: a process of its own would take most of a test's time."""
        group, command, *rest = arguments
        said, complained = io.StringIO(), io.StringIO()
        with _admin_lock, contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            code = cli.main([group, command, "--config", str(self.config), *rest])
        assert code == 0, complained.getvalue()
        result: dict[str, Any] = json.loads(said.getvalue().splitlines()[-1])
        return result

    def create_account(self, email: str = "ada@example.com", usd: str = "1000.00") -> dict[str, Any]:
        """`{"account_id", "key", "management_key"}`; the first account's key becomes `self.key`."""
        account = self.admin("account", "create", "--email", email, "--usd", usd)
        self.key = self.key or account["key"]
        self.account_id = self.account_id or account["account_id"]
        return account

    def close(self) -> None:
        """End everything, and fail when a process was left or stderr held what is not a log line."""
        if self._process is None:
            return
        if not self.ended:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(15.0)
        deadline = time.monotonic() + 5.0
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.01)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()
        assert not left, f"processes were left: {left} {self._tail()}"
        assert not self.noise, "\n".join(self.noise)

    def _wait(self, done: Callable[[], bool], timeout_s: float, what: str) -> None:
        with self._heard:
            assert self._heard.wait_for(done, timeout_s), f"waited {timeout_s} s for {what}: {self._tail()}"

    def _read(self, stream: Any, take: Callable[[str], None]) -> None:
        for line in stream:
            with self._heard:
                take(line.rstrip("\n"))
                self._heard.notify_all()
        with self._heard:
            self._pipes_open -= 1
            self._heard.notify_all()

    def _tail(self) -> str:
        told = [line for line in self.log if line.get("event") != "exchange"]  # which are many, and tell little
        return "\n".join(["", *(json.dumps(line) for line in told[-20:]), *self.noise[-20:]])

    def _on_stdout(self, line: str) -> None:
        self._stdout.append(line)

    def _on_stderr(self, line: str) -> None:
        try:
            self.log.append(json.loads(line))
        except ValueError:
            self.noise.append(line)


def fetch(url: str, *, body: bytes | None = None, headers: Mapping[str, str] | None = None, timeout_s: float = 5.0) -> tuple[int, bytes]:
    """Status and body; blocks, so never for what this process itself must serve."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=body, headers=dict(headers or {})), timeout=timeout_s) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    """A healthy simulated provider in this process."""
    async with Provider(name="North") as running:
        yield running


@pytest.fixture
async def caller(provider: Provider) -> AsyncIterator[Caller]:
    """A raw connection to it."""
    async with connected(provider) as made:
        yield made


@pytest.fixture
def start_gateway(tmp_path: Path) -> Iterator[StartGateway]:
    """`start_gateway({"north": url}, settings=..., workers=...)` -> a ready RunningGateway with one account of 10 USD."""
    started: list[RunningGateway] = []

    def start(providers: Mapping[str, str], *, models: Mapping[str, tuple[str, ...]] | None = None, **options: Any) -> RunningGateway:
        gateway = RunningGateway(tmp_path / f"gateway-{len(started)}", render_catalog(providers, models), **options)
        started.append(gateway)
        gateway.start()
        gateway.create_account()
        return gateway

    with contextlib.ExitStack() as closing:
        yield start
        for gateway in started:
            closing.callback(gateway.close)


@pytest.fixture
def gateway(start_gateway: StartGateway, provider: Provider) -> RunningGateway:
    """One edge, one model (`MODEL`) at one healthy provider, one account."""
    return start_gateway({"north": f"{provider.url}/v1"})


def pytest_configure(config: pytest.Config) -> None:
    """The workers of `pytest -n` have folders for temporary files beside each other."""
    if hasattr(config, "workerinput"):
        timing.company.share(Path(config.option.basetemp).parent)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    timing.company.enter()
    try:
        return (yield)
    finally:
        timing.company.leave()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long forms run by `-m soak` only, those that need node by `-m node`."""
    asked = config.getoption("-m")
    left = [item for item in items for name in ("soak", "node") if name not in asked and item.get_closest_marker(name)]
    if left:
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=left)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`@pytest.mark.system("strace", "root", "namespace")`: what the test needs from the machine."""
    needs = [need for marker in item.iter_markers("system") for need in marker.args]
    missing = [need for need in needs if not _has(need)]
    if missing and os.environ.get("CI") == "1":
        pytest.fail(f"needs {', '.join(missing)}, and CI=1 promises that it is here", pytrace=False)
    elif missing:
        pytest.skip(f"needs {', '.join(missing)}")


def _has(need: str) -> bool:
    if need == "root":
        return os.geteuid() == 0
    if need == "namespace":
        return (
            shutil.which("unshare") is not None
            and subprocess.run(["unshare", "-nm", "true"], capture_output=True, check=False).returncode == 0
        )
    return shutil.which(need) is not None
