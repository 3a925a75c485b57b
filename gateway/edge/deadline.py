"""A deadline that is cheap to move.

Every byte of a stream moves some deadline. Cancelling and re-arming a loop timer each time costs more than the byte
itself, so the timer is left where it stands: when it rings early it looks at the true time and sleeps on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadline:
    """Calls `on_expired` once when the time set last has come. Times are of `loop.time()`, in seconds."""

    __slots__ = ("_at", "_loop", "_on_expired", "_timer", "_timer_at")

    def __init__(self, loop: asyncio.AbstractEventLoop, on_expired: Callable[[], None]) -> None:
        self._loop = loop
        self._on_expired = on_expired
        self._at: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    def set(self, at: float) -> None:
        """Expire at `at`; replaces what was set before."""
        self._at = at
        if self._timer is None or at < self._timer_at:
            self._arm(at)

    def clear(self) -> None:
        """Not to expire, until set again. The timer may stay and ring into nothing."""
        self._at = None

    def close(self) -> None:
        """Give the timer back for good, and let go of whoever it would have told."""
        self._at = None
        self._on_expired = _nothing
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
        self._on_expired()


def _nothing() -> None:
    pass
