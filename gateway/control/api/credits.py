"""`GET /credits`: what an account bought and what it used. Either key class may ask: many tools do so with an inference key."""

from __future__ import annotations

import msgspec
from aiohttp import web

from gateway.control.api.http import answer
from gateway.control.api.route import Call, Nothing, Route
from gateway.control.store import Store
from gateway.domain.money import usd_number


class CreditTotals(msgspec.Struct, frozen=True):
    """USD. The balance is the difference, and may be negative."""

    total_credits: float
    total_usage: float


class CreditsAnswer(msgspec.Struct, frozen=True):
    data: CreditTotals


class CreditsApi:
    """Handler over the store's totals of the calling account."""

    def __init__(self, *, store: Store) -> None:
        self._store = store

    def routes(self) -> list[Route]:
        return [
            Route(
                method="GET", path="/credits", access="either", handler=self.get_credits, answer=CreditsAnswer,
                summary="What the account bought and used",
            )
        ]  # fmt: skip

    async def get_credits(self, call: Call[Nothing, Nothing]) -> web.Response:
        credits = await self._store.credits(call.caller.account_id)
        return answer(CreditsAnswer(CreditTotals(usd_number(credits.total_nanos), usd_number(credits.used_nanos))))
