"""One edge: the only constructor of its parts, and its life from the first welcome to the end of its drain."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
from pathlib import Path

from gateway.config import load_settings
from gateway.domain.catalog import Catalog
from gateway.edge.admission import Admission
from gateway.edge.bounds import Bounds
from gateway.edge.content import Contents
from gateway.edge.hedging import hedging_of
from gateway.edge.journal import Journal
from gateway.edge.parts import Parts
from gateway.edge.providers import Providers
from gateway.edge.report import ExchangeReport
from gateway.edge.resolver import Resolver
from gateway.edge.running import Running
from gateway.edge.server import EdgeServer
from gateway.edge.settlement import Settlement
from gateway.edge.site import Site
from gateway.edge.snapshots import Choice, Keys, choices_of
from gateway.edge.telemetry import Telemetry
from gateway.edge.upstream import Origin, Pool
from gateway.ledger.book import Book
from gateway.link.client import LinkClient
from gateway.link.messages import Committed, Journaled
from gateway.link.pulse import ChildArgs, Pulse, pulse_interval_s
from gateway.link.runtime import LINK, PUBLIC, RuntimeDir
from gateway.log import Log
from gateway.routing.budget import RetryBudget
from gateway.routing.figures import Observed
from gateway.routing.router import Router
from gateway.routing.standing import endpoint_figures
from gateway.settings import Settings

SWEEP_S = 1.0
LAG_S = 0.1  # how often the loop is asked how late it is


class Edge:
    """Entered once the process has a loop; `run` returns when the edge has drained."""

    def __init__(self, args: ChildArgs, settings: Settings, log: Log) -> None:
        loop = asyncio.get_running_loop()
        self._args = args
        self._settings = settings
        self._log = log
        self._loop = loop
        self._stopping = asyncio.Event()
        self._welcomed = asyncio.Event()
        runtime = RuntimeDir(Path(settings.server.runtime_dir))
        self._telemetry = Telemetry()
        self._link = self._make_link(runtime)
        self._keys = Keys(self._link)
        self._admission = Admission(book=Book(), send=self._link.send, limits=settings.limits, now=loop.time)
        self._journal = self._make_journal()
        self._told_control = False  # that records wait
        self._news = True  # control was told of something other than nothing
        routing = settings.routing
        self._router: Router[Choice] = Router(routing, site=settings.server.public_url)
        self._providers = Providers(telemetry=self._telemetry, calls_max=max(1, settings.upstream.inflight_max // args.workers))
        self._report = ExchangeReport(self._telemetry, log)
        self._control = Pool(
            Origin(unix_path=runtime.socket(PUBLIC)), resolver=Resolver(), tls=None, calls_max=settings.upstream.inflight_max
        )
        self._settlement = Settlement(journal=self._journal, report=self._report, billing=settings.billing, log=log)
        self._server = EdgeServer(
            settings=settings.server,
            parts=Parts(
                keys=self._keys,
                admission=self._admission,
                settlement=self._settlement,
                site=Site(settings.server),
                router=self._router,
                retries=self._make_retries(),
                attempts_max=routing.attempts_max,
                providers=self._providers,
                report=self._report,
                timeouts=settings.timeouts,
                upstream=settings.upstream,
                contents=self._make_contents(),
            ),
            control=self._control,
            log=log,
            hedging=hedging_of(routing.hedge_percent, self._telemetry),
            edges=args.workers,
        )
        self._running = self._make_running()
        self._pulse = self._make_pulse()
        self._declare_figures()

    async def run(self) -> None:
        self._pulse.start()
        self._loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        self._loop.add_signal_handler(signal.SIGINT, lambda: None)  # Ctrl-C reaches the whole group; the supervisor decides
        self._journal.open()
        await self._link.start()
        self._watch_lag(self._loop.time())
        self._sweep()
        welcomed = asyncio.ensure_future(self._welcomed.wait())
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait((welcomed, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not self._stopping.is_set():
            await self._server.start(socket.socket(fileno=self._args.listen_fd), _tls(self._settings))
            self._pulse.beat()
            self._log.info("edge_ready", slot=self._args.slot, incarnation=self._args.incarnation)
            await stopping
        welcomed.cancel()
        await self._server.drain()
        await self._providers.close()
        await self._control.close()
        self._settlement.settle()
        self._journal.retry()
        await self._journal.close()
        self._running.close()
        self._admission.leave()
        await self._link.stop()
        self._pulse.stop()

    def _make_link(self, runtime: RuntimeDir) -> LinkClient:
        return LinkClient(
            address=runtime.socket(LINK),
            slot=self._args.slot,
            incarnation=self._args.incarnation,
            pid=os.getpid(),
            samples=lambda: self._telemetry.changed() if self._link.takes_changes else self._telemetry.samples(),
            on_welcome=self._on_welcome,
            on_key_changed=lambda digest, key: self._keys.change(digest, key),
            on_catalog=self._on_catalog,
            on_lost=self._on_lost,
            on_grant=lambda grant: self._admission.on_grant(grant),
            on_recall=lambda resource: self._admission.on_recall(resource),
            on_funded=lambda resource: self._admission.on_funded(resource),
            on_committed=self._on_committed,
            observed=self._observed,
            on_figures=lambda merged: self._router.take(merged, self._args.incarnation, self._loop.time()),
            on_refused=lambda reason: self._log.error("control_refused", reason=reason),
        )

    def _make_journal(self) -> Journal:
        journal = self._settings.journal
        return Journal(
            Path(journal.dir),
            slot=self._args.slot,
            incarnation=self._args.incarnation,
            fsync=journal.fsync,
            fsync_s=journal.fsync_ms / 1000,
            bytes_max=journal.bytes_max // self._args.workers,
            on_appended=self._on_appended,
            log=self._log,
        )

    def _make_retries(self) -> RetryBudget:
        routing = self._settings.routing
        return RetryBudget(
            share=routing.retry_budget_share,
            per_s=routing.retry_budget_per_s,
            edges=self._args.workers,
            attempts_max=routing.attempts_max,
            now_s=self._loop.time(),
        )

    def _make_contents(self) -> Contents:
        return Contents(
            send=self._link.send_content,
            exchange_bytes_max=self._settings.content.exchange_bytes_max,
            discount_millionths=self._settings.billing.logging_discount_millionths,
        )

    def _make_running(self) -> Running:
        return Running(
            Path(self._settings.journal.dir),
            slot=self._args.slot,
            incarnation=self._args.incarnation,
            settlement=self._settlement,
            look_after=Bounds(self._admission).look_after,
            streams=self._server.exchanges,
            log=self._log,
        )

    def _make_pulse(self) -> Pulse:
        return Pulse(
            self._args.pulse_fd,
            interval_s=pulse_interval_s(self._settings.server.hang_s),
            is_ready=lambda: self._server.listening and not self._journal.failed,
            on_orphaned=self._on_orphaned,
        )

    def _declare_figures(self) -> None:
        self._lag = self._telemetry.histogram("gateway_loop_lag_seconds", "edge")
        self._dropped = self._telemetry.counter("gateway_log_dropped_total", "edge")
        self._content_dropped = self._telemetry.counter("gateway_content_dropped_total", "edge")
        self._telemetry.gauge("gateway_connections", lambda: {(): self._server.connections})
        self._telemetry.gauge("gateway_body_bytes", lambda: {(): self._server.bodies.held})
        self._telemetry.gauge("gateway_inflight_requests", lambda: {(): self._server.inflight})
        self._telemetry.gauge("gateway_inflight_attempts", self._providers.calls)
        self._telemetry.gauge("gateway_tasks", lambda: {("edge",): len(asyncio.all_tasks())})
        self._telemetry.gauges(
            ("gateway_endpoint_state", "gateway_endpoint_weight"), lambda: endpoint_figures(self._router, self._loop.time())
        )

    def _on_welcome(self, catalog: Catalog, control: str) -> None:
        self._keys.forget()
        self._telemetry.joined()
        self._admission.on_welcome()
        self._told_control = False
        # What happened without a link cannot be told any more as if it had happened just now; this edge has it in its own windows.
        self._router.report(self._loop.time())
        self._news = True
        self._on_catalog(catalog)
        self._welcomed.set()

    def _on_catalog(self, catalog: Catalog) -> None:
        self._providers.update(catalog)
        self._router.replace(catalog, choices_of(catalog, self._router, lambda endpoint: self._providers.of(endpoint) is not None))
        self._report.catalog_changed(catalog)

    def _on_lost(self) -> None:
        if not self._stopping.is_set():  # at the end it is we who leave
            self._log.warning("control_lost")
        self._admission.on_lost()

    def _observed(self) -> Observed | None:
        """What to tell control; None when nothing happened and nothing is under way, after that was said once."""
        observed = self._router.report(self._loop.time())
        had_news, self._news = self._news, bool(observed.tallies or observed.inflight or observed.ejected or observed.held)
        return observed if had_news or self._news else None

    def _on_appended(self) -> None:
        if not self._told_control and self._link.joined:
            self._told_control = True
            self._link.send(Journaled())

    def _on_committed(self, committed: Committed) -> None:
        self._journal.committed(committed.file, committed.offset)
        self._told_control = False
        if self._journal.pending_bytes:
            self._on_appended()

    def _on_orphaned(self) -> None:
        """The supervisor is gone: nobody would replace or drain us."""
        self._log.error("supervisor_lost")
        self._log.stop()
        os._exit(3)

    def _sweep(self) -> None:
        self._providers.sweep()
        self._control.sweep()
        self._admission.sweep()
        self._journal.retry()
        self._running.sweep()
        self._dropped.value = float(self._log.dropped)
        self._content_dropped.value = float(self._link.content_dropped)
        self._loop.call_later(SWEEP_S, self._sweep)

    def _watch_lag(self, due: float) -> None:
        now = self._loop.time()
        self._lag.observe(max(0.0, now - due))
        self._telemetry.fold()
        self._loop.call_later(LAG_S, self._watch_lag, now + LAG_S)


def _tls(settings: Settings) -> ssl.SSLContext | None:
    if not settings.server.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(settings.server.tls_cert, settings.server.tls_key)
    return context


async def serve(args: ChildArgs, log: Log) -> None:
    await Edge(args, load_settings(Path(args.config)), log).run()
