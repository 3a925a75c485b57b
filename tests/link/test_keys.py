"""An edge asks for keys: found, unknown or unavailable, each in time, and never older than a change."""

from __future__ import annotations

import asyncio

import pytest

from gateway.domain.errors import StoreUnavailable
from gateway.link import client as client_module
from gateway.link import server as server_module
from tests.link.ends import Control, Edge, record


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
