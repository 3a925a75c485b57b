"""The control process as a whole: started as the supervisor starts it, on real sockets, killed and started again."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.domain.catalog import Catalog
from gateway.domain.keys import KeyRecord, digest
from gateway.domain.metrics import Samples
from gateway.link.client import LinkClient
from gateway.link.messages import KeyFound
from gateway.link.runtime import ADMIN, LINK, PUBLIC
from tests.control.process import CATALOG, ControlProcess, write_config


@pytest.fixture
def control(tmp_path: Path) -> Iterator[ControlProcess]:
    with ControlProcess(write_config(tmp_path)) as control:
        yield control


class Edge:
    """What an edge does with its link, with everything it hears."""

    def __init__(self, control: ControlProcess, incarnation: str = "edge-a") -> None:
        self.heard: asyncio.Queue[object] = asyncio.Queue()
        self.requests = 0.0
        self.link = LinkClient(
            address=str(control.runtime / LINK),
            slot=0,
            incarnation=incarnation,
            pid=os.getpid(),
            samples=lambda: Samples(numbers={"gateway_requests_total": {("chat", "200"): self.requests}}),
            on_welcome=lambda catalog, control: self.heard.put_nowait(("welcome", control)),
            on_key_changed=lambda digest, key: self.heard.put_nowait((digest, key)),
            on_catalog=self.heard.put_nowait,
            on_lost=lambda: self.heard.put_nowait("lost"),
        )

    async def next(self) -> object:
        async with asyncio.timeout(10):
            return await self.heard.get()

    async def find(self, digest: str) -> KeyFound:
        found: asyncio.Future[KeyFound] = asyncio.get_running_loop().create_future()
        self.link.find_key(digest, found.set_result)
        return await found


def requests_shown(metrics: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in metrics.splitlines() if line.startswith("gateway_requests_total{"))


async def test_sockets_are_for_the_owner_alone(control: ControlProcess) -> None:
    for name in (LINK, PUBLIC, ADMIN):
        assert stat.S_IMODE((control.runtime / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(control.runtime.stat().st_mode) == 0o700
    status, health, _ = await control.ask(ADMIN, "GET", "/health")
    assert (status, health["status"], health["pid"]) == (200, "ok", control.process.pid)


async def test_callers_reach_the_catalog_and_nothing_of_administration(control: ControlProcess) -> None:
    status, models, _ = await control.ask(PUBLIC, "GET", "/api/v1/models")
    assert (status, models["data"][0]["pricing"]["prompt"]) == (200, "0.0000025")
    for method, path in (("POST", "/accounts"), ("GET", "/metrics"), ("GET", "/health"), ("POST", "/catalog/reload")):
        status, body, _ = await control.ask(PUBLIC, method, path)
        assert (status, body["error"]["code"]) == (404, 404)


async def test_bodies_that_do_not_fit_are_refused(control: ControlProcess) -> None:
    for path, body in (
        ("/accounts", {"email": "a@b.c", "is_admin": True}),
        ("/accounts", {}),
        ("/credits", [1]),
        ("/reaped", {"slot": "x"}),
    ):
        status, answer, _ = await control.ask(ADMIN, "POST", path, body)
        assert (status, answer["error"]["code"]) == (400, 400)
    for usd in ("9223372036.854775808", "1e300", "-1", "0.0000000001", "NaN", "x"):
        status, _, _ = await control.ask(ADMIN, "POST", "/accounts", {"email": "a@b.c", "usd": usd})
        assert status == 400
    status, _, headers = await control.ask(ADMIN, "DELETE", "/accounts")
    assert (status, headers["Allow"]) == (405, "POST")


async def test_an_edge_learns_of_a_new_key_and_can_find_it(control: ControlProcess) -> None:
    edge = Edge(control)
    await edge.link.start()
    assert await edge.next() == ("welcome", "control-1")
    _, account, _ = await control.ask(ADMIN, "POST", "/accounts", {"email": "ann@example.com", "usd": "1"})
    wanted = digest(account["key"])
    pushed = await edge.next()
    record = (await edge.find(wanted)).key
    assert isinstance(record, KeyRecord) and not record.management
    assert pushed == (wanted, record)
    assert await edge.find(digest("sk-or-v1-unknown")) == KeyFound(id=2, key=None)
    await edge.link.stop()
    assert account["key"] not in (control.config.parent / "control.log").read_text()


async def test_a_killed_control_is_joined_again_and_no_total_falls(control: ControlProcess) -> None:
    edge = Edge(control)
    edge.requests = 7
    await edge.link.start()
    assert await edge.next() == ("welcome", "control-1")
    shown = 0.0
    for round_ in range(1, 4):
        edge.requests += 5
        edge.link.report_now()
        while shown < edge.requests:  # until the report has arrived
            _, metrics, _ = await control.ask(ADMIN, "GET", "/metrics")
            assert requests_shown(metrics) >= shown
            shown = requests_shown(metrics)
        control.kill()
        assert await edge.next() == "lost"
        await asyncio.to_thread(control.start)
        assert await edge.next() == ("welcome", f"control-{round_ + 1}")
        _, metrics, _ = await control.ask(ADMIN, "GET", "/metrics")
        assert requests_shown(metrics) >= shown
    await edge.link.stop()
    await control.ask(ADMIN, "POST", "/reaped", {"slot": 0, "incarnation": "edge-a"})
    await control.ask(ADMIN, "POST", "/supervisor", {"starts": {"edge": 1, "control": 4}})
    _, metrics, _ = await control.ask(ADMIN, "GET", "/metrics")
    assert requests_shown(metrics) == edge.requests == 22
    assert 'gateway_process_starts_total{process="control"} 4.0' in metrics


async def test_a_reload_reaches_the_edges_and_a_bad_one_changes_nothing(control: ControlProcess) -> None:
    edge = Edge(control)
    await edge.link.start()
    await edge.next()
    catalog = control.config.parent / "catalog.toml"
    catalog.write_text(CATALOG.replace('prompt = "0.0000025"', 'prompt = "-1"'))
    status, body, _ = await control.ask(ADMIN, "POST", "/catalog/reload")
    assert status == 422
    [problem] = body["error"]["metadata"]["problems"]
    assert problem["key"] == "models[0].endpoints[0].pricing.prompt"
    catalog.write_text(CATALOG.replace('prompt = "0.0000025"', 'prompt = "0.000009"'))
    _, models, _ = await control.ask(PUBLIC, "GET", "/api/v1/models")
    assert models["data"][0]["pricing"]["prompt"] == "0.0000025"  # the file alone changes nothing
    status, reloaded, _ = await control.ask(ADMIN, "POST", "/catalog/reload", {})
    assert (status, reloaded["changed"], reloaded["models"]) == (200, True, 1)
    pushed = await edge.next()
    assert isinstance(pushed, Catalog) and pushed.revision == reloaded["revision"]
    _, models, _ = await control.ask(PUBLIC, "GET", "/api/v1/models")
    assert models["data"][0]["pricing"]["prompt"] == "0.000009"
    _, metrics, _ = await control.ask(ADMIN, "GET", "/metrics")
    assert 'gateway_catalog_reloads_total{result="refused"} 1.0' in metrics
    assert 'gateway_catalog_reloads_total{result="ok"} 1.0' in metrics
    await edge.link.stop()


async def test_sigterm_ends_it_cleanly(control: ControlProcess) -> None:
    assert await asyncio.to_thread(control.terminate) == 0
    assert control.log()[-1]["event"] == "control_stopped"
    assert not (control.config.parent / "var/gateway.db-wal").exists()  # the last to close has checkpointed


async def test_it_ends_when_its_supervisor_is_gone(control: ControlProcess) -> None:
    control.pulse.close()
    assert await asyncio.to_thread(control.process.wait, 5) == 1
    assert control.log()[-1]["event"] == "control_orphaned"


async def test_stale_socket_files_are_replaced(control: ControlProcess) -> None:
    control.kill()
    assert (control.runtime / ADMIN).exists()
    await asyncio.to_thread(control.start)
    assert (await control.ask(ADMIN, "GET", "/health"))[0] == 200


async def test_a_second_control_waits_for_the_store(control: ControlProcess) -> None:
    first, first_pulse = control.process, control.pulse
    starting = asyncio.create_task(asyncio.to_thread(control.start))
    await asyncio.wait([starting], timeout=1)
    assert not starting.done()
    first.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(first.wait, 10) == 0
    await starting
    assert (await control.ask(ADMIN, "GET", "/health"))[1]["pid"] == control.process.pid
    first_pulse.close()


def test_it_says_why_it_cannot_serve(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    (tmp_path / "var").mkdir()
    (tmp_path / "var/gateway.db").write_bytes(b"no database" * 1000)
    control = ControlProcess(config)
    with pytest.raises(AssertionError, match="control_cannot_serve"):
        control.start()
    assert control.process.returncode == 1
