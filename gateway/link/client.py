"""The edge's end of the link: joins control, asks it about keys, receives what it pushes, reports figures.

It joins again for ever, so that control may die and come back. Questions cost a callback each, no task and no future;
one that is not answered in time, or cannot be, is answered "unavailable", never "no such key".
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Callable
from typing import cast

from gateway.domain.catalog import Catalog
from gateway.domain.keys import KeyRecord
from gateway.domain.metrics import Samples
from gateway.link.messages import (
    VERSION,
    CatalogChanged,
    Committed,
    Content,
    FindKey,
    FleetFigures,
    Frames,
    Funded,
    Grant,
    Hello,
    KeyChanged,
    KeyFound,
    LinkError,
    Observation,
    Recall,
    Report,
    Telling,
    Unwelcome,
    Welcome,
    decode_from_control,
    frame,
)
from gateway.routing.figures import Merged, Observed

ANSWER_S = 5.0  # how long control may take over a question
WELCOME_S = 5.0
REPORT_S = 1.0
RETRY_S_MIN = 0.02
RETRY_S_MAX = 0.5
WAITING_MAX = 10_000  # callers waiting for answers; more are answered "unavailable" at once
BUFFER_BYTES_MAX = 4 * 1024 * 1024  # unread by control; reports are left out above this, being cumulative
CONTENT_BYTES_MAX = 16 * 1024 * 1024  # waiting for everything else to have left; what comes above it is dropped
STOP_S = 1.0  # for the last report to leave

KeyCallback = Callable[[KeyFound], None]


class LinkClient:
    """One edge's link. Callbacks run on the loop, never within a call of `find_key`.

    `on_welcome(catalog, control incarnation)` comes with each joining: pushes may have been missed before it, so what
    was known of keys is to be forgotten; a `send` within it is the first that control hears. `on_lost()` comes once for
    each welcome. `observed()` is asked each second while control can be told, and may have no news; `on_figures` takes control's answer.
    """

    def __init__(
        self,
        *,
        address: str,
        slot: int,
        incarnation: str,
        pid: int,
        samples: Callable[[], Samples],
        on_welcome: Callable[[Catalog, str], None],
        on_key_changed: Callable[[str, KeyRecord | None], None],
        on_catalog: Callable[[Catalog], None],
        on_lost: Callable[[], None],
        on_refused: Callable[[str], None] = lambda reason: None,
        on_grant: Callable[[Grant], None] = lambda grant: None,
        on_recall: Callable[[str], None] = lambda resource: None,
        on_funded: Callable[[str], None] = lambda resource: None,
        on_committed: Callable[[Committed], None] = lambda committed: None,
        observed: Callable[[], Observed | None] = lambda: None,
        on_figures: Callable[[Merged], None] = lambda merged: None,
        answer_s: float = ANSWER_S,
    ) -> None:
        self.joined = False
        self.takes_changes = False  # whether `samples` may leave out what stands since it was last asked for, after the first time
        self.content_dropped = 0  # messages
        self.on_welcome = on_welcome
        self.on_key_changed = on_key_changed
        self.on_catalog = on_catalog
        self.on_lost = on_lost
        self.on_refused = on_refused
        self.on_grant = on_grant
        self.on_recall = on_recall
        self.on_funded = on_funded
        self.on_committed = on_committed
        self.on_figures = on_figures
        self._address = address
        self._hello = frame(Hello(version=VERSION, slot=slot, incarnation=incarnation, pid=pid, takes_figures=True))
        self._samples = samples
        self._observed = observed
        self._takes_observations = self._takes_content = False
        self._questions = _Questions(answer_s)
        self._connection: _ControlConnection | None = None
        self._staying: asyncio.Task[None] | None = None
        self._report_timer: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Begin to join. Returns at once; `on_welcome` tells of success."""
        self._staying = asyncio.create_task(self._stay_joined(), name="link")

    async def stop(self) -> None:
        """Report a last time and leave."""
        self.report_now()
        if self._staying is not None:
            self._staying.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._staying
        if self._connection is not None:
            self._connection.leave()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._connection.ended.wait(), STOP_S)
            self._connection.close()
        self._questions.fail_all()

    def find_key(self, digest: str, callback: KeyCallback) -> None:
        """Ask control who a digest is; `callback` gets the answer. Callers of one digest at once share a question."""
        question = self._questions.add(digest, callback) if self.joined else None
        if self.joined and question is not None:
            assert self._connection is not None
            self._connection.write(frame(FindKey(id=question, digest=digest)))
        elif not self.joined:
            self._questions.refuse(callback)

    def send(self, message: Telling) -> None:
        """Tell control, in the order of these calls. Without a link nothing is sent: `on_welcome` is where to begin anew."""
        if not self.joined or self._connection is None:
            return
        if self._connection.unread_bytes() > BUFFER_BYTES_MAX:
            self._connection.close()  # control does not read; it will hear how things stand when it is joined again
            return
        self._connection.write(frame(message))

    def send_content(self, content: Content) -> None:
        """Tell control what an exchange said, behind all that is to be told soon. Without a link or room it is dropped and counted."""
        connection, size = self._connection, len(content.request) + len(content.answer)
        if self.joined and connection is not None and self._takes_content and connection.waiting_bytes + size <= CONTENT_BYTES_MAX:
            connection.write_later(frame(content))
        else:
            self.content_dropped += 1

    def report_now(self) -> None:
        """Send all figures now rather than within the second."""
        if self.joined and self._connection is not None and self._connection.unread_bytes() < BUFFER_BYTES_MAX:
            self._connection.write(frame(Report(samples=self._samples())))
            if self._takes_observations and (observed := self._observed()) is not None:
                self._connection.write(frame(Observation(observed)))

    async def _stay_joined(self) -> None:
        retry_s = RETRY_S_MIN
        while True:
            connection = _ControlConnection(self)
            try:
                await asyncio.get_running_loop().create_unix_connection(lambda: connection, self._address)  # noqa: B023 - called at once
            except OSError:
                pass  # control is not there yet, or not any more
            else:
                self._connection = connection
                connection.write(self._hello)
                if await connection.was_welcomed():
                    retry_s = RETRY_S_MIN
                    await connection.ended.wait()
            # Jitter, so that the edges of a node do not come back in step.
            await asyncio.sleep(retry_s * random.uniform(0.5, 1.0))  # noqa: S311
            retry_s = min(2 * retry_s, RETRY_S_MAX)

    def received(self, connection: _ControlConnection, payload: bytes) -> None:
        """One message of control. Raises LinkError."""
        message = decode_from_control(payload)
        if isinstance(message, KeyFound):
            self._questions.answer(message)
        elif isinstance(message, Grant):
            self.on_grant(message)
        elif isinstance(message, Recall):
            self.on_recall(message.resource)
        elif isinstance(message, Funded):
            self.on_funded(message.resource)
        elif isinstance(message, Committed):
            self.on_committed(message)
        elif isinstance(message, FleetFigures):
            self.on_figures(message.merged)
        elif isinstance(message, KeyChanged):
            self.on_key_changed(message.digest, message.key)
        elif isinstance(message, CatalogChanged):
            self.on_catalog(message.catalog)
        elif isinstance(message, Unwelcome):
            self.on_refused(message.reason)
            connection.close()
        elif isinstance(message, Welcome):
            if message.version != VERSION or connection.welcome.is_set():
                raise LinkError("an unexpected welcome")
            self.joined = True
            self._takes_observations, self._takes_content = message.takes_observations, message.takes_content
            self.takes_changes = message.takes_changes
            connection.welcome.set()
            self.on_welcome(message.catalog, message.control)
            self._report_each_second()

    def lost(self, connection: _ControlConnection) -> None:
        self.content_dropped += connection.waiting
        if connection.welcome.is_set():
            self.joined = False
            if self._report_timer is not None:
                self._report_timer.cancel()
            self._questions.fail_all()
            self.on_lost()

    def _report_each_second(self) -> None:
        self.report_now()
        self._report_timer = asyncio.get_running_loop().call_later(REPORT_S, self._report_each_second)


class _Question:
    """One digest being asked about, and who waits for it."""

    __slots__ = ("callbacks", "deadline_s", "digest")

    def __init__(self, digest: str, callback: KeyCallback, deadline_s: float) -> None:
        self.digest = digest
        self.callbacks = [callback]
        self.deadline_s = deadline_s


class _Questions:
    """Questions in flight. All have the same time limit, so the oldest is the first due and one timer serves all."""

    def __init__(self, answer_s: float) -> None:
        self._answer_s = answer_s
        self._by_id: dict[int, _Question] = {}  # oldest first
        self._by_digest: dict[str, _Question] = {}
        self._waiting = 0
        self._last_id = 0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, digest: str, callback: KeyCallback) -> int | None:
        """The id to ask with; None when the digest is being asked about already, or nobody more may wait."""
        if self._waiting >= WAITING_MAX:
            self.refuse(callback)
            return None
        self._waiting += 1
        if (question := self._by_digest.get(digest)) is not None:
            question.callbacks.append(callback)
            return None
        loop = asyncio.get_running_loop()
        question = _Question(digest, callback, loop.time() + self._answer_s)
        self._last_id += 1
        self._by_id[self._last_id] = self._by_digest[digest] = question
        if self._timer is None:
            self._timer = loop.call_at(question.deadline_s, self._expire)
        return self._last_id

    def answer(self, found: KeyFound) -> None:
        """Hand an answer to all who wait for it; one that comes too late finds nobody."""
        question = self._by_id.pop(found.id, None)
        if question is None:
            return
        del self._by_digest[question.digest]
        self._waiting -= len(question.callbacks)
        for callback in question.callbacks:
            callback(found)

    def refuse(self, callback: KeyCallback) -> None:
        asyncio.get_running_loop().call_soon(callback, KeyFound(id=0, key=None, unavailable=True))

    def fail_all(self) -> None:
        for question_id in list(self._by_id):
            self.answer(KeyFound(id=question_id, key=None, unavailable=True))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        while self._by_id:
            question_id, question = next(iter(self._by_id.items()))
            if question.deadline_s > loop.time():
                self._timer = loop.call_at(question.deadline_s, self._expire)
                return
            self.answer(KeyFound(id=question_id, key=None, unavailable=True))


class _ControlConnection(asyncio.Protocol):
    """One connection to control."""

    def __init__(self, client: LinkClient) -> None:
        self.welcome = asyncio.Event()
        self.ended = asyncio.Event()
        self._client = client
        self._frames = Frames()
        self._transport: asyncio.Transport | None = None
        self._later: deque[bytes] = deque()  # for when what was written has left
        self.waiting_bytes = 0  # of these
        self._is_full = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._frames.feed(data):
                if self._transport is None or self._transport.is_closing():
                    return
                self._client.received(self, payload)
        except LinkError as error:
            self._client.on_refused(str(error)[:200])
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.ended.set()
        self._client.lost(self)

    async def was_welcomed(self) -> bool:
        """Wait until control has answered the hello or hung up; in its silence, hang up."""
        timer = asyncio.get_running_loop().call_later(WELCOME_S, self.close)
        waits = [asyncio.ensure_future(event.wait()) for event in (self.welcome, self.ended)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
            for wait in waits:
                wait.cancel()
        return self.welcome.is_set()

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    @property
    def waiting(self) -> int:
        """Messages that wait."""
        return len(self._later)

    def write_later(self, data: bytes) -> None:
        """After what was written before it, so that what is urgent waits for one such message at most."""
        self._later.append(data)
        self.waiting_bytes += len(data)
        if not self._is_full:
            self._write_next()

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        while self._later and not self._is_full:
            self._write_next()

    def _write_next(self) -> None:
        data = self._later.popleft()
        self.waiting_bytes -= len(data)
        self.write(data)

    def unread_bytes(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def leave(self) -> None:
        """Close once everything written has left, and what waits."""
        while self._later:
            self._write_next()
        if self._transport is not None:
            self._transport.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
