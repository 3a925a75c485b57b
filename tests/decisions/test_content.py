"""What is kept of exchanges under way takes a bounded room, all of them together, and gives it back however they end."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.edge import content
from gateway.edge.caller import CallerConnection
from gateway.edge.content import Contents, KeptCaller
from gateway.edge.exchange import KEEPALIVE, InferenceExchange
from gateway.link.messages import Content


class Caller:
    """Notes what it is answered."""

    peer = "192.0.2.1"

    def __init__(self) -> None:
        self.got: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.got.append((name, *arguments))


class World:
    def __init__(self, exchange_bytes_max: int = 1000) -> None:
        self.sent: list[Content] = []
        self.contents = Contents(send=self.sent.append, exchange_bytes_max=exchange_bytes_max, discount_millionths=10_000)
        self.caller = Caller()

    def keep(self, body: bytes, *, on_record: bool = True) -> KeptCaller:
        exchange = SimpleNamespace(bill=object() if on_record else None, key=SimpleNamespace(account_id="user_1"), generation_id="gen-1")
        return self.contents.keep(cast(InferenceExchange, exchange), cast(CallerConnection, self.caller), body)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(content, "HELD_BYTES_MAX", 100)
    yield World()


def test_all_that_is_under_way_shares_a_bounded_room_and_the_end_of_one_is_room_for_the_next(small: World) -> None:
    first, second = small.keep(b"a" * 60), small.keep(b"b" * 30)
    first.stream(b"1" * 20)  # 10 of them fit
    second.stream(b"2")
    assert small.contents.held_bytes == 100
    first.end_stream(b"3")
    third = small.keep(b"c" * 40)
    second.end_stream(b"4")  # nothing after a cut: an answer has no holes
    third.answer(200, b"5" * 50)
    assert [(each.request, each.answer, each.truncated) for each in small.sent] == [
        (b"a" * 60, b"1" * 10, True),
        (b"b" * 30, b"", True),
        (b"c" * 40, b"5" * 50, False),
    ]
    assert small.contents.held_bytes == 0


@pytest.mark.parametrize("how", ["answered", "refused", "caller gone", "abandoned"])
def test_its_room_is_given_back_once(small: World, how: str) -> None:
    kept = small.keep(b"a" * 40, on_record=how != "refused")
    kept.stream(b"1" * 10)
    if how == "abandoned":
        kept.abort()
        kept.forget()
    elif how == "caller gone":
        kept.end()
    else:
        kept.end_stream()
    assert small.contents.held_bytes == 0
    assert len(small.sent) == (how in ("answered", "caller gone"))


def test_callers_get_everything_cut_or_not_and_comments_are_theirs_alone() -> None:
    world = World(10)
    kept = world.keep(b"123")
    kept.begin_stream(200, (), "text/event-stream")
    for data in (KEEPALIVE, b"data: a\n\n", KEEPALIVE, b"data: b\n\n"):
        kept.stream(data)
    kept.end_stream(b"data: c\n\n")
    assert world.caller.got == [
        ("begin_stream", 200, (), "text/event-stream"),
        ("stream", KEEPALIVE),
        ("stream", b"data: a\n\n"),
        ("stream", KEEPALIVE),
        ("stream", b"data: b\n\n"),
        ("end_stream", b"data: c\n\n"),
    ]
    (sent,) = world.sent
    assert (sent.request, sent.answer, sent.truncated) == (b"123", b"data: a", True)


def test_no_repr_shows_what_was_said() -> None:
    world = World()
    kept = world.keep(b"canary")
    kept.stream(b"canary")
    assert "canary" not in repr(kept) + repr(world.contents) and repr(kept) == "<KeptCaller 12 bytes>"
