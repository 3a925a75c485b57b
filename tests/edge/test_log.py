"""OPS-06: logging trouble is not request trouble. Lines are dropped and counted; requests, memory and the loop do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from bench.provider import Provider
from gateway.log import LINE_BYTES_MAX, PENDING_BYTES_MAX, Log
from tests.conftest import MODEL, RunningGateway, eventually, fetch, render_catalog

ROUTE = "/api/v1/chat/completions"
REFUSED_AT_ONCE = f"GET {ROUTE} HTTP/1.1\r\nHost: gw\r\n\r\n".encode()  # the cheapest request that is logged
REFUSED_LINE_BYTES = 140
MIB = 1024 * 1024


class UnheardGateway(RunningGateway):
    """A gateway whose stderr goes where `redirection` says (of a shell, after `before`), or is not read while `hears` is not set."""

    def __init__(self, folder: Path, catalog: str, *, redirection: str = "", before: str = "true", namespace: bool = False) -> None:
        super().__init__(folder, catalog)
        self.hears = threading.Event()
        self.hears.set()
        shell = ["sh", "-c", f'{before} && exec "$@" {redirection}', "sh"]
        self._arguments = [*(["unshare", "-m"] if namespace else []), *shell, *self._arguments]

    @property
    def operations_url(self) -> str:
        listening = [link.laddr.port for link in psutil.Process(self.pid).net_connections("tcp") if link.status == psutil.CONN_LISTEN]
        (port,) = {port for port in listening if not self.url.endswith(f":{port}")}
        return f"http://127.0.0.1:{port}"

    def edge(self) -> psutil.Process:
        (pid,) = json.loads(fetch(f"{self.operations_url}/healthz")[1])["edges"]
        return psutil.Process(pid)

    def dropped(self, process: str = "edge") -> float:
        found = re.search(rf'^gateway_log_dropped_total{{process="{process}"}} (\S+)$', self.metrics(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def _read(self, stream: Iterable[str], take: Callable[[str], None]) -> None:
        super()._read((line for line in stream if self.hears.wait()), take)


@contextlib.asynccontextmanager
async def running(folder: Path, **options: Any) -> AsyncIterator[UnheardGateway]:
    async with Provider() as provider:
        gateway = UnheardGateway(folder / "g", render_catalog({"north": f"{provider.url}/v1"}), **options)
        try:
            await asyncio.to_thread(gateway.start)
            await asyncio.to_thread(gateway.create_account)
            yield gateway
        finally:
            gateway.hears.set()
            await asyncio.to_thread(gateway.close)


async def ask(gateway: RunningGateway) -> float:
    """Seconds that an ordinary request took."""
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    data = json.dumps({"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": "Hello"}]}).encode()
    began = time.monotonic()
    reader, writer = await asyncio.open_connection(host, int(port))
    key = f"Authorization: Bearer {gateway.key}"
    writer.write(f"POST {ROUTE} HTTP/1.1\r\nHost: gw\r\nConnection: close\r\n{key}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200 ")
    return time.monotonic() - began


async def log_much(gateway: RunningGateway, bytes_min: int) -> None:
    """Makes the edge log at least this much."""
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=MIB)
    number = bytes_min // REFUSED_LINE_BYTES + 1

    async def send() -> None:
        for _ in range(0, number, 500):
            writer.write(REFUSED_AT_ONCE * 500)
            await writer.drain()
        writer.write(REFUSED_AT_ONCE.removesuffix(b"\r\n") + b"Connection: close\r\n\r\n")

    sending = asyncio.ensure_future(send())
    received = 0
    while data := await reader.read(MIB):
        received += len(data)
    await sending
    writer.close()
    assert received > number * len(REFUSED_AT_ONCE)


async def test_ops_06_a_stopped_reader_costs_lines_not_requests(tmp_path: Path) -> None:
    async with asyncio.timeout(60.0), running(tmp_path) as gateway:
        edge = await asyncio.to_thread(gateway.edge)
        await ask(gateway)
        rss = edge.memory_info().rss
        gateway.hears.clear()
        await log_much(gateway, PENDING_BYTES_MAX + MIB)
        assert sorted([await ask(gateway) for _ in range(50)])[-3] < 0.3  # the machine itself may pause twice
        assert edge.memory_info().rss - rss < 4 * PENDING_BYTES_MAX
        await eventually(lambda: gateway.dropped() > 0)
        exchanges = exchanges_logged(gateway)
        gateway.hears.set()  # and with a reader again, lines come again
        async with asyncio.timeout(20.0):
            while exchanges_logged(gateway) == exchanges:
                await ask(gateway)


def exchanges_logged(gateway: RunningGateway) -> int:
    return sum(line["event"] == "exchange" for line in list(gateway.log))


async def succeeds_without_a_log(gateway: UnheardGateway) -> None:
    edge = await asyncio.to_thread(gateway.edge)
    await log_much(gateway, MIB // 4)
    rss = edge.memory_info().rss
    await log_much(gateway, MIB)
    assert sorted([await ask(gateway) for _ in range(50)])[-3] < 0.3  # the machine itself may pause twice
    assert edge.memory_info().rss - rss < 8 * MIB
    await eventually(lambda: gateway.dropped() > MIB / REFUSED_LINE_BYTES / 2)


async def test_ops_06_a_full_device_costs_lines_not_requests(tmp_path: Path) -> None:
    async with asyncio.timeout(60.0), running(tmp_path, redirection="2>/dev/full") as gateway:
        await succeeds_without_a_log(gateway)


@pytest.mark.system("root", "namespace")
async def test_ops_06_a_full_tmpfs_costs_lines_not_requests(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    mount = f"mount -t tmpfs -o size=64k tmpfs {folder}"
    async with asyncio.timeout(60.0), running(tmp_path, redirection=f"2>{folder}/log", before=mount, namespace=True) as gateway:
        await succeeds_without_a_log(gateway)


# The log by itself.


def lines_of(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def test_ops_06_no_line_is_lost_between_the_writer_and_its_thread(tmp_path: Path) -> None:
    file = tmp_path / "log"
    with file.open("wb") as stream:
        log = Log("test", stream.fileno())
        log.start()
        for number in range(30_000):  # of about 110 bytes: no limit is reached, however late the thread is
            log.info("counted", number=number)
        log.stop(10.0)
    assert [line["number"] for line in lines_of(file.read_bytes())] == list(range(30_000)) and log.dropped == 0


@pytest.mark.parametrize("text", ["a\nb\r\n", "\x00\x1b[2J\x7f", "\u2028\u2029\x85", "\ud800 lone", '"}\\', "x" * 2000])
def test_inp_08_any_text_is_one_line_and_escaped(tmp_path: Path, text: str) -> None:
    file = tmp_path / "log"
    with file.open("wb") as stream:
        Log("test", stream.fileno()).info("told", text=text, odd={1: Path("/x")})
    data = file.read_bytes()
    assert data.count(b"\n") == 1 and data.endswith(b"\n") and not set(data[:-1]) & set(range(32))
    (line,) = lines_of(data)
    assert line["text"] == text and line["event"] == "told"


def test_ops_06_a_line_too_long_is_dropped_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "log"
    with file.open("wb") as stream:
        log = Log("test", stream.fileno())
        log.info("told", text="x" * LINE_BYTES_MAX)
        log.info("told", text="y")
    assert log.dropped == 1 and [line["text"] for line in lines_of(file.read_bytes())] == ["y"]


class Disk:
    """Takes so many bytes, and then no more."""

    def __init__(self, bytes_max: int) -> None:
        self.data = b""
        self.bytes_max = bytes_max

    def write(self, fd: int, data: bytes) -> int:
        taken = data[: self.bytes_max - len(self.data)]
        if not taken:
            raise OSError(errno.ENOSPC, "full")
        self.data += taken
        return len(taken)


def test_ops_06_a_line_cut_by_a_full_disk_does_not_spoil_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(2500)
    monkeypatch.setattr("gateway.log.os.write", disk.write)
    log = Log("test")
    for _ in range(5):
        log.info("told", text="x" * 1000)
    assert log.dropped == 3
    disk.bytes_max = 10_000
    log.info("told", text="last")
    first, second, cut, last = disk.data.splitlines()
    assert json.loads(first) and json.loads(second) and json.loads(last)["text"] == "last"
    with pytest.raises(ValueError):
        json.loads(cut)


def test_ops_06_lines_of_several_processes_do_not_run_into_each_other() -> None:
    """Two writers, one pipe, and a reader who lets it fill: more at once than a pipe takes in one piece."""
    reader, writer = os.pipe()
    logs = [Log("test", writer) for _ in range(2)]
    for log in logs:
        log.start()
        for number in range(5000):
            log.info("counted", number=number, text="x" * (number % 300))
    received = b""
    with open(reader, "rb", buffering=0) as stream:
        while received.count(b"\n") < 10_000:
            received += stream.read(10_000)
    for log in logs:
        log.stop(5.0)
    os.close(writer)
    assert sorted(line["number"] for line in lines_of(received)) == sorted(list(range(5000)) * 2)
