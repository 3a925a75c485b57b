"""What edges and control tell each other arrives, in its order, and at whom it is for."""

from __future__ import annotations

import asyncio

from gateway.domain.catalog import Catalog
from gateway.link.messages import (
    Back,
    Committed,
    Funded,
    Grant,
    Journaled,
    Recall,
    Standing,
    Want,
)
from tests.link.ends import Control, Edge


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
