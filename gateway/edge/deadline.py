"""A deadline that is cheap to move.

Every byte of a stream moves some deadline. Cancelling and re-arming a loop timer each time costs more than the byte
itself, so the timer is left where it stands: when it rings early it looks at the true time and sleeps on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadline:
    """Calls what was set last, once, when its time has come. Times are of `loop.time()`, in seconds."""

    __slots__ = ("_at", "_loop", "_then", "_timer", "_timer_at")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._at: float | None = None
        self._then: Callable[[], None] = _nothing
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    def set(self, at: float, then: Callable[[], None]) -> None:
        """Call `then` at `at`; replaces what was set before."""
        self._at = at
        self._then = then
        if self._timer is None or at < self._timer_at:
            self._arm(at)

    def clear(self) -> None:
        """Nothing is due, until set again. The timer may stay and ring into nothing."""
        self._at = None

    def close(self) -> None:
        """Give the timer back for good, and let go of whoever it would have told."""
        self._at = None
        self._then = _nothing
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_at(at, self._ring)

    def _ring(self) -> None:
        self._timer = None
        at = self._at
        if at is None:
            return
        # The loop's clock has millisecond steps: a timer may ring a hair before its time.
        if at - self._loop.time() > 0.001:
            self._arm(at)
            return
        self._at = None
        then, self._then = self._then, _nothing
        then()


def _nothing() -> None:
    pass
