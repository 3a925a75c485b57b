"""Promises of time, tested on machines that stand still for half a second now and then.

Such a pause comes and goes, and a gateway that breaks its promise breaks it each time: so a test that finds something
untimely is run again, and fails when it is untimely three times. Everything else that a test asserts has one chance.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

TRIES = 3
Test = TypeVar("Test", bound=Callable[..., Any])


class Untimely(AssertionError):
    """Something took less or more time than it should."""


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
            return await test(*args, **named)

        return awaited  # type: ignore[return-value]

    @functools.wraps(test)
    def called(*args: Any, **named: Any) -> Any:
        for _ in range(TRIES - 1):
            try:
                return test(*args, **named)
            except Untimely as untimely:
                print(f"again: {untimely}")
        return test(*args, **named)

    return called  # type: ignore[return-value]
