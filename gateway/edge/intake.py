"""Whose request begins next, when more arrive than can be served at once.

To begin a request costs its edge about as much as to answer it. A turn of the loop that begins hundreds of them keeps all
answers under way, and everybody else's request, waiting meanwhile. So a turn that has run for `TURN_S` begins no more: what
has arrived waits by account, and each later turn takes one of each account, round and round, until its time is up. Who
floods waits behind himself, and nobody waits for longer than `WAIT_S_MAX`: whoever has is refused, and so are the next ones
of an account whose oldest request has, which costs a fraction of serving them. A longer wait would serve nobody sooner: while
more arrives than can be served, it only makes all answers late (OVL-01). A wait of few turns is no such thing:
then the machine stood still, and what piled up is served soon.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.edge.exchange import InferenceExchange

TURN_S = 0.001
WAIT_S_MAX = 1.0  # ten thousand requests at once, on a machine of their own
TURNS_MIN = 3  # that such a wait has lasted for


class Intake:
    """Lets requests begin at once while there is time, else in turns by account. Times are of `time.perf_counter`, in seconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._turn_at = 0.0  # when this turn of the loop began its first request; 0: it has begun none
        self._turns = 0  # in which somebody waited
        self._waiting: dict[str, deque[tuple[float, int, InferenceExchange]]] = {}  # by account, whose turn it is first

    def __repr__(self) -> str:
        return f"<Intake waiting {self.waiting} of {len(self._waiting)} accounts>"

    @property
    def waiting(self) -> int:
        """Requests that have arrived and not begun."""
        return sum(map(len, self._waiting.values()))

    def has_time(self, now: float) -> bool:
        """Whether a request may begin in this turn; else it is to `wait`."""
        if not self._turn_at:
            self._turn_at = now
            self._loop.call_soon(self.next_turn)
            return True
        return now - self._turn_at < TURN_S and not self._waiting

    def wait(self, exchange: InferenceExchange, account_id: str, now: float) -> bool:
        """`exchange.begin_late` or `crowd_out` will be called in its turn. False: its account has waited for too long already."""
        queue = self._waiting.get(account_id)
        if queue is None:
            queue = self._waiting[account_id] = deque()
        elif self._is_long(queue[0][0], queue[0][1], now):
            return False
        queue.append((now, self._turns, exchange))
        return True

    def next_turn(self) -> None:
        """The loop calls this between two looks at its sockets, while there is anything to do."""
        if not self._waiting:
            self._turn_at = 0.0
            return
        self._loop.call_soon(self.next_turn)  # after the sockets were looked at again
        self._turns += 1
        self._turn_at = now = time.perf_counter()
        until = now + TURN_S
        while self._waiting and now < until:
            account_id = next(iter(self._waiting))
            queue = self._waiting.pop(account_id)
            since, turn, exchange = queue.popleft()
            if queue:
                self._waiting[account_id] = queue  # behind the others
            try:
                if self._is_long(since, turn, now):
                    exchange.crowd_out()
                else:
                    exchange.begin_late(now - since)
            except Exception:
                exchange.abandon()
                raise
            now = time.perf_counter()

    def _is_long(self, since: float, turn: int, now: float) -> bool:
        return now - since > WAIT_S_MAX and self._turns - turn >= TURNS_MIN
