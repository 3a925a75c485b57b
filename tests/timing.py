"""Promises of time, tested on machines that stand still for half a second now and then, beside other tests.

Such a pause comes and goes, and a gateway that breaks its promise breaks it each time: so a test that finds something
untimely is run again, with no other test beside it, and fails when it is untimely three times. Everything else that a
test asserts has one chance.
"""

from __future__ import annotations

import asyncio
import fcntl
import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

TRIES = 3
Test = TypeVar("Test", bound=Callable[..., Any])


class Untimely(AssertionError):
    """Something took less or more time than it should."""


class Company:
    """The tests that the workers of one `pytest -n` run at the same moment: any number together, or one alone."""

    def __init__(self) -> None:
        self._gate = self._room = -1  # without workers nobody is there to wait for
        self._alone = False

    def share(self, folder: Path) -> None:
        """The folder is one for all workers."""
        self._gate, self._room = (os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) for name in ("gate", "room"))

    def enter(self) -> None:
        """Before each test; waits while one is alone, or about to be."""
        self._take(fcntl.LOCK_SH)

    def be_alone(self) -> None:
        """Waits until no other test runs; lasts until `leave`."""
        if not self._alone:
            self._take(fcntl.LOCK_EX)
            self._alone = True

    def leave(self) -> None:
        self._alone = False
        if self._room >= 0:
            fcntl.flock(self._room, fcntl.LOCK_UN)

    def _take(self, how: int) -> None:
        if self._room < 0:
            return
        self.leave()  # two that want to be alone must not wait for each other
        fcntl.flock(self._gate, fcntl.LOCK_EX)  # who waits here lets nobody in before him
        fcntl.flock(self._room, how)
        fcntl.flock(self._gate, fcntl.LOCK_UN)


company = Company()  # of this process; `conftest` says who it is


def in_time(seconds: float, at_most: float, *, at_least: float = 0.0) -> None:
    """For use in a test with `@again_if_untimely`. Raises Untimely."""
    if not at_least <= seconds <= at_most:
        raise Untimely(f"took {seconds:.3f} s, not {at_least:.3f} to {at_most:.3f} s")


def again_if_untimely(test: Test) -> Test:
    """The test may be run three times with the same fixtures, until `in_time` has nothing to say."""
    if inspect.iscoroutinefunction(test):

        @functools.wraps(test)
        async def awaited(*args: Any, **named: Any) -> Any:
            for _ in range(TRIES - 1):
                try:
                    return await test(*args, **named)
                except Untimely as untimely:
                    print(f"again: {untimely}")
                    await asyncio.to_thread(company.be_alone)
            return await test(*args, **named)

        return awaited  # type: ignore[return-value]

    @functools.wraps(test)
    def called(*args: Any, **named: Any) -> Any:
        for _ in range(TRIES - 1):
            try:
                return test(*args, **named)
            except Untimely as untimely:
                print(f"again: {untimely}")
                company.be_alone()
        return test(*args, **named)

    return called  # type: ignore[return-value]
