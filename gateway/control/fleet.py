"""What all edges see of endpoints, together: taken from each, pushed back to all, shown in the endpoints API.

A control that has just started knows nothing yet; edges then go by what they saw themselves until it knows no less.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.routing.figures import Merged, Observed
from gateway.routing.fleet import Fleet, Shown

PUSH_S = 1.0
WARMTH = "warmth"  # stands where an edge's incarnation would


class FleetWatch:
    """`observed` and `left` are told by the link, `push` takes what every edge is to know. `run()` pushes until cancelled.

    `now` is seconds of a monotonic clock.
    """

    def __init__(self, *, push: Callable[[Merged], None], now: Callable[[], float]) -> None:
        self._fleet = Fleet()
        self._push = push
        self._now = now
        self._pushed_any = False

    def observed(self, incarnation: str, observed: Observed) -> None:
        self._fleet.observe(incarnation, observed, self._now())

    def start_warm(self, observed: Observed) -> None:
        """Take what another memory of the fleet has of the last minutes, as if an edge had told it."""
        self._fleet.observe(WARMTH, observed, self._now())
        self._fleet.lost(WARMTH)

    def left(self, incarnation: str) -> None:
        """The edge's link has ended."""
        self._fleet.lost(incarnation)

    def shown(self, endpoint_id: str) -> Shown:
        """What the endpoints API says of this endpoint."""
        return self._fleet.shown(endpoint_id, self._now())

    async def run(self) -> None:
        while True:
            self.push()
            await asyncio.sleep(PUSH_S)

    def push(self) -> None:
        """Tell every edge; nothing while no endpoint was called lately, once that was said. An edge forgets figures that are
        not said again for some seconds, so those that have not changed are.
        """
        merged = self._fleet.merged(self._now())
        if merged.figures or self._pushed_any:
            self._push(merged)
        self._pushed_any = bool(merged.figures)
