"""One connection between an edge and control: both directions in order, each end told of the other's in its own time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from gateway.link.messages import ControlMessage, EdgeMessage

if TYPE_CHECKING:
    from tests.simulation.control import SimControl
    from tests.simulation.edge import SimEdge


class Link:
    def __init__(self, edge: SimEdge, control: SimControl, chance: random.Random, *, slowness: Callable[[], float]) -> None:
        self.edge = edge
        self.control = control
        self.session = 0
        self.edge_open = self.control_open = True
        self._chance = chance
        self._slowness = slowness
        self._loop = asyncio.get_running_loop()
        self._up_at = self._down_at = 0.0

    def to_control(self, message: EdgeMessage) -> None:
        if self.edge_open:
            self._up_at = self._after(self._up_at)
            self._loop.call_at(self._up_at, self._at_control, message)

    def to_edge(self, message: ControlMessage) -> None:
        if self.control_open:
            self._down_at = self._after(self._down_at)
            self._loop.call_at(self._down_at, self.edge.act, lambda: self._at_edge(message))

    def close_by_edge(self) -> None:
        """Also when it dies. Control reads some of what was under way, then the end."""
        if self.edge_open:
            self.edge_open = False
            self._loop.call_at(self._some_moment(self._up_at), self._end_at_control)

    def close_by_control(self) -> None:
        if self.control_open:
            self.control_open = False
            self._loop.call_at(self._some_moment(self._down_at), self.edge.act, self._end_at_edge)

    def _at_control(self, message: EdgeMessage) -> None:
        if self.control_open:
            self.control.received(self, message)

    def _at_edge(self, message: ControlMessage) -> None:
        if self.edge_open:
            self.edge.received(self, message)

    def _end_at_control(self) -> None:
        if self.control_open:
            self.control_open = False
            self.control.closed(self)

    def _end_at_edge(self) -> None:
        if self.edge_open:
            self.edge_open = False
            self.edge.lost(self)

    def _after(self, last_s: float) -> float:
        delay_s = self._chance.expovariate(1000.0) if self._chance.random() >= self._slowness() else self._chance.uniform(0.05, 0.5)
        return max(last_s, self._loop.time() + delay_s) + 1e-6

    def _some_moment(self, last_s: float) -> float:
        now_s = self._loop.time()
        return self._chance.uniform(now_s, max(now_s + 0.002, last_s + 0.002))
