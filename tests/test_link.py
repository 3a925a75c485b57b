"""The link between an edge and control, on real unix sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import stat
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

from gateway.domain.catalog import Catalog, Provider
from gateway.domain.errors import StoreUnavailable
from gateway.domain.keys import KeyRecord
from gateway.domain.metrics import Samples
from gateway.link import client as client_module
from gateway.link import server as server_module
from gateway.link.client import LinkClient
from gateway.link.messages import (
    VERSION,
    Back,
    Committed,
    FindKey,
    Frames,
    Funded,
    Grant,
    Hello,
    Journaled,
    KeyChanged,
    KeyFound,
    Recall,
    Report,
    Standing,
    Unwelcome,
    Want,
    Welcome,
    decode_from_control,
    frame,
)
from gateway.link.server import LinkServer
from gateway.log import Log


def record(name: str, *, disabled: bool = False) -> KeyRecord:
    return KeyRecord(digest=name, account_id="user_1", name=name, label="sk-or-v1-abc...123", disabled=disabled)


class Store:
    """Keys, and how often they were looked up; `gate` holds lookups back while it is closed."""

    def __init__(self) -> None:
        self.keys = {"known": record("known")}
        self.lookups: list[set[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.looking = asyncio.Event()
        self.failure: Exception | None = None

    async def find_keys(self, digests: Iterable[str]) -> dict[str, KeyRecord]:
        wanted = set(digests)
        self.lookups.append(wanted)
        found = {digest: key for digest, key in self.keys.items() if digest in wanted}
        self.looking.set()
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return found


class Control:
    """A control that can be stopped and started again at one address."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "link.sock")
        self.store = Store()
        self.joined: asyncio.Queue[str] = asyncio.Queue()
        self.left: asyncio.Queue[str] = asyncio.Queue()
        self.reports: asyncio.Queue[tuple[str, Samples]] = asyncio.Queue()
        self.told: asyncio.Queue[tuple[str, object]] = asyncio.Queue()
        self.catalog = Catalog(revision="1", providers={}, models={})
        self.starts = 0

    async def start(self) -> None:
        self.starts += 1
        self.server = LinkServer(
            address=self.address,
            incarnation=f"control-{self.starts}",
            catalog=self.catalog,
            find_keys=self.store.find_keys,
            on_joined=self.joined.put_nowait,
            on_left=self.left.put_nowait,
            on_report=lambda incarnation, samples: self.reports.put_nowait((incarnation, samples)),
            on_want=lambda incarnation, want: self.told.put_nowait((incarnation, want)),
            on_back=lambda incarnation, back: self.told.put_nowait((incarnation, back)),
            on_standing=lambda incarnation, standing: self.told.put_nowait((incarnation, standing)),
            on_journaled=lambda incarnation: self.told.put_nowait((incarnation, "journaled")),
            log=Log("test", fd=-1),
        )
        await self.server.start()


class Edge:
    """A link client and what it heard."""

    def __init__(self, control: Control, incarnation: str = "edge-a", answer_s: float = 5.0) -> None:
        self.heard: asyncio.Queue[object] = asyncio.Queue()
        self.requests = 0.0
        self.link = LinkClient(
            address=control.address,
            slot=0,
            incarnation=incarnation,
            pid=1,
            samples=lambda: Samples(numbers={"gateway_requests_total": {("chat", "200"): self.requests}}),
            on_welcome=lambda catalog, control: self.heard.put_nowait(("welcome", catalog.revision, control)),
            on_key_changed=lambda digest, key: self.heard.put_nowait((digest, key)),
            on_catalog=lambda catalog: self.heard.put_nowait(("catalog", catalog.revision)),
            on_lost=lambda: self.heard.put_nowait("lost"),
            on_refused=lambda reason: self.heard.put_nowait(("refused", reason)),
            on_grant=self.heard.put_nowait,
            on_recall=lambda resource: self.heard.put_nowait(("recall", resource)),
            on_funded=lambda resource: self.heard.put_nowait(("funded", resource)),
            on_committed=self.heard.put_nowait,
            answer_s=answer_s,
        )

    async def next(self) -> object:
        async with asyncio.timeout(5):
            return await self.heard.get()

    def ask(self, digest: str) -> asyncio.Future[KeyFound]:
        found: asyncio.Future[KeyFound] = asyncio.get_running_loop().create_future()
        self.link.find_key(digest, found.set_result)
        return found


@pytest.fixture
async def control(tmp_path: Path) -> AsyncIterator[Control]:
    control = Control(tmp_path)
    await control.start()
    yield control
    await control.server.stop()


@pytest.fixture
async def edge(control: Control) -> AsyncIterator[Edge]:
    edge = Edge(control)
    await edge.link.start()
    assert await edge.next() == ("welcome", "1", "control-1")
    yield edge
    await edge.link.stop()


@contextlib.asynccontextmanager
async def raw(control: Control) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A peer that speaks bytes."""
    reader, writer = await asyncio.open_unix_connection(control.address)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


HELLO = Hello(version=VERSION, slot=1, incarnation="edge-raw", pid=1)


async def test_the_socket_is_for_the_owner_alone(control: Control) -> None:
    assert stat.S_IMODE(Path(control.address).stat().st_mode) == 0o600


async def test_keys_are_found_or_known_not_to_be(control: Control, edge: Edge) -> None:
    assert (await edge.ask("known")).key == record("known")
    unknown = await edge.ask("unknown")
    assert (unknown.key, unknown.unavailable) == (None, False)


async def test_a_failing_store_is_unavailable_never_unknown(control: Control, edge: Edge) -> None:
    for failure in (StoreUnavailable("down"), RuntimeError("a bug")):
        control.store.failure = failure
        answer = await edge.ask("known")
        assert (answer.key, answer.unavailable) == (None, True)
    control.store.failure = None
    assert (await edge.ask("known")).key == record("known")


async def test_callers_of_one_digest_share_one_question(control: Control, edge: Edge) -> None:
    control.store.gate.clear()
    first = [edge.ask("known") for _ in range(5)]
    await control.store.looking.wait()
    later = [edge.ask("known"), edge.ask("unknown")]
    control.store.gate.set()
    answers = await asyncio.gather(*first, *later)
    assert [answer.key for answer in answers] == [record("known")] * 6 + [None]
    assert control.store.lookups == [{"known"}, {"unknown"}]


async def test_questions_that_come_together_are_one_lookup(control: Control, edge: Edge) -> None:
    control.store.gate.clear()
    first = edge.ask("known")
    await control.store.looking.wait()
    rest = [edge.ask(f"unknown-{number}") for number in range(400)]
    await _arrived(control, 400)
    control.store.gate.set()
    await asyncio.gather(first, *rest)
    assert [len(lookup) for lookup in control.store.lookups] == [1, 400]


async def _arrived(control: Control, questions: int) -> None:
    async with asyncio.timeout(5):
        while len(control.server._questions) < questions:
            await asyncio.sleep(0)


async def test_an_answer_is_never_older_than_a_push(control: Control, edge: Edge) -> None:
    control.store.gate.clear()
    asked = edge.ask("known")
    await control.store.looking.wait()  # it has read the old record and is held back with it
    control.store.keys["known"] = record("known", disabled=True)
    control.server.push_key("known", control.store.keys["known"])
    control.store.gate.set()
    answer = await asked
    assert answer.key is not None and answer.key.disabled
    control.store.looking.clear()
    control.store.gate.clear()
    asked = edge.ask("known")
    await control.store.looking.wait()
    del control.store.keys["known"]
    control.server.push_key("known", None)
    control.store.gate.set()
    assert (await asked).key is None


async def test_changes_reach_every_edge(control: Control, edge: Edge) -> None:
    other = Edge(control, "edge-b")
    await other.link.start()
    await other.next()
    assert control.server.edges == 2
    control.server.push_key("known", None)
    control.server.push_catalog(Catalog(revision="2", providers={}, models={}))
    for one in (edge, other):
        assert await one.next() == ("known", None)
        assert await one.next() == ("catalog", "2")
    await other.link.stop()


async def test_reports_come_each_second_and_a_last_time(control: Control, edge: Edge) -> None:
    async with asyncio.timeout(5):
        incarnation, samples = await control.reports.get()  # at once
        assert (incarnation, samples.numbers["gateway_requests_total"]) == ("edge-a", {("chat", "200"): 0})
        edge.requests = 3
        _, samples = await control.reports.get()  # within the second
        assert samples.numbers["gateway_requests_total"] == {("chat", "200"): 3}
        edge.requests = 4
        await edge.link.stop()
        _, samples = await control.reports.get()
        assert samples.numbers["gateway_requests_total"] == {("chat", "200"): 4}
        assert await control.left.get() == "edge-a"


async def test_a_restarted_control_is_joined_again(control: Control, edge: Edge) -> None:
    for number in range(2, 5):
        await control.server.stop()
        assert await edge.next() == "lost"
        assert not edge.link.joined
        answer = await edge.ask("known")
        assert answer.unavailable
        control.catalog = Catalog(revision=str(number), providers={}, models={})
        await control.start()
        assert await edge.next() == ("welcome", str(number), f"control-{number}")
        assert (await edge.ask("known")).key == record("known")


async def test_a_lost_link_answers_what_was_asked(control: Control, edge: Edge) -> None:
    control.store.gate.clear()
    asked = edge.ask("known")
    await control.store.looking.wait()
    await control.server.stop()
    assert (await asked).unavailable
    await control.start()


async def test_an_unanswered_question_ends_in_time_and_a_late_answer_is_dropped(control: Control) -> None:
    edge = Edge(control, answer_s=0.2)
    await edge.link.start()
    await edge.next()
    control.store.gate.clear()
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    first = edge.ask("known")
    second = edge.ask("unknown")
    assert (await first).unavailable and (await second).unavailable
    assert 0.2 <= loop.time() - started_s < 2
    control.store.gate.set()
    assert (await edge.ask("known")).key == record("known")
    assert edge.link._questions._waiting == 0
    await edge.link.stop()


async def test_waiting_callers_are_bounded(control: Control, edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "WAITING_MAX", 3)
    control.store.gate.clear()
    waiting = [edge.ask(name) for name in ("known", "known", "a")]
    refused = await edge.ask("b")
    assert refused.unavailable
    control.store.gate.set()
    assert not any(answer.unavailable for answer in await asyncio.gather(*waiting))
    assert not (await edge.ask("b")).unavailable


async def test_waiting_questions_are_bounded_in_control(control: Control, edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "QUESTIONS_MAX", 2)
    control.store.gate.clear()
    first = edge.ask("known")
    await control.store.looking.wait()
    others = [edge.ask(name) for name in "abcd"]
    await _arrived(control, 2)
    assert (await others[3]).unavailable
    control.store.gate.set()
    answers = await asyncio.gather(first, *others)
    assert [answer.unavailable for answer in answers] == [False, False, False, True, True]


async def test_another_version_is_refused_with_a_reason(control: Control) -> None:
    async with raw(control) as (reader, writer):
        writer.write(frame(Hello(version=VERSION + 1, slot=1, incarnation="edge-new", pid=1)))
        payload = next(iter(Frames().feed(await reader.read())))  # and control hangs up
        message = decode_from_control(payload)
    assert isinstance(message, Unwelcome) and f"version {VERSION}" in message.reason
    assert control.joined.empty()


async def test_an_edge_refused_tries_again(tmp_path: Path) -> None:
    connections = 0
    again = asyncio.Event()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read(100)
        writer.write(frame(Unwelcome(reason="too old")) if connections != 2 else b"\x00\x00\x00\x01\xc1")
        if connections == 3:
            again.set()
        writer.close()

    control = Control(tmp_path)
    async with await asyncio.start_unix_server(refuse, control.address):
        edge = Edge(control)
        await edge.link.start()
        assert await edge.next() == ("refused", "too old")
        async with asyncio.timeout(5):
            await again.wait()
        assert not edge.link.joined
        await edge.link.stop()


@pytest.mark.parametrize(
    "data",
    [
        frame(FindKey(id=1, digest="known")),  # before a hello
        frame(HELLO) * 2,
        frame(HELLO) + frame(KeyChanged(digest="known", key=None)),  # not an edge's to say
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x02{}",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
async def test_whoever_breaks_the_protocol_is_dropped(control: Control, edge: Edge, data: bytes) -> None:
    async with raw(control) as (reader, writer):
        writer.write(data)
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionResetError):
                await reader.read()
    assert (await edge.ask("known")).key == record("known")  # others notice nothing


async def test_a_silent_stranger_is_dropped(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HELLO_S", 0.05)
    async with raw(control) as (reader, _):
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""


async def test_an_edge_that_does_not_read_is_dropped_alone(control: Control, edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "BUFFER_BYTES_MAX", 1_000_000)
    providers = {f"p{n}": Provider(slug=f"p{n}", name="x" * 1000, base_url="http://127.0.0.1") for n in range(200)}
    stuck = socket.socket(socket.AF_UNIX)
    stuck.setblocking(False)
    await asyncio.get_running_loop().sock_connect(stuck, control.address)
    stuck.send(frame(HELLO))
    async with asyncio.timeout(5):
        while await control.joined.get() != "edge-raw":
            pass
        for number in range(20):
            control.server.push_catalog(Catalog(revision=str(number), providers=providers, models={}))
            assert await edge.next() == ("catalog", str(number))
        assert await control.left.get() == "edge-raw"
    assert control.server.edges == 1
    stuck.close()


async def test_an_edge_that_comes_back_early_replaces_its_old_connection(control: Control) -> None:
    async with raw(control) as (old_reader, old_writer), raw(control) as (new_reader, new_writer):
        old_writer.write(frame(HELLO))
        assert await control.joined.get() == "edge-raw"
        new_writer.write(frame(HELLO) + frame(Report(samples=Samples())))
        assert (await control.reports.get())[0] == "edge-raw"
        with contextlib.suppress(ConnectionResetError):
            await old_reader.read()
        payload = next(iter(Frames().feed(await new_reader.read(65536))))
        assert isinstance(decode_from_control(payload), Welcome)
        assert control.server.edges == 1
        assert control.left.empty() and control.joined.empty()  # one edge all along


async def test_a_control_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "WELCOME_S", 0.05)
    control = Control(tmp_path)
    ends: asyncio.Queue[None] = asyncio.Queue()

    async def be_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionResetError):
            await reader.read()
        ends.put_nowait(None)
        writer.close()

    async with await asyncio.start_unix_server(be_silent, control.address):
        edge = Edge(control)
        await edge.link.start()
        async with asyncio.timeout(5):
            for _ in range(3):
                await ends.get()
        await edge.link.stop()
    assert edge.heard.empty()


async def test_what_an_edge_tells_arrives_in_its_order(control: Control, edge: Edge) -> None:
    told = [Standing({"r": 5}), *(message for number in range(200) for message in (Want("r", number, 0), Back("r", number)))]
    for message in told:
        edge.link.send(message)
    edge.link.send(Journaled())
    async with asyncio.timeout(5):
        assert [await control.told.get() for _ in told] == [("edge-a", message) for message in told]
        assert await control.told.get() == ("edge-a", "journaled")


async def test_a_word_within_the_welcome_is_the_first_that_control_hears(control: Control) -> None:
    edge = Edge(control)
    edge.link.send(Want("r", 1, 0))  # not joined: nobody hears it
    edge.link.on_welcome = lambda catalog, incarnation: edge.link.send(Standing({}))
    await edge.link.start()
    async with asyncio.timeout(5):
        assert await control.told.get() == ("edge-a", Standing({}))
    await edge.link.stop()


async def test_one_edge_is_spoken_to_alone_and_in_order(control: Control, edge: Edge) -> None:
    other = Edge(control, "edge-b")
    await other.link.start()
    await other.next()
    assert set(control.server.joined_edges) == {"edge-a", "edge-b"}
    grant, committed = Grant("r", 7, refused=True, free_nanos=-3), Committed("edge-0-edge-a.1", 12)
    for message in (grant, Recall("r"), committed):
        assert control.server.send_to("edge-a", message)
    control.server.push_funded("r")
    assert [await edge.next() for _ in range(4)] == [grant, ("recall", "r"), committed, ("funded", "r")]
    assert await other.next() == ("funded", "r")
    await other.link.stop()
    assert await control.left.get() == "edge-b"
    assert not control.server.send_to("edge-b", Funded("r"))


async def test_a_message_for_a_session_does_not_reach_the_next_one(control: Control, edge: Edge) -> None:
    session = control.server.session("edge-a")
    assert session is not None and control.server.session("edge-x") is None
    control.server.drop("edge-a")
    control.server.drop("edge-x")
    assert await edge.next() == "lost"
    assert await edge.next() == ("welcome", "1", "control-1")
    assert control.server.session("edge-a") not in (None, session)
    assert not control.server.send_to("edge-a", Grant("r", 7), session=session)
    assert control.server.send_to("edge-a", Grant("r", 8), session=control.server.session("edge-a"))
    assert await edge.next() == Grant("r", 8)


async def test_an_edge_gives_a_control_up_that_does_not_read(control: Control, edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BUFFER_BYTES_MAX", 100_000)
    for transport in [connection._transport for connection in control.server._connections]:
        assert transport is not None
        transport.pause_reading()
    wide = Want("r" * 50_000, 1, 0)
    for _ in range(20):
        edge.link.send(wide)
    assert await edge.next() == "lost"
    assert await edge.next() == ("welcome", "1", "control-1")
