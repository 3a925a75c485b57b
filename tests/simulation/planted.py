"""Mistakes that the simulation is for, each planted into the product as it runs: it has to find every one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from gateway.control import bookkeeper, leases
from gateway.control.store import posting
from gateway.control.store.sqlite import SqliteStore, credits, generations
from gateway.control.store.sqlite import leases as sqlite_leases
from gateway.ledger import book

Mistake = Callable[[], contextlib.AbstractContextManager[Any]]
MISTAKES: dict[str, Mistake] = {}


def mistake(work: Callable[[], Iterator[None]]) -> Mistake:
    manager = contextlib.contextmanager(work)
    MISTAKES[work.__name__] = manager
    return manager


@mistake
def grants_of_a_lost_link_are_sent_on_the_next_one() -> Iterator[None]:
    decide = leases.LeaseDesk._on_want

    def careless(self: Any, page: Any, item: Any, *rest: Any) -> Any:
        item.session = self._link.session(item.incarnation)
        return decide(self, page, item, *rest)

    with mock.patch.object(leases.LeaseDesk, "_on_want", careless):
        yield


@mistake
def leases_of_dead_edges_stay() -> Iterator[None]:
    async def nothing(self: Any, incarnation: str) -> None:
        pass

    with mock.patch.object(sqlite_leases.SqliteLeaseBook, "delete", nothing):
        yield


@mistake
def a_grant_is_sent_and_not_written() -> Iterator[None]:
    write, turns = sqlite_leases.SqliteLeaseBook.write, iter(range(10**9))

    async def forgetful(self: Any, rows: Any) -> None:
        if next(turns) % 10:
            await write(self, rows)

    with mock.patch.object(sqlite_leases.SqliteLeaseBook, "write", forgetful):
        yield


@mistake
def what_others_have_is_granted_again() -> Iterator[None]:
    def generous(self: Any, resource: str, incarnation: str) -> int:
        row = self.row(resource, incarnation)
        return int(self.totals[resource]) - int(row.open_nanos)

    with mock.patch.object(leases.Page, "free", generous):
        yield


@mistake
def an_edge_s_word_of_where_it_stands_is_ignored() -> Iterator[None]:
    with mock.patch.object(leases.LeaseDesk, "_on_standing", lambda *_: None):
        yield


@mistake
def what_is_held_is_given_back() -> Iterator[None]:
    def careless(self: Any, resource: str, keep_nanos: int = 0) -> int:
        lease = self.lease(resource)
        if lease is None:
            return 0
        unused = max(0, lease.granted - lease.spent)
        lease.granted -= unused
        return int(unused)

    with mock.patch.object(book.Book, "give_back", careless):
        yield


@mistake
def journals_are_read_again_after_a_restart() -> Iterator[None]:
    async def none(self: Any) -> dict[str, int]:
        return {}

    with (
        mock.patch.object(SqliteStore, "journal_offsets", none),
        mock.patch.object(generations, "_require_offsets", lambda *_: None),
    ):
        yield


@mistake
def generations_that_exist_settle_again() -> Iterator[None]:
    """Also read again after a restart, and this time nothing looks whether they are there."""

    async def none(self: Any) -> dict[str, int]:
        return {}

    with (
        mock.patch.object(SqliteStore, "journal_offsets", none),
        mock.patch.object(generations, "_require_offsets", lambda *_: None),
        mock.patch.object(posting.Batch, "_is_known", lambda *_: False),
        mock.patch.object(generations, "_INSERT_GENERATION", generations._INSERT_GENERATION.replace("INSERT", "INSERT OR IGNORE")),
    ):
        yield


@mistake
def the_end_of_a_dead_edge_s_journal_is_not_read() -> Iterator[None]:
    read = bookkeeper.Bookkeeper._is_read

    def careless(self: Any, file: Any) -> bool:
        return file.abandoned or read(self, file)

    with mock.patch.object(bookkeeper.Bookkeeper, "_is_read", careless):
        yield


@mistake
def marks_of_finished_streams_are_posted() -> Iterator[None]:
    def careless(db: Any, piece: Any) -> Any:
        return generations._in_transaction(db, (), lambda: generations._apply_carefully(db, (piece,)))

    with mock.patch.object(generations, "apply_running", careless):
        yield


@mistake
def what_edges_are_spending_expires() -> Iterator[None]:
    with mock.patch.object(credits, "_OLD", credits._OLD.replace("l.granted_nanos - l.settled_nanos", "0")):
        yield
