"""The operations listener: /healthz, /readyz and /metrics for operators and Prometheus. Private; never for callers.

Answers from what the supervisor knows, so it also answers while every edge and control hang.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec
from aiohttp import web

from gateway.supervisor.admin import Answer, ControlSilent


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The body of /healthz. Process ids; control is null while it is being replaced."""

    status: Literal["ok", "degraded", "draining"]
    version: str
    supervisor: int
    control: int | None
    edges: list[int]
    operations_port: int


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """The body of /readyz; `reason` says why not."""

    ready: bool
    reason: str = ""


class Operations:
    """`start()` listens, `stop()` ends it; `port` is the one in use."""

    def __init__(
        self,
        *,
        health: Callable[[int], Health],
        readiness: Callable[[], Readiness],
        metrics: Callable[[], Awaitable[Answer]],
    ) -> None:
        self._health = health
        self._readiness = readiness
        self._metrics = metrics
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Raises OSError when the address cannot be listened on."""
        app = web.Application(middlewares=[_errors_as_json], client_max_size=1)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._relay_metrics)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        return _json(200, self._health(self.port))

    async def _readyz(self, _: web.Request) -> web.Response:
        readiness = self._readiness()
        return _json(200 if readiness.ready else 503, readiness)

    async def _relay_metrics(self, _: web.Request) -> web.Response:
        try:
            answer = await self._metrics()
        except ControlSilent as silent:
            return _error(503, f"control does not answer ({silent}); it is being watched, try the next scrape")
        return web.Response(status=answer.status, body=answer.body, headers={"Content-Type": answer.content_type})


@web.middleware
async def _errors_as_json(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _error(error.status, "this listener has GET /healthz, /readyz and /metrics only")


def _error(status: int, message: str) -> web.Response:
    return _json(status, {"error": {"code": status, "message": message}})


def _json(status: int, body: object) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(body), content_type="application/json")
