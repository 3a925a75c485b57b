"""Journal files into the ledger: each record once, whatever dies in between.

One batch is one transaction: generations, entries, balances, leases, roll-ups and the files' new offsets. What the
store does not take stays in its file and is read again. The leases of a dead edge are given back once all it wrote is
posted, never by the clock; only then do its last files go.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from pathlib import Path

import msgspec

from gateway.control.journals import JournalFile, Journals
from gateway.control.store import JournalSlice, RefusalReason, Refused, Store
from gateway.control.store.posting import time_of
from gateway.domain.errors import StoreUnavailable
from gateway.link.messages import Committed
from gateway.log import Log, exception_fields

BATCH_RECORDS = 2000  # takes 20 ms; whoever asks for a lease meanwhile waits that long
BATCH_BYTES = 2 * 1024 * 1024
SHARE_BYTES_MIN = 64 * 1024  # of one file in a batch
COUNT_BYTES = 8 * 1024 * 1024  # looked at per pass and file, to say how many records wait
POLL_S = 1.0  # how often to look without having been told
PACE_S = 0.1  # from one look at the files to the next
BUSY_PACE_S = (
    0.25  # when the last look found many records: a look and its commit cost as much as 100 of them do, so it had better find more
)
BUSY_RECORDS = 20
RETRY_S_MIN = 0.05
RETRY_S_MAX = 0.5
DRAIN_S = 5.0
REFUSED_LOGGED_MAX = 10  # lines per batch


class _Reading(msgspec.Struct):
    """What one pass found in the files."""

    slices: list[JournalSlice] = []
    torn: list[tuple[JournalFile, int, bool]] = []  # (file, bytes, whether it was unreadable rather than cut short)
    waiting: set[str] = set()  # edges in the middle of a write: nothing more to read of them now
    counts: dict[str, tuple[int, int]] = {}  # file -> (counted up to this byte, whole records from the offset to there)


class Bookkeeper:
    """`run()` until cancelled, or `read_all()` where nothing else runs.

    `release(incarnation)` gives back all leases of a dead edge. `on_committed(incarnation, Committed)` is for a joined
    edge's journal. `on_commit(seconds)` and `on_refused(reason)` feed metrics.
    """

    def __init__(
        self,
        *,
        store: Store,
        folder: Path,
        release: Callable[[str], Awaitable[None]],
        log: Log,
        is_joined: Callable[[str], bool] = lambda incarnation: False,
        on_committed: Callable[[str, Committed], object] = lambda incarnation, committed: None,
        on_commit: Callable[[float], None] = lambda seconds: None,
        on_refused: Callable[[RefusalReason], None] = lambda reason: None,
    ) -> None:
        self.revenue_nanos = 0  # charged ever, as far as committed
        self._store = store
        self._journals = Journals(folder, is_joined=is_joined)
        self._release = release
        self._log = log
        self._is_joined = is_joined
        self._on_committed = on_committed
        self._on_commit = on_commit
        self._on_refused = on_refused
        self._files: list[JournalFile] = []
        self._offsets: dict[str, int] | None = None  # None: to be read from the store
        self._counts: dict[str, tuple[int, int]] = {}
        self._cut: set[str] = set()  # files whose end holds no records
        self._started = False
        self._reaped: set[str] = set()
        self._owed: set[str] = set()  # edges that wait for Committed
        self._oldest_ms: int | None = None  # of the batch under way
        self._turn = 0
        self._found = 0  # records, in the last look
        self._wake = asyncio.Event()
        self._passes = 0  # begun
        self._ended = asyncio.Event()  # of the pass under way; replaced by the next one's
        self._failing = False

    def __repr__(self) -> str:
        return f"<Bookkeeper files {len(self._files)} pending {self.pending_records} records>"

    @property
    def pending_records(self) -> int:
        """Whole records that wait in files, as of the last look."""
        return sum(count for _, count in self._counts.values())

    @property
    def oldest_s(self) -> float:
        """Age of the oldest record that waits; 0 when none does."""
        return max(0.0, time.time() - self._oldest_ms / 1000) if self._oldest_ms is not None else 0.0

    def journaled(self, incarnation: str) -> None:
        """An edge says that records wait; it is answered with Committed."""
        self._owed.add(incarnation)
        self._wake.set()

    def reaped(self, incarnation: str) -> None:
        """An edge is dead for certain."""
        self._reaped.add(incarnation)
        self._wake.set()

    def wake(self) -> None:
        """Something about the files may have changed."""
        self._wake.set()

    async def load(self) -> None:
        """Learn how far everything was read; before the figures are shown. Raises StoreUnavailable."""
        self.revenue_nanos = await self._store.revenue()
        self._offsets = await self._store.journal_offsets()
        self._counts = {}

    async def run(self) -> None:
        """Read as told, and each second, until cancelled."""
        loop = asyncio.get_running_loop()
        retry_s = RETRY_S_MIN
        while True:
            began_s = loop.time()
            self._wake.clear()
            try:
                more = await self._pass()
            except Exception as error:  # noqa: BLE001 - the task's outermost edge: what waits in the files is tried again
                self._failed(error)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, RETRY_S_MAX)
                continue
            retry_s = RETRY_S_MIN
            if self._failing:
                self._failing = False
                self._log.info("bookkeeping_resumed")
            self._ended.set()
            self._ended = asyncio.Event()
            if not more:
                pace_s = BUSY_PACE_S if self._found >= BUSY_RECORDS else PACE_S
                await asyncio.sleep(max(0.0, began_s + pace_s - loop.time()))
                try:
                    async with asyncio.timeout(POLL_S):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    async def drained(self, timeout_s: float = DRAIN_S) -> bool:
        """Whether all that is in the files now gets into the store within this time. Needs `run()`."""
        try:
            async with asyncio.timeout(timeout_s):
                files = await asyncio.to_thread(self._journals.files)
                begun = self._passes
                while True:
                    self._wake.set()
                    await self._ended.wait()
                    if self._passes > begun and self._has_read(files):  # a pass that began before us has not seen them all
                        return True
        except (TimeoutError, OSError):
            return False

    async def read_all(self) -> bool:
        """Read until there is no more; whether that was everything. Raises StoreUnavailable, also for the journal's folder."""
        try:
            while await self._pass():
                pass
        except OSError as error:
            raise StoreUnavailable(f"the journal cannot be read: {error.strerror}") from error
        return self._has_read(self._files)

    def _failed(self, error: Exception) -> None:
        if not self._failing or not isinstance(error, (StoreUnavailable, OSError)):
            cause = error.__cause__ or error
            kind = getattr(cause, "sqlite_errorname", "")  # SQLITE_FULL, SQLITE_BUSY, SQLITE_IOERR_WRITE: what an operator can act on
            reason = str(error)[:200] + (f" ({kind})" if kind else "")
            self._log.error("bookkeeping_failed", reason=reason, **exception_fields(cause))
        self._failing = True

    def _has_read(self, files: Iterable[JournalFile]) -> bool:
        if self._offsets is None:
            return False
        there = {file.name for file in self._files}
        return all(self._is_read(file) for file in files if file.name in there)

    def _is_read(self, file: JournalFile) -> bool:
        assert self._offsets is not None
        return file.name in self._cut or self._offsets.get(file.name, 0) >= file.size

    async def _pass(self) -> bool:
        """One look at all files and one batch; whether there is more to read at once."""
        self._passes += 1
        if self._offsets is None:
            await self.load()
            assert self._offsets is not None
        owed, self._owed = self._owed, set()
        try:
            self._files, reading = await asyncio.to_thread(self._look, self._offsets)
            self._counts = reading.counts
            self._found = sum(len(piece.records) for piece in reading.slices)
            if reading.slices:
                await self._commit(reading.slices)
            self._tell(reading.slices, owed)
        except BaseException:
            self._owed |= owed
            raise
        for file, torn_bytes, unreadable in reading.torn:
            await self._cut_off(file, torn_bytes, unreadable)
        more = any(not self._is_read(file) and file.incarnation not in reading.waiting for file in self._files)
        await self._clear_away(self._files)
        return more

    def _look(self, offsets: dict[str, int]) -> tuple[list[JournalFile], _Reading]:
        """In a thread."""
        files = self._journals.files()
        return files, self._read(files, offsets)

    def _read(self, files: list[JournalFile], offsets: dict[str, int]) -> _Reading:
        """Of each edge the oldest file that is not read to its end, each in its turn."""
        reading = _Reading()
        heads: dict[str, JournalFile] = {}
        for file in files:
            if file.name not in self._cut and offsets.get(file.name, 0) < file.size:
                heads.setdefault(file.incarnation, file)
        order = list(heads.values())
        self._turn = (self._turn + 1) % max(1, len(order))
        bytes_left, records_left = BATCH_BYTES, BATCH_RECORDS
        for file in order[self._turn :] + order[: self._turn]:
            start = offsets.get(file.name, 0)
            end, found = start, 0
            if bytes_left > 0 and records_left > 0:
                run = self._journals.read(
                    file,
                    start,
                    bytes_max=min(bytes_left, max(SHARE_BYTES_MIN, BATCH_BYTES // len(order))),
                    records_max=min(records_left, max(1, BATCH_RECORDS // len(order))),
                )
                end, found = start + run.consumed, len(run.records) + len(run.corrupt)
                bytes_left -= run.consumed
                records_left -= found
                if run.consumed:
                    reading.slices.append(JournalSlice(file.name, file.incarnation, start, end, run.records, run.corrupt))
                elif file.closed:
                    reading.torn.append((file, file.size - start, run.unreadable))
                else:
                    reading.waiting.add(file.incarnation)
            reading.counts[file.name] = self._count(file, end, found)
        return reading

    def _count(self, file: JournalFile, end: int, found: int) -> tuple[int, int]:
        """Of a file, `found` records of which were read to byte `end`: counted to where, and how many. What was counted stays so."""
        counted_to, count = self._counts.get(file.name, (0, 0))
        if counted_to < end:
            counted_to, count = end, found
        more, counted_to = self._journals.count(file, counted_to, bytes_max=COUNT_BYTES)
        return counted_to, count + more

    async def _commit(self, slices: Sequence[JournalSlice]) -> None:
        assert self._offsets is not None
        offsets = self._offsets
        self._oldest_ms = _oldest_ms(slices)
        began_s = time.monotonic()
        try:
            applied = await self._store.apply_journal(slices)
        except BaseException:
            self._offsets = None  # whether it was committed is for the store to say
            raise
        self._on_commit(time.monotonic() - began_s)
        self._oldest_ms = None
        self.revenue_nanos += applied.charged_nanos
        for piece in slices:
            offsets[piece.file] = piece.end
            counted_to, count = self._counts.pop(piece.file)
            left = count - len(piece.records) - len(piece.corrupt)
            if counted_to > piece.end and left > 0:
                self._counts[piece.file] = (counted_to, left)
        if applied.exists:
            self._log.warning("generations_exist", count=applied.exists, files=[piece.file for piece in slices])
        self._report(applied.refused)

    def _report(self, refused: Sequence[Refused]) -> None:
        for number, one in enumerate(refused):
            self._on_refused(one.reason)
            if number < REFUSED_LOGGED_MAX:
                self._log.error("record_refused", reason=one.reason, file=one.file, generation=one.generation_id or None)

    def _tell(self, slices: Sequence[JournalSlice], owed: set[str]) -> None:
        """Each edge how far its newest read file is committed, also those that only asked."""
        assert self._offsets is not None
        told = {piece.incarnation: Committed(file=piece.file, offset=piece.end) for piece in slices}
        for file in self._files:
            if file.incarnation in owed and file.incarnation not in told and self._is_read(file):
                told[file.incarnation] = Committed(file=file.name, offset=min(file.size, self._offsets.get(file.name, 0)))
        for incarnation, committed in told.items():
            if self._is_joined(incarnation):
                self._on_committed(incarnation, committed)

    async def _cut_off(self, file: JournalFile, torn_bytes: int, unreadable: bool) -> None:
        """Give up on the end of a closed file, and keep it."""
        assert self._offsets is not None
        await asyncio.to_thread(self._journals.keep_torn, file, self._offsets.get(file.name, 0))
        self._cut.add(file.name)
        write = self._log.error if unreadable else self._log.warning
        write("journal_cut", file=file.name, bytes=torn_bytes, at=self._offsets.get(file.name, 0), unreadable=unreadable)
        if unreadable:
            self._on_refused("unreadable")

    async def _clear_away(self, files: Sequence[JournalFile]) -> None:
        """Release the leases of dead edges, and remove files that are read and will not grow."""
        by_edge: dict[str, list[JournalFile]] = {}
        for file in files:
            by_edge.setdefault(file.incarnation, []).append(file)
        gone: list[str] = []
        for incarnation, theirs in by_edge.items():
            if all(file.abandoned and self._is_read(file) for file in theirs):
                await self._charge_running(theirs[-1])
                await self._release(incarnation)
                self._reaped.discard(incarnation)
                gone += [file.name for file in theirs]
            elif not theirs[-1].abandoned:
                gone += [file.name for file in theirs if file.closed and self._is_read(file)]
        if gone:
            await self._remove(gone)
        if self._reaped or not self._started:
            await self._release_fileless(by_edge.keys())
        if not self._started:
            assert self._offsets is not None
            await self._forget(self._offsets.keys() - {file.name for file in files})
            self._started = True

    async def _charge_running(self, file: JournalFile) -> None:
        """The streams that died with this file's writer, by its last marks; those it finished are posted already."""
        marks = await asyncio.to_thread(self._journals.running, file)
        if marks:
            applied = await self._store.apply_running(file.incarnation, marks)
            self.revenue_nanos += applied.charged_nanos
            self._report(applied.refused)
            self._log.warning("running_streams_charged", incarnation=file.incarnation, count=applied.generations)
        await asyncio.to_thread(self._journals.forget_running, file)

    async def _release_fileless(self, with_files: Collection[str]) -> None:
        """Edges that died without a file; at our start also those whose end an earlier control did not see."""
        holders = await self._store.lease_holders()
        fileless = {name for name in holders.difference(with_files) if not self._is_joined(name)}
        for incarnation in fileless if not self._started else fileless & self._reaped:
            await self._release(incarnation)
        self._reaped = {name for name in self._reaped if name in with_files or self._is_joined(name)}

    async def _remove(self, names: Sequence[str]) -> None:
        await asyncio.to_thread(self._journals.remove, names)
        await self._forget(names)
        self._files = [file for file in self._files if file.name not in names]
        self._cut.difference_update(names)

    async def _forget(self, names: Iterable[str]) -> None:
        assert self._offsets is not None
        known = [name for name in names if name in self._offsets]
        if known:
            await self._store.forget_journals(known)
            for name in known:
                del self._offsets[name]


def _oldest_ms(slices: Iterable[JournalSlice]) -> int | None:
    """When the first exchange of a batch ended, as its edge says; they are written in about that order."""
    times = [time_of(piece.records[0]) for piece in slices if piece.records]
    return min([time for time in times if time is not None], default=None)
