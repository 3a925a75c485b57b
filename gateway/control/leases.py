"""Leases: who may spend how much of what alone. Grants them, recalls what lies unused, and returns what the dead leave.

Control's numbers are durable before an edge hears of a grant, and an edge's numbers win whenever it joins again, for
it can only spend what it has heard of. A grant belongs to the link it was asked on: with that link it is void.
All messages of all edges pass through one queue, many a transaction, in the order they came.

An edge forgets the lease of a window that is over once nothing holds it, and gives back what was unused. If that is lost
with the link, the lease is missing from where the edge stands, which closes it here as well. What was spent of it may be
booked only later and then exceeds what is left as granted: nobody else gains by it, and the name is not asked for again.

Of a day's free requests what is used is a row of no edge, which the journals' records add to as they settle those of the
edges: after any death the quota lacks exactly what was served.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from gateway.control.allowances import UNLIMITED, free_requests_per_day
from gateway.control.store import LeaseBook, LeaseRow, Store
from gateway.domain import resources
from gateway.domain.errors import StoreUnavailable
from gateway.domain.money import AMOUNT_NANOS_MAX
from gateway.link.messages import Back, Grant, Recall, Standing, Want
from gateway.log import Log, exception_fields
from gateway.settings import Limits

QUEUE_MAX = 20_000  # messages over all edges; beyond it a Want is answered "unavailable" and other senders must join anew
BATCH_MAX = 500  # messages per transaction
RECALL_S = 0.25  # how long a Want waits for what other edges have unused
AHEAD = 128  # requests like the one that waits, granted along with it where there is plenty: no demand was measured yet
RETRY_S_MIN = 0.05
RETRY_S_MAX = 0.5


class Leasing(Protocol):
    """Where leases are kept: a store, or memory."""

    def leasing(self) -> AbstractAsyncContextManager[LeaseBook]: ...


class Door(Protocol):
    """What the desk needs of the link. A session is one connection of one edge."""

    @property
    def joined_edges(self) -> Iterable[str]: ...
    def session(self, incarnation: str) -> int | None: ...
    def send_to(self, incarnation: str, message: Grant | Recall, *, session: int | None = None) -> bool: ...
    def push_funded(self, resource: str) -> None: ...
    def drop(self, incarnation: str) -> None: ...


class Released:
    """The order to give back all leases of a dead edge."""

    def __init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Item:
    """One message in the queue."""

    __slots__ = ("incarnation", "last_try", "message", "session")

    def __init__(self, incarnation: str, session: int | None, message: Want | Back | Standing | Released) -> None:
        self.incarnation = incarnation
        self.session = session
        self.message = message
        self.last_try = False  # everything unused was recalled


class Round:
    """One recall of a resource: for whom, and who has yet to answer."""

    def __init__(self, item: Item, asked: set[str]) -> None:
        self.item = item
        self.asked = asked
        self.later: deque[Item] = deque()  # other Wants of the resource, after this one
        self.timer: asyncio.TimerHandle | None = None

    def gave(self, incarnation: str, nanos: int) -> None:
        """What an edge gives back while it waits for more, it lacks as well.

        Granted only what it asked for, it would ask again, and edges that are short together would pass the rest around for ever.
        """
        for item in (self.item, *self.later):
            want = item.message
            if item.incarnation == incarnation and isinstance(want, Want) and want.at_least:
                item.message = msgspec.structs.replace(want, at_least=want.at_least + nanos)


def releaser(store: Store) -> Callable[[str], Awaitable[None]]:
    """Gives back all leases of a dead edge where no desk runs."""

    async def release(incarnation: str) -> None:
        async with store.leasing() as book:
            await book.delete(incarnation)

    return release


def grant_nanos(want: Want, *, total: int, free: int, edges: int) -> int | None:
    """How much to grant; None: there is not enough. `free` is what no lease has, `total` what there is without leases.

    More than was asked for, where it is plenty: what the edge would spend soon, but never so much that others starve.
    """
    if total < 0 or want.at_least > max(0, free):
        return None
    wish = max(want.demand, AHEAD * want.at_least)
    share = max(0, free) // (2 * max(1, edges))
    return min(max(want.at_least, min(wish, share)), max(0, free))


class Page:
    """The leases that one batch is about, as they change in the course of it."""

    def __init__(self, totals: dict[str, int], rows: Iterable[LeaseRow]) -> None:
        self.totals = totals
        self._rows: dict[str, dict[str, LeaseRow]] = {}
        self._changed: dict[tuple[str, str], LeaseRow] = {}
        for row in rows:
            self._rows.setdefault(row.resource, {})[row.incarnation] = row

    def row(self, resource: str, incarnation: str) -> LeaseRow:
        rows = self._rows.setdefault(resource, {})
        if incarnation not in rows:
            rows[incarnation] = LeaseRow(resource, incarnation)
        return rows[incarnation]

    def of_edge(self, incarnation: str) -> list[LeaseRow]:
        return [rows[incarnation] for rows in self._rows.values() if incarnation in rows]

    def holders(self, resource: str) -> list[str]:
        """Edges that may have some of it unused."""
        return [row.incarnation for row in self._rows.get(resource, {}).values() if row.open_nanos > 0]

    def free(self, resource: str, incarnation: str) -> int:
        """What may be granted to this edge. Its own overspending is made up for by what it asks; that of others is no credit."""
        rows = self._rows.get(resource, {}).values()
        leased = sum(row.open_nanos if row.incarnation == incarnation else max(0, row.open_nanos) for row in rows)
        return self.totals[resource] - leased

    def set_granted(self, row: LeaseRow, nanos: int) -> None:
        row.granted_nanos = nanos
        self._changed[row.resource, row.incarnation] = row

    def remove(self, incarnation: str) -> list[str]:
        """Resources of which something came back."""
        rows = self.of_edge(incarnation)
        for row in rows:
            del self._rows[row.resource][incarnation]
            self._changed.pop((row.resource, incarnation), None)
        return [row.resource for row in rows if row.open_nanos > 0]

    @property
    def changed(self) -> Iterable[LeaseRow]:
        return self._changed.values()


class LeaseDesk:
    """Answers the edges' messages; `run()` until cancelled. `attach` the link before the first message."""

    def __init__(self, *, store: Leasing, log: Log, limits: Limits | None = None, recall_s: float = RECALL_S) -> None:
        self._store = store
        self._log = log
        self._limits = limits or Limits()
        self._recall_s = recall_s
        self._queue: deque[Item] = deque()
        self._filled = asyncio.Event()
        self._rounds: dict[str, Round] = {}

    def __repr__(self) -> str:
        return f"<LeaseDesk queue {len(self._queue)} recalls {len(self._rounds)}>"

    def attach(self, link: Door) -> None:
        self._link = link

    # Told by the link; the order per edge is the order of these calls.

    def want(self, incarnation: str, message: Want) -> None:
        if self._is_full() or message.at_least < 0 or message.demand < 0:
            self._link.send_to(incarnation, Grant(message.resource, 0, unavailable=True))
        else:
            self._append(incarnation, message)

    def back(self, incarnation: str, message: Back) -> None:
        self._append_or_drop(incarnation, message, 0 <= message.nanos <= AMOUNT_NANOS_MAX)

    def standing(self, incarnation: str, message: Standing) -> None:
        self._append_or_drop(incarnation, message, all(0 <= nanos <= AMOUNT_NANOS_MAX for nanos in message.granted.values()))

    def left(self, incarnation: str) -> None:
        """Its link ended: nobody waits for its answers any more."""
        for round_ in list(self._rounds.values()):
            self._answered(round_, incarnation)

    async def release(self, incarnation: str) -> None:
        """Give back all leases of a dead edge, after everything it said. Raises StoreUnavailable."""
        order = Released()
        self._queue.append(Item(incarnation, None, order))  # beside the cap: one a dead edge, and its sender waits
        self._filled.set()
        await order.done

    async def run(self) -> None:
        retry_s = RETRY_S_MIN
        while True:
            await self._filled.wait()
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), BATCH_MAX))]
            if not self._queue:
                self._filled.clear()
            try:
                answers, page = await self._decide(batch)
            except StoreUnavailable as error:
                self._log.warning("leases_unavailable", messages=len(batch), reason=str(error)[:200])
                self._refuse(batch)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, RETRY_S_MAX)
            except Exception as error:  # noqa: BLE001 - the task's outermost edge: one bad message must not end all others
                self._log.error("leases_failed", messages=len(batch), **exception_fields(error))
                self._give_up(batch)
            else:
                retry_s = RETRY_S_MIN
                self._carry_out(answers, page)

    def _is_full(self) -> bool:
        return len(self._queue) + sum(len(round_.later) for round_ in self._rounds.values()) >= QUEUE_MAX

    def _append(self, incarnation: str, message: Want | Back | Standing) -> None:
        self._queue.append(Item(incarnation, self._link.session(incarnation), message))
        self._filled.set()

    def _append_or_drop(self, incarnation: str, message: Back | Standing, is_sane: bool) -> None:
        if is_sane and not self._is_full():
            self._append(incarnation, message)
        else:
            self._log.error("edge_dropped_leases", incarnation=incarnation, queue=len(self._queue), sane=is_sane)
            self._link.drop(incarnation)  # it says where it stands when it is back

    # Decisions, within one transaction.

    async def _decide(self, batch: list[Item]) -> tuple[list[tuple[Item, Grant | Recall | list[str] | None]], Page]:
        """What to say about each item once all of it is durable."""
        async with self._store.leasing() as book:
            page = await self._load(book, batch)
            recalling = set(self._rounds)
            answers: list[tuple[Item, Grant | Recall | list[str] | None]] = []
            for item in batch:
                message = item.message
                if isinstance(message, Want):
                    answer = self._on_want(page, item, message, recalling)
                    if isinstance(answer, Recall):
                        recalling.add(message.resource)
                    answers.append((item, answer))
                elif isinstance(message, Back):
                    self._on_back(page, item.incarnation, message)
                    answers.append((item, None))
                elif isinstance(message, Standing):
                    self._on_standing(page, item.incarnation, message)
                    answers.append((item, None))
                else:
                    await book.delete(item.incarnation)
                    answers.append((item, page.remove(item.incarnation)))
            await book.write(page.changed)
        return answers, page

    async def _load(self, book: LeaseBook, batch: list[Item]) -> Page:
        wanted = {item.message.resource for item in batch if isinstance(item.message, Want)}
        named = wanted | {item.message.resource for item in batch if isinstance(item.message, Back)}
        whole = {item.incarnation for item in batch if isinstance(item.message, Standing | Released)}
        totals = await book.totals(wanted) if wanted else {}
        for resource in filter(resources.is_quota, totals):
            totals[resource] = free_requests_per_day(self._limits, totals[resource]) or UNLIMITED
        return Page(totals, await book.rows(resources=named, incarnations=whole))

    def _on_want(self, page: Page, item: Item, want: Want, recalling: set[str]) -> Grant | Recall | None:
        """A Recall: to be sent before there is an answer, or being sent. None: nobody waits for an answer."""
        if item.session is None or self._link.session(item.incarnation) != item.session:
            return None
        if want.resource not in page.totals:
            return Grant(want.resource, 0, refused=True)
        if want.resource in recalling:
            return Recall(want.resource)
        total, free = page.totals[want.resource], page.free(want.resource, item.incarnation)
        nanos = grant_nanos(want, total=total, free=free, edges=sum(1 for _ in self._link.joined_edges))
        if nanos is not None:
            row = page.row(want.resource, item.incarnation)
            if nanos:
                page.set_granted(row, row.granted_nanos + nanos)
            return Grant(want.resource, nanos)
        if total >= 0 and not item.last_try and self._unused_elsewhere(page, item, want.resource):
            return Recall(want.resource)
        return Grant(want.resource, 0, refused=True, free_nanos=free, limit=total)

    def _unused_elsewhere(self, page: Page, item: Item, resource: str) -> set[str]:
        return set(page.holders(resource)).intersection(self._link.joined_edges) - {item.incarnation}

    def _on_back(self, page: Page, incarnation: str, back: Back) -> None:
        row = page.row(back.resource, incarnation)
        if back.nanos > row.open_nanos:
            # Only a bug could do this. What it still holds comes back when it dies.
            if back.nanos:
                self._log.error("back_exceeds_lease", incarnation=incarnation, nanos=back.nanos, open_nanos=row.open_nanos)
            return
        page.set_granted(row, row.granted_nanos - back.nanos)

    def _on_standing(self, page: Page, incarnation: str, standing: Standing) -> None:
        for row in page.of_edge(incarnation):
            if row.resource not in standing.granted and row.granted_nanos != row.settled_nanos:
                page.set_granted(row, row.settled_nanos)
        for resource, nanos in standing.granted.items():
            page.set_granted(page.row(resource, incarnation), nanos)

    # After the commit.

    def _carry_out(self, answers: list[tuple[Item, Grant | Recall | list[str] | None]], page: Page) -> None:
        for item, answer in answers:
            message = item.message
            if isinstance(answer, Grant):
                self._link.send_to(item.incarnation, answer, session=item.session)
            elif isinstance(answer, Recall):
                self._recall(item, answer, page)
            elif isinstance(message, Back):
                if (round_ := self._rounds.get(message.resource)) is not None:
                    round_.gave(item.incarnation, message.nanos)
                    self._answered(round_, item.incarnation)
            elif isinstance(message, Released):
                if not message.done.done():
                    message.done.set_result(None)
                for resource in answer or ():
                    self._link.push_funded(resource)

    def _recall(self, item: Item, recall: Recall, page: Page) -> None:
        running = self._rounds.get(recall.resource)
        if running is not None:
            running.later.append(item)
            return
        others = self._unused_elsewhere(page, item, recall.resource)
        round_ = Round(item, {other for other in others if self._link.send_to(other, recall)})
        self._rounds[recall.resource] = round_
        if round_.asked:
            round_.timer = asyncio.get_running_loop().call_later(self._recall_s, self._end, round_)
        else:
            self._end(round_)

    def _answered(self, round_: Round, incarnation: str) -> None:
        round_.asked.discard(incarnation)
        if not round_.asked:
            self._end(round_)

    def _end(self, round_: Round) -> None:
        """Decide what waited, the one that it was for first."""
        if round_.timer is not None:
            round_.timer.cancel()
        assert isinstance(round_.item.message, Want)
        if self._rounds.pop(round_.item.message.resource, None) is not round_:
            return
        round_.item.last_try = True
        self._queue.extendleft(reversed((round_.item, *round_.later)))
        self._filled.set()

    def _refuse(self, batch: list[Item]) -> None:
        """The store is away: Wants are answered so, the rest must be said again to it, in order."""
        kept = []
        for item in batch:
            if isinstance(item.message, Want):
                self._link.send_to(item.incarnation, Grant(item.message.resource, 0, unavailable=True), session=item.session)
            elif isinstance(item.message, Released):
                if not item.message.done.done():
                    item.message.done.set_exception(StoreUnavailable("leases could not be given back"))
            else:
                kept.append(item)
        self._queue.extendleft(reversed(kept))
        if self._queue:
            self._filled.set()

    def _give_up(self, batch: list[Item]) -> None:
        self._refuse([item for item in batch if isinstance(item.message, Want | Released)])
        for incarnation in {item.incarnation for item in batch if isinstance(item.message, Back | Standing)}:
            with contextlib.suppress(KeyError):
                self._link.drop(incarnation)
