"""Control: the only process that opens the store, and the only place that puts its parts together.

Listens on three unix sockets of the runtime directory: the link for edges, HTTP that edges relay for callers, and HTTP
for the operator's command line and the supervisor. Ready once the store is open and all three listen.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web

from gateway.control.administration import Administration
from gateway.control.api.admin import AdminApi
from gateway.control.api.http import errors
from gateway.control.api.models import ModelsApi
from gateway.control.catalog_source import CatalogSource
from gateway.control.store import Store
from gateway.control.store.opening import open_store
from gateway.control.telemetry import Telemetry
from gateway.domain.catalog import Catalog
from gateway.link.pulse import ChildArgs, Pulse, pulse_interval_s
from gateway.link.runtime import ADMIN, LINK, PUBLIC, RuntimeDir
from gateway.link.server import LinkServer, bound_socket
from gateway.log import Log
from gateway.settings import Settings

STORE_WAIT_S = 10.0  # for a command line that works on the store, or a control that has not quite ended
HTTP_STOP_S = 2.0  # for requests under way when asked to stop
KEEPALIVE_S = 3600.0  # edges decide how long their connections to us live
TELEMETRY_FILE = "telemetry.msgpack"


class Control:
    """One control process, from its first heartbeat to the store's last byte."""

    def __init__(self, args: ChildArgs, settings: Settings, catalog: Catalog, log: Log) -> None:
        self._args = args
        self._settings = settings
        self._log = log
        self._catalogs = CatalogSource(Path(args.config), catalog)
        self._runtime = RuntimeDir(Path(settings.server.runtime_dir))
        self._ready = False
        self._orphaned = False
        self._stop_asked = asyncio.Event()

    async def run(self) -> None:
        """Serve until SIGTERM, or until the supervisor is gone. Raises StoreUnavailable when there is no store to serve."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop_asked.set)
        interval_s = pulse_interval_s(self._settings.server.hang_s)
        pulse = Pulse(self._args.pulse_fd, interval_s=interval_s, is_ready=lambda: self._ready, on_orphaned=self._abandon)
        pulse.start()  # first: a long migration is alive, though not ready
        try:
            async with contextlib.AsyncExitStack() as parts:
                store = await open_store(self._settings, wait_s=STORE_WAIT_S)
                parts.push_async_callback(store.close)
                await self._start(store, parts)
                self._ready = True
                pulse.beat()
                self._log.info("control_ready", incarnation=self._args.incarnation, catalog=self._catalogs.catalog.revision)
                await self._stop_asked.wait()
                self._ready = False
                if self._orphaned:
                    await self._end_at_once(store)
        finally:
            pulse.stop()
        self._log.info("control_stopped")

    async def _start(self, store: Store, parts: contextlib.AsyncExitStack) -> None:
        telemetry = Telemetry(
            self._runtime.path / TELEMETRY_FILE, incarnation=self._args.incarnation, supervisor=_process_name(os.getppid()), log=self._log
        )
        telemetry.load()
        await parts.enter_async_context(_running(telemetry))
        link = LinkServer(
            address=self._runtime.socket(LINK),
            incarnation=self._args.incarnation,
            catalog=self._catalogs.catalog,
            find_keys=store.find_keys,
            on_joined=telemetry.joined,
            on_left=telemetry.left,
            on_report=telemetry.report,
            log=self._log,
        )
        self._catalogs.on_catalog = link.push_catalog
        administration = Administration(store=store, on_key_changed=link.push_key)
        admin = AdminApi(administration=administration, catalogs=self._catalogs, telemetry=telemetry, log=self._log)
        public = web.Application(middlewares=[errors(self._log)])
        public.add_routes(ModelsApi(catalogs=self._catalogs).routes())
        parts.push_async_callback(link.stop)
        await link.start()
        await parts.enter_async_context(_listening(public, self._runtime.socket(PUBLIC)))
        await parts.enter_async_context(_listening(admin.application(), self._runtime.socket(ADMIN)))

    def _abandon(self) -> None:
        self._orphaned = True
        self._stop_asked.set()

    async def _end_at_once(self, store: Store) -> None:
        """Nobody watches us any more and another gateway may be starting: leave the store whole, and go."""
        self._log.error("control_orphaned")
        await store.close()
        self._log.stop()
        os._exit(1)


@contextlib.asynccontextmanager
async def _running(telemetry: Telemetry) -> AsyncIterator[None]:
    running = asyncio.create_task(telemetry.run(), name="telemetry")
    try:
        yield
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await telemetry.save()


@contextlib.asynccontextmanager
async def _listening(app: web.Application, address: str) -> AsyncIterator[None]:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=HTTP_STOP_S, keepalive_timeout=KEEPALIVE_S)
    await runner.setup()
    try:
        await web.SockSite(runner, bound_socket(address)).start()
        yield
    finally:
        await runner.cleanup()


def _process_name(pid: int) -> str:
    """Names one process for ever: pids are used again, but not with the same start time."""
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"supervisor-{pid}-{started}"
