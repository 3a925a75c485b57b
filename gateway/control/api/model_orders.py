"""Orders of models by what only their use shows: speed of late, and how much all accounts of this gateway ask of them.

Looked up at most so often, however many callers sort by it.
"""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Generic, TypeVar

from gateway.control.store.management import ModelUse
from gateway.domain.catalog import Model
from gateway.routing.figures import Percentiles
from gateway.routing.fleet import Shown

Order = Callable[[Model], float]  # least first
T = TypeVar("T")

LAST = float("inf")  # models that nobody used
SPEEDS_S = 1.0
USE_S = 300.0
DAYS = 7


class ModelOrders:
    """`shown` says what is known of an endpoint, by its id; `used` what was asked of each model from a UTC day on; `now` is unix time."""

    def __init__(
        self,
        *,
        shown: Callable[[str], Shown],
        used: Callable[[str], Awaitable[Mapping[str, ModelUse]]],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._shown = shown
        self._used = used
        self._now = now
        self._speeds: _Recent[dict[str, Shown]] = _Recent(SPEEDS_S)
        self._use: _Recent[Mapping[str, ModelUse]] = _Recent(USE_S)

    async def of(self, sort: str, models: Iterable[Model]) -> Order | None:
        """For these models; None: it is no order by use."""
        if sort in ("throughput-high-to-low", "latency-low-to-high"):
            shown = await self._speeds.get(lambda: self._all_shown(models))
            return _quickest(shown) if sort.startswith("latency") else _fastest(shown)
        if sort in ("most-popular", "top-weekly"):
            use = await self._use.get(self._last_days)
            if sort == "top-weekly":
                return lambda model: -use[model.id].tokens if model.id in use else LAST
            return lambda model: -use[model.id].requests if model.id in use else LAST
        return None

    async def _all_shown(self, models: Iterable[Model]) -> dict[str, Shown]:
        return {endpoint.id: self._shown(endpoint.id) for model in models for endpoint in model.endpoints}

    async def _last_days(self) -> Mapping[str, ModelUse]:
        today = datetime.datetime.fromtimestamp(self._now(), datetime.UTC).date()
        return await self._used((today - datetime.timedelta(days=DAYS - 1)).isoformat())


class _Recent(Generic[T]):
    """A value that is made anew when it is asked for and older than `for_s` seconds; by one caller, while others wait for it."""

    def __init__(self, for_s: float) -> None:
        self._for_s = for_s
        self._until = float("-inf")
        self._value: T | None = None
        self._making = asyncio.Lock()

    async def get(self, make: Callable[[], Awaitable[T]]) -> T:
        async with self._making:
            if self._value is None or time.monotonic() >= self._until:
                self._value = await make()
                self._until = time.monotonic() + self._for_s
            return self._value


def _quickest(shown: Mapping[str, Shown]) -> Order:
    """By the median time to the first token of the endpoint where it is shortest."""
    return lambda model: min((each.p50 for each in _known(model, shown, "latency_last_30m")), default=LAST)


def _fastest(shown: Mapping[str, Shown]) -> Order:
    """By the median throughput of the endpoint where it is highest."""
    return lambda model: -max((each.p50 for each in _known(model, shown, "throughput_last_30m")), default=-LAST)


def _known(model: Model, shown: Mapping[str, Shown], figure: str) -> Iterable[Percentiles]:
    for endpoint in model.endpoints:
        found = getattr(shown.get(endpoint.id), figure, None)
        if found is not None:
            yield found
