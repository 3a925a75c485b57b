"""What running streams have cost so far, on disk each second.

A killed edge cannot settle. Its finished exchanges are in its journal; of the streams that died with it control finds here
what each would have been charged, had its caller left at the last mark. The file is replaced whole and never synced: it is
for the death of processes, not of the machine. A stream that finished since is in the journal, and the journal wins.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.edge.settlement import Settlement
from gateway.log import Log, exception_fields
from gateway.wire.records import running_name

if TYPE_CHECKING:
    from gateway.edge.exchange import InferenceExchange

SLICE = 200  # streams marked in one turn of the loop: ten thousand at once would make callers wait


class Running:
    """`sweep()` once a second. `streams` tells the exchanges that stream now; `look_after` may end one."""

    def __init__(
        self,
        folder: Path,
        *,
        slot: int,
        incarnation: str,
        settlement: Settlement,
        look_after: Callable[[InferenceExchange], None],
        streams: Callable[[], Iterable[InferenceExchange]],
        log: Log,
    ) -> None:
        self._path = folder / running_name(slot, incarnation)
        self._settlement = settlement
        self._look_after = look_after
        self._streams = streams
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._marking = False
        self._written = False  # whether there is a file
        self._failing = False

    def sweep(self) -> None:
        """Mark all streams that have sent something, and look after each."""
        if not self._marking:
            self._marking = True
            self._mark(iter([each for each in self._streams() if each.is_streaming]), [])

    def _mark(self, left: Iterator[InferenceExchange], marks: list[bytes]) -> None:
        for exchange in itertools.islice(left, SLICE):
            if exchange.is_streaming:  # still
                self._mark_one(exchange, marks)
        following = next(left, None)
        if following is not None:
            self._loop.call_soon(self._mark, itertools.chain((following,), left), marks)
            return
        self._marking = False
        self._write(marks)

    def _mark_one(self, exchange: InferenceExchange, marks: list[bytes]) -> None:
        try:
            marks.append(self._settlement.mark(exchange))
            self._look_after(exchange)
        except Exception as error:  # noqa: BLE001 - what is wrong with one must neither end the others' marks nor the sweep that asks for them
            self._log.error("stream_not_marked", generation=exchange.generation_id, **exception_fields(error))

    def _write(self, marks: list[bytes]) -> None:
        unnamed = self._path.with_name(f".{self._path.name}")
        try:
            if marks:
                fd = os.open(unnamed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                with os.fdopen(fd, "wb") as file:
                    file.writelines(marks)
                unnamed.rename(self._path)
                self._written = True
            elif self._written:
                self._path.unlink(missing_ok=True)
                self._written = False
        except OSError as error:
            if not self._failing:
                self._log.error("running_streams_not_marked", **exception_fields(error))
            self._failing = True
            with contextlib.suppress(OSError):
                unnamed.unlink(missing_ok=True)  # what it takes is what the journal may need
        else:
            self._failing = False

    def close(self) -> None:
        """All streams are settled."""
        self._write([])
