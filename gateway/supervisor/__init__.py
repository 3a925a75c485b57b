"""The supervisor: opens the listeners, starts, watches, replaces, rolls and drains the processes of one gateway.

It relays no caller's byte and opens no store, so it has little to fail on. `node` is the file to read first.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec

from gateway.config import ConfigError, load_settings, read_catalog
from gateway.log import Log
from gateway.settings import Settings
from gateway.supervisor.children import Command, module_command
from gateway.supervisor.node import CannotStart, Supervisor


def serve(config: Path, host: str | None, port: int | None, workers: int | None, *, command: Command = module_command) -> int:
    """Run a gateway until it is told to stop; returns the exit code.

    `host`, `port` and `workers` override the file; `command` is how a child is started. A configuration that cannot be
    used: one JSON line per problem on stderr (file, key, message), exit code 1, nothing started.
    """
    try:
        settings = _overridden(load_settings(config, places=True), host, port, workers)
        _, warnings = read_catalog(settings)
    except ConfigError as error:
        for problem in error.problems:
            sys.stderr.write(msgspec.json.encode(problem).decode() + "\n")
        return 1
    log = Log("supervisor")
    log.capture_stdlib()
    log.start()
    try:
        for warning in warnings:
            log.warning("config_warning", file=warning.file, key=warning.key, message=warning.message)
        return asyncio.run(_run(settings, str(config.absolute()), log, command))
    except CannotStart as error:
        log.stop()  # so that the reason is the last line
        sys.stderr.write(msgspec.json.encode({"error": str(error)}).decode() + "\n")
        return 1
    finally:
        log.stop()


async def _run(settings: Settings, config: str, log: Log, command: Command) -> int:
    workers = settings.server.workers or len(os.sched_getaffinity(0))
    return await Supervisor(settings, config, workers=workers, log=log, command=command).run()


def _overridden(settings: Settings, host: str | None, port: int | None, workers: int | None) -> Settings:
    given = {"host": host, "port": port, "workers": workers}
    server = msgspec.structs.replace(settings.server, **{name: value for name, value in given.items() if value is not None})
    return msgspec.structs.replace(settings, server=server)
