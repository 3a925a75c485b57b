"""The admin socket's API: for the command line and the supervisor of this machine, never reachable by callers.

POST /accounts /keys /credits /rules     the bodies and answers of `gateway.control.administration`
POST /content/rotate              a part of it: to be asked again with `after` as it was told
GET  /ledger/verify
POST /catalog/reload              422 with the problems when refused
POST /supervisor                  {"starts": {"edge": 3, "control": 1}}: processes started since the supervisor started
POST /reaped                      {"slot": 0, "incarnation": "..."}: this edge is dead
GET  /metrics /health
"""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec
from aiohttp import web

from gateway import __version__
from gateway.control.administration import Administration, ContentRotation, NewAccount, NewCredits, NewKey, NewRules
from gateway.control.api.http import answer, decoded, errors
from gateway.control.catalog_source import CatalogRefused, CatalogSource
from gateway.control.telemetry import Telemetry
from gateway.control.totals import CONTENT_TYPE
from gateway.domain.errors import BadRequest
from gateway.log import Log

ROLES = frozenset({"edge", "control"})  # a closed set: they become a label


class Starts(msgspec.Struct, frozen=True):
    starts: dict[str, int]


class Reaped(msgspec.Struct, frozen=True):
    slot: int
    incarnation: str


class AdminApi:
    """Handlers of the admin socket."""

    def __init__(
        self,
        *,
        administration: Administration,
        catalogs: CatalogSource,
        telemetry: Telemetry,
        on_reaped: Callable[[str], None] = lambda incarnation: None,
        log: Log,
    ) -> None:
        self._administration = administration
        self._catalogs = catalogs
        self._telemetry = telemetry
        self._on_reaped = on_reaped
        self._log = log

    def application(self) -> web.Application:
        app = web.Application(middlewares=[errors(self._log)])
        app.add_routes(
            [
                web.post("/accounts", self.create_account),
                web.post("/keys", self.create_key),
                web.post("/credits", self.add_credits),
                web.post("/rules", self.set_rules),
                web.post("/content/rotate", self.rotate_content),
                web.get("/ledger/verify", self.verify_ledger),
                web.post("/catalog/reload", self.reload_catalog),
                web.post("/supervisor", self.count_starts),
                web.post("/reaped", self.reaped),
                web.get("/metrics", self.metrics),
                web.get("/health", self.health),
            ]
        )
        return app

    async def create_account(self, request: web.Request) -> web.Response:
        created = await self._administration.create_account(await decoded(request, NewAccount))
        self._log.info("account_created", account=created.account_id)
        return answer(created)

    async def create_key(self, request: web.Request) -> web.Response:
        wish = await decoded(request, NewKey)
        created = await self._administration.create_key(wish)
        self._log.info("key_created", account=wish.account_id, hash=created.hash)
        return answer(created)

    async def add_credits(self, request: web.Request) -> web.Response:
        wish = await decoded(request, NewCredits)
        added = await self._administration.add_credits(wish)
        self._log.info("credits_added", account=wish.account_id, usd=wish.usd)
        return answer(added)

    async def set_rules(self, request: web.Request) -> web.Response:
        wish = await decoded(request, NewRules)
        rules = await self._administration.set_rules(wish)
        self._log.info("account_rules_set", account=wish.account_id)
        return answer(rules)

    async def rotate_content(self, request: web.Request) -> web.Response:
        rotated = await self._administration.rotate_content(await decoded(request, ContentRotation))
        if rotated.after is None:
            self._log.info("content_rotated")
        return answer(rotated)

    async def verify_ledger(self, request: web.Request) -> web.Response:
        report = await self._administration.verify_ledger()
        if report.ok is False:
            self._log.error("ledger_differs", difference_nanos=report.difference_nanos, problems=report.problems[:10])
        return answer(report)

    async def reload_catalog(self, request: web.Request) -> web.Response:
        try:
            reloaded = await self._catalogs.reload()
        except CatalogRefused:
            self._telemetry.count("gateway_catalog_reloads_total", "refused")
            raise
        self._telemetry.count("gateway_catalog_reloads_total", "ok")
        return answer(reloaded)

    async def count_starts(self, request: web.Request) -> web.Response:
        starts = (await decoded(request, Starts)).starts
        if not starts.keys() <= ROLES:
            raise BadRequest("starts: an unknown role")
        self._telemetry.supervisor_started(starts)
        return answer({})

    async def reaped(self, request: web.Request) -> web.Response:
        incarnation = (await decoded(request, Reaped)).incarnation
        self._telemetry.reaped(incarnation)
        self._on_reaped(incarnation)
        return answer({})

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=await self._telemetry.scrape(), headers={"Content-Type": CONTENT_TYPE})

    async def health(self, request: web.Request) -> web.Response:
        return answer({"status": "ok", "version": __version__, "pid": os.getpid(), "catalog": self._catalogs.catalog.revision})
