"""The gateway as a subject of a bench: one worker with everything on, from a generated configuration.

Key check, limits, hold, routing, metering, journal (`fsync = "batch"`), SQLite and metrics are as in production; only the
requests-per-minute limit is off, because one key makes all the load.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from bench.children import child, output_of, ready_url

PREFIX = "bench/"  # of its models' names; the rest is the provider's
KEY_VARIABLE = "BENCH_NORTH_API_KEY"

SETTINGS = """\
catalog = ["catalog.toml"]

[server]
port = 0
workers = 1

[operations]
port = 0

[store]
url = "sqlite:///gateway.db"

[journal]
dir = "journal"

[limits]
requests_per_minute_max = 0
"""

CATALOG = """\
[[providers]]
slug = "north"
name = "North"
base_url = "{url}/v1"
api_key_env = "{variable}"
data = {{ trains = false, retains = false, zdr = true }}

"""

ENDPOINT = """\
[[models]]
id = "{prefix}{name}"
name = "Bench: {name}"
context_length = 131072

[[models.endpoints]]
provider = "north"
upstream_model = "{name}"
max_completion_tokens = 65536
pricing = {{ prompt = "0.0000001", completion = "0.0000004" }}
"""
MODELS = ("sage-1", "paced-1")

# What settings can turn off: waiting for the disk, and endpoint ranking by cost and speed. Key check, hold, metering, the journal
# itself, the store, metrics and log lines have no switch.
SETTINGS_OFF = (
    SETTINGS.replace('dir = "journal"', 'dir = "journal"\nfsync = "never"')
    + """
[routing]
latency_weight = 0.0
throughput_weight = 0.0
exploration_share = 0.0
"""
)


def catalog_of(upstream_url: str) -> str:
    """The provider and its two models."""
    models = [ENDPOINT.format(prefix=PREFIX, name=name) for name in MODELS]
    return "\n".join([CATALOG.format(url=upstream_url, variable=KEY_VARIABLE), *models])


class Account(msgspec.Struct):
    """The part of `gateway account create`'s JSON that a load needs."""

    key: str


@asynccontextmanager
async def gateway(
    upstream_url: str, *, core: int | None, folder: Path, settings: str = SETTINGS, catalog: str | None = None
) -> AsyncIterator[tuple[str, int, str]]:
    """Runs a gateway in front of the provider: its URL, the supervisor's pid, a key. `catalog`: in place of the bench's two models.

    Raises ChildFailed.
    """
    config, log = folder / "gateway.toml", folder / "gateway.log"
    config.write_text(settings)
    (folder / "catalog.toml").write_text(catalog or catalog_of(upstream_url))
    script = Path(sys.executable).parent / "gateway"
    program: list[str | Path] = [script] if script.exists() else [sys.executable, "-m", "gateway"]
    environ = {KEY_VARIABLE: "bench", "PATH": os.environ.get("PATH", "")}
    async with child([*program, "serve", "--config", config], core=core, log=log, environ=environ) as process:
        url = await ready_url(process, log)
        account = await output_of(
            [*program, "account", "create", "--config", config, "--email", "bench@example.com", "--usd", "1000"], environ=environ
        )
        yield url, process.pid, msgspec.json.decode(account, type=Account).key
