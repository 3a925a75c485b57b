"""`python -m gateway.control '<ChildArgs as JSON>'`: started by the supervisor, never by hand.

Exit code 0 after SIGTERM, 1 when it cannot serve (the log says why) or was orphaned.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from pathlib import Path

import msgspec
import uvloop

from gateway.config import ConfigError, load_settings, read_catalog
from gateway.control.app import Control
from gateway.domain.catalog import Catalog
from gateway.domain.errors import StoreUnavailable
from gateway.link.pulse import ChildArgs, ignore_foreign_signals
from gateway.log import Log, exception_fields
from gateway.settings import Settings


def main() -> int:
    ignore_foreign_signals()
    args = msgspec.json.decode(sys.argv[1], type=ChildArgs)
    log = Log("control")
    log.capture_stdlib()
    log.start()
    try:
        settings, catalog = _read(args, log)
        # What is there now stays: no collection need look at it. Batches make thousands of short-lived objects, without cycles.
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_control(args, settings, catalog, log))
    except ConfigError as error:
        for problem in error.problems:
            log.error("config_refused", file=problem.file, key=problem.key, message=problem.message)
        return 1
    except (StoreUnavailable, OSError) as error:
        log.error("control_cannot_serve", reason=str(error), **exception_fields(error.__cause__))
        return 1
    finally:
        log.stop()
    return 0


async def _control(args: ChildArgs, settings: Settings, catalog: Catalog, log: Log) -> None:
    await Control(args, settings, catalog, log).run()


def _read(args: ChildArgs, log: Log) -> tuple[Settings, Catalog]:
    settings = load_settings(Path(args.config))
    catalog, warnings = read_catalog(settings)
    for warning in warnings:
        log.warning("config_warning", file=warning.file, key=warning.key, message=warning.message)
    return settings, catalog


if __name__ == "__main__":
    sys.exit(main())
