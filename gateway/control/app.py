"""Control: the only process that opens the store, and the only place that puts its parts together.

Listens on three unix sockets of the runtime directory: the link for edges, HTTP that edges relay for callers, and HTTP
for the operator's command line and the supervisor. Ready once the store is open and all three listen.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, get_args

from aiohttp import web

from gateway.config import content_keys
from gateway.control.account_rules import Told
from gateway.control.administration import Administration
from gateway.control.api.admin import AdminApi
from gateway.control.api.application import public_application
from gateway.control.api.auth import Authentication
from gateway.control.api.table import public_routes
from gateway.control.bookkeeper import Bookkeeper
from gateway.control.catalog_source import CatalogSource
from gateway.control.chores import hourly
from gateway.control.content import DropReason
from gateway.control.content.intake import ContentIntake
from gateway.control.content.retention import Retention
from gateway.control.content.store import ContentStore
from gateway.control.erasure import Erasure
from gateway.control.expiry import Expiry
from gateway.control.fleet import FleetWatch
from gateway.control.key_lookup import KeyLookup
from gateway.control.leases import LeaseDesk
from gateway.control.prometheus import read_back
from gateway.control.rates import Desks, RateBook
from gateway.control.removal import Removal
from gateway.control.store import RefusalReason, Store
from gateway.control.store.opening import open_store
from gateway.control.telemetry import Telemetry
from gateway.control.windows import forget_windows
from gateway.domain.catalog import Catalog
from gateway.domain.errors import StoreUnavailable
from gateway.domain.keys import KeyRecord
from gateway.domain.money import usd_number
from gateway.link.messages import Recall
from gateway.link.pulse import ChildArgs, Pulse, pulse_interval_s
from gateway.link.runtime import ADMIN, LINK, PUBLIC, RuntimeDir
from gateway.link.server import LinkServer, bound_socket
from gateway.log import Log, exception_fields
from gateway.settings import Settings

STORE_WAIT_S = 10.0  # for a command line that works on the store, or a control that has not quite ended
LAST_LOOK_S = 3.0  # for the journals, when asked to stop
LAST_CONTENT_S = 1.0  # for what accounts have kept, likewise
HTTP_STOP_S = 2.0  # for requests under way when asked to stop
BACKLOG = 4096  # a full one refuses edges at once, and their callers with them; the kernel lowers it to net.core.somaxconn
KEEPALIVE_S = 3600.0  # edges decide how long their connections to us live
TELEMETRY_FILE = "telemetry.msgpack"
SOCKETS_S = 1.0  # between looks whether they are still there


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
        parts.push_async_callback(telemetry.save)
        await parts.enter_async_context(_running(telemetry.run(), "telemetry"))
        limits = self._settings.limits
        desk = LeaseDesk(store=store, log=self._log, limits=limits)
        rates = LeaseDesk(store=RateBook(store=store, limits=limits), log=self._log)
        desks = Desks(desk, rates)

        fleet = FleetWatch(push=lambda merged: link.push_figures(merged), now=asyncio.get_running_loop().time)

        def joined(incarnation: str) -> None:
            telemetry.joined(incarnation)
            fleet.push()  # so that a new edge chooses well from its first request on

        def left(incarnation: str) -> None:
            telemetry.left(incarnation)
            fleet.left(incarnation)
            desks.left(incarnation)
            bookkeeper.wake()

        content = ContentStore(
            Path(self._settings.content.file), content_keys(self._settings), total_bytes_max=self._settings.content.total_bytes_max
        )
        intake = await self._take_in(content, store, telemetry, parts)
        told = Told(keeps_content=content.has_key, log=self._log)
        lookup = KeyLookup(store=store, told=told)
        await parts.enter_async_context(_running(lookup.run(), "sessions"))
        link = LinkServer(
            address=self._runtime.socket(LINK),
            incarnation=self._args.incarnation,
            catalog=self._catalogs.catalog,
            find_keys=lookup.find,
            on_joined=joined,
            on_left=left,
            on_report=telemetry.report,
            on_observed=fleet.observed,
            on_want=desks.want,
            on_back=desks.back,
            on_standing=desks.standing,
            on_journaled=lambda incarnation: bookkeeper.journaled(incarnation),
            on_content=intake.offer,
            log=self._log,
        )
        bookkeeper = self._bookkeeper(store, desk, link, telemetry)
        await bookkeeper.load()
        self._catalogs.on_catalog = link.push_catalog
        desk.attach(link)
        rates.attach(link)
        await parts.enter_async_context(_running(desk.run(), "leases"))
        await parts.enter_async_context(_running(rates.run(), "rates"))
        parts.push_async_callback(_last_look, bookkeeper, self._log)
        await parts.enter_async_context(_running(bookkeeper.run(), "bookkeeper"))
        expiry = Expiry(store=store, days=self._settings.billing.credits_expire_days, log=self._log)
        await self._hourly("expiry", expiry.look, parts)
        await self._hourly("windows", lambda: forget_windows(store, self._log), parts)
        await self._hourly("removal", self._removal(store, bookkeeper, telemetry).look, parts)
        await parts.enter_async_context(_running(self._watch_fleet(fleet), "fleet"))
        await self._listen(store, content, told, link, bookkeeper, telemetry, fleet, parts)

    async def _listen(
        self,
        store: Store,
        content: ContentStore,
        told: Told,
        link: LinkServer,
        bookkeeper: Bookkeeper,
        telemetry: Telemetry,
        fleet: FleetWatch,
        parts: contextlib.AsyncExitStack,
    ) -> None:
        """To edges, callers and operators."""

        def key_changed(digest: str, record: KeyRecord | None) -> None:
            link.push_key(digest, told(record) if record is not None else None)

        administration = Administration(
            store=store,
            on_key_changed=key_changed,
            on_funded=link.push_funded,
            drained=bookkeeper.drained,
            billing=self._settings.billing,
            catalog=lambda: self._catalogs.catalog,
            content=content,
            content_key_env=self._settings.content.key_env,
        )
        admin = AdminApi(
            administration=administration, catalogs=self._catalogs, telemetry=telemetry, on_reaped=bookkeeper.reaped, log=self._log
        )
        erasure = Erasure(store=store, erase_content=content.delete_all, log=self._log)
        await parts.enter_async_context(_running(erasure.run(), "erasure"))
        public = self._public(store, content, key_changed, link, fleet, erasure)
        parts.push_async_callback(link.stop)
        await link.start()
        await parts.enter_async_context(_listening(public, self._runtime.socket(PUBLIC)))
        await parts.enter_async_context(_listening(admin.application(), self._runtime.socket(ADMIN)))
        await parts.enter_async_context(_running(self._watch_sockets(), "sockets"))

    async def _watch_sockets(self) -> None:
        """Somebody may clear the runtime directory away. Nobody finds us then any more: the next control makes it anew."""
        while all((self._runtime.path / name).exists() for name in (LINK, PUBLIC, ADMIN)):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SOCKETS_S):
                    await self._stop_asked.wait()
                    return
        self._log.error("sockets_lost", reason=f"{self._runtime.path} ([server] runtime_dir) was removed or emptied; control starts again")
        self._runtime.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._stop_asked.set()

    def _bookkeeper(self, store: Store, desk: LeaseDesk, link: LinkServer, telemetry: Telemetry) -> Bookkeeper:
        for reason in get_args(RefusalReason):
            telemetry.declare("gateway_ledger_refused_records_total", reason)
        telemetry.declare("gateway_ledger_commit_seconds")
        bookkeeper = Bookkeeper(
            store=store,
            folder=Path(self._settings.journal.dir),
            release=desk.release,
            is_joined=lambda incarnation: link.session(incarnation) is not None,
            on_committed=link.send_to,
            on_commit=lambda seconds: telemetry.observe("gateway_ledger_commit_seconds", seconds),
            on_refused=lambda reason: telemetry.count("gateway_ledger_refused_records_total", reason),
            log=self._log,
        )
        telemetry.fact("gateway_charged_usd_total", lambda: usd_number(bookkeeper.revenue_nanos))
        telemetry.fact("gateway_journal_pending_records", lambda: float(bookkeeper.pending_records))
        telemetry.fact("gateway_journal_oldest_seconds", lambda: bookkeeper.oldest_s)
        return bookkeeper

    def _removal(self, store: Store, bookkeeper: Bookkeeper, telemetry: Telemetry) -> Removal:
        telemetry.declare("gateway_generations_removed_total")
        return Removal(
            store=store,
            days=self._settings.store.generations_days,
            drained=bookkeeper.drained,
            on_removed=lambda count: telemetry.count("gateway_generations_removed_total", more=count),
            log=self._log,
        )

    async def _take_in(self, content: ContentStore, store: Store, telemetry: Telemetry, parts: contextlib.AsyncExitStack) -> ContentIntake:
        """What accounts have kept comes in, and is deleted in time. It fails alone: nothing of it is opened here."""
        for reason in get_args(DropReason):
            telemetry.declare("gateway_content_dropped_total", reason)
        telemetry.declare("gateway_content_stored_total")
        parts.push_async_callback(_closed, content, self._log)
        intake = ContentIntake(
            store=content,
            rules=store.rules,
            on_stored=lambda: telemetry.count("gateway_content_stored_total"),
            on_dropped=lambda reason: telemetry.count("gateway_content_dropped_total", reason),
            log=self._log,
        )
        parts.push_async_callback(_last_content, intake)
        await parts.enter_async_context(_running(intake.run(), "content"))
        retention = Retention(store=content, days=self._settings.content.retention_days, log=self._log)
        await self._hourly("content_retention", retention.look, parts)
        return intake

    async def _hourly(self, name: str, chore: Callable[[], Awaitable[object]], parts: contextlib.AsyncExitStack) -> None:
        await parts.enter_async_context(_running(hourly(name, chore, self._log), name))

    async def _watch_fleet(self, fleet: FleetWatch) -> None:
        if url := self._settings.routing.prometheus_url:
            observed = await read_back(url, self._catalogs.catalog, self._log)
            if observed is not None:
                fleet.start_warm(observed)
        await fleet.run()

    def _public(
        self,
        store: Store,
        content: ContentStore,
        on_key_changed: Callable[[str, KeyRecord | None], None],
        link: LinkServer,
        fleet: FleetWatch,
        erasure: Erasure,
    ) -> web.Application:
        """What callers may ask for, beside inference."""

        def limit_changed(resource: str) -> None:
            for incarnation in list(link.joined_edges):
                link.send_to(incarnation, Recall(resource))  # what an edge has unused was granted under another limit
            link.push_funded(resource)

        authentication = Authentication(store=store, origin=self._settings.server.public_origin)
        routes = public_routes(
            authentication=authentication,
            store=store,
            content=content,
            catalogs=self._catalogs,
            settings=self._settings,
            shown=fleet.shown,
            on_key_changed=on_key_changed,
            on_limit_changed=limit_changed,
            on_account_deleted=erasure.wake,
        )
        return public_application(routes, authentication=authentication, log=self._log)

    def _abandon(self) -> None:
        self._orphaned = True
        self._stop_asked.set()

    async def _end_at_once(self, store: Store) -> None:
        """Nobody watches us any more and another gateway may be starting: leave the store whole, and go."""
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()  # so that none begins a transaction, or complains of a closed store
        await store.close()
        self._log.error("control_orphaned")
        self._log.stop()
        os._exit(1)


@contextlib.asynccontextmanager
async def _running(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    running = asyncio.create_task(work, name=name)
    try:
        yield
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def _last_look(bookkeeper: Bookkeeper, log: Log) -> None:
    """What edges wrote last, when they ended before us. It is not lost otherwise, only later."""
    try:
        async with asyncio.timeout(LAST_LOOK_S):
            await bookkeeper.read_all()
    except (TimeoutError, StoreUnavailable) as error:
        log.warning("journals_left", reason=str(error)[:200], pending=bookkeeper.pending_records)


async def _last_content(intake: ContentIntake) -> None:
    """What came last. What cannot be written in time is lost, as whatever does not fit."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_CONTENT_S):
            await intake.write_all()


async def _closed(content: ContentStore, log: Log) -> None:
    try:
        await content.close()
    except StoreUnavailable as error:
        log.warning("content_not_closed", **exception_fields(error.__cause__))


@contextlib.asynccontextmanager
async def _listening(app: web.Application, address: str) -> AsyncIterator[None]:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=HTTP_STOP_S, keepalive_timeout=KEEPALIVE_S)
    await runner.setup()
    try:
        await web.SockSite(runner, bound_socket(address), backlog=BACKLOG).start()
        yield
    finally:
        await runner.cleanup()


def _process_name(pid: int) -> str:
    """Names one process for ever: pids are used again, but not with the same start time."""
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"supervisor-{pid}-{started}"
