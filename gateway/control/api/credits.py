"""`GET /credits`: what an account bought and what it used. Either key class may ask: many tools do so with an inference key."""

from __future__ import annotations

from aiohttp import web

from gateway.control.api.auth import Authentication
from gateway.control.api.http import API_PREFIXES, answer
from gateway.control.store import Store
from gateway.domain.money import usd_number


class CreditsApi:
    """Handler over the store's totals of the calling account."""

    def __init__(self, *, authentication: Authentication, store: Store) -> None:
        self._authentication = authentication
        self._store = store

    def routes(self) -> list[web.RouteDef]:
        return [web.get(prefix + "/credits", self.credits) for prefix in API_PREFIXES]

    async def credits(self, request: web.Request) -> web.Response:
        key = await self._authentication.key(request)
        credits = await self._store.credits(key.account_id)
        totals = {"total_credits": credits.total_nanos, "total_usage": credits.used_nanos}
        return answer({"data": {name: usd_number(nanos) for name, nanos in totals.items()}})
