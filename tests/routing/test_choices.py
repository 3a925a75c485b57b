"""Choices as an edge sees them: orders hold everybody once, the best gets nearly all, the unknown are tried with measure."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.replay import bytecodes
from gateway.domain.catalog import Price
from gateway.domain.errors import Throttled
from gateway.routing.fleet import Fleet
from tests.routing.scene import Scene, endpoint, model_of

TWO = model_of([endpoint("a", 1.0), endpoint("b", 1.1)])
APART = model_of([endpoint("a", 1.0), endpoint("b", 1.3)])
THREE = model_of([endpoint("a", 1.0), endpoint("b", 1.1), endpoint("c", 1.2)])


@settings(max_examples=60, deadline=None)
@given(
    prices=st.lists(st.floats(0.1, 20.0), min_size=1, max_size=8),
    events=st.lists(st.tuples(st.integers(0, 7), st.sampled_from(["ok", "slow", "fail", "429", "wait"])), max_size=60),
    seed=st.integers(0, 100),
)
def test_an_order_names_everybody_who_may_be_tried_once(prices: list[float], events: list[tuple[int, str]], seed: int) -> None:
    tags = [f"p{i}" for i in range(len(prices))]
    scene = Scene(model_of([endpoint(tag, usd) for tag, usd in zip(tags, prices, strict=True)]), seed=seed)
    for number, what in events:
        tag = tags[number % len(tags)]
        if what == "ok":
            scene.call(tag)
        elif what == "slow":
            scene.call(tag, 20.0)
        elif what == "fail":
            scene.fail(tag)
        elif what == "429":
            scene.throttle(tag, 5.0)
        scene.now_s += 0.5 if what != "wait" else 20.0
        held = {each for each in tags if scene.live(each).is_held(scene.now_s)}
        if held == set(tags):
            with pytest.raises(Throttled):
                scene.rank()
            continue
        order = scene.rank()
        assert order
        assert len(order) == len(set(order))
        assert not held & set(order)
        closed = {each for each in tags if scene.live(each).breaker.admits(scene.now_s)}
        assert closed <= set(order)


def test_the_best_gets_nearly_all_and_equals_share() -> None:
    scene = Scene(model_of([endpoint("a", 1.0), endpoint("b", 1.0), endpoint("c", 3.0)]))
    scene.warm({"a": 0.3, "b": 0.3, "c": 0.3})
    shares = scene.shares()
    assert shares["a"] == pytest.approx(0.5, abs=0.15)
    assert shares["b"] == pytest.approx(0.5, abs=0.15)
    assert shares.get("c", 0.0) < 0.01


def test_where_too_little_is_called_to_know_speeds_the_balance_is_by_price_and_away_from_who_fails() -> None:
    scene = Scene(model_of([endpoint("a", 1.0), endpoint("b", 3.0)]))
    shares = scene.shares(4000)
    assert shares["a"] / shares["b"] == pytest.approx(9.0, rel=0.3)
    scene.fail("a")
    scene.fail("a")
    scene.now_s += 1.0
    assert scene.shares(1000)["b"] > 0.8


def test_the_same_random_numbers_give_the_same_choices() -> None:
    def play() -> list[list[str]]:
        scene = Scene(THREE, seed=7)
        scene.warm({"a": 0.3, "b": 0.3, "c": 0.3})
        return [scene.rank() for _ in range(200)]

    assert play() == play()


def test_load_goes_to_the_less_loaded_of_two() -> None:
    scene = Scene(model_of([endpoint("a", 1.0), endpoint("b", 1.0)]))
    scene.warm({"a": 0.3, "b": 0.3})
    for _ in range(50):
        scene.live("a").begin(scene.now_s, stream=False)
    assert scene.shares()["a"] < 0.35  # both draws must fall on it


def test_ups_07_a_slow_step_moves_traffic_within_five_seconds_and_healing_brings_it_back_within_sixty() -> None:
    scene = Scene(APART)
    waiting: list[tuple[float, str, int]] = []
    firsts: list[tuple[float, str]] = []

    def second(first_s: float) -> None:
        for _ in range(20):
            scene.now_s += 0.05
            for item in [item for item in waiting if item[0] <= scene.now_s]:
                waiting.remove(item)
                live = scene.live(item[1])
                live.first_content(item[2], item[0])
                live.succeeded(item[2], item[0] + 0.5, tokens=50, gen_s=0.5)
            tag = scene.rank()[0]
            firsts.append((scene.now_s, tag))
            waiting.append((scene.now_s + (first_s if tag == "a" else 0.1), tag, scene.live(tag).begin(scene.now_s, stream=True)))

    def share(since_s: float) -> float:
        tags = [tag for at_s, tag in firsts if at_s >= since_s]
        return tags.count("a") / len(tags)

    for _ in range(40):
        second(0.1)
    fair = share(scene.now_s - 10)
    assert fair > 0.5
    for _ in range(5):
        second(3.0)
    began_s = scene.now_s
    for _ in range(20):
        second(3.0)
    assert share(began_s) < 0.1
    for _ in range(60):
        second(0.1)
    assert share(scene.now_s - 10) >= 0.8 * fair


def test_ups_07_a_newcomer_is_tried_with_measure_and_then_wins() -> None:
    old = [endpoint("a", 1.0), endpoint("b", 1.0)]
    scene = Scene(model_of(old))
    scene.warm({"a": 0.4, "b": 0.4})
    scene.show(model_of([*old, endpoint("new", 0.5)]))
    tried = 0
    for _ in range(200):  # ten seconds
        first = scene.rank()[0]
        scene.call(first, 0.2 if first == "new" else 0.4)
        tried += first == "new"
        scene.now_s += 0.05
    assert 5 <= tried <= 200 * 2 / 3
    for _ in range(400):
        first = scene.rank()[0]
        scene.call(first, 0.2 if first == "new" else 0.4)
        scene.now_s += 0.05
    assert scene.shares(per_s=100.0).get("new", 0.0) > 0.9


def test_a_newcomer_that_never_answers_holds_few_calls() -> None:
    scene = Scene(model_of([endpoint("a", 1.0)]))
    scene.warm({"a": 0.4})
    scene.show(model_of([endpoint("a", 1.0), endpoint("new", 0.5)]))
    for _ in range(1000):
        if scene.rank()[0] == "new":
            scene.live("new").begin(scene.now_s, stream=True)
        else:
            scene.call("a", 0.4)
        scene.now_s += 0.05
    assert scene.live("new").inflight <= 2


def test_exploration_stays_within_its_share() -> None:
    scene = Scene(model_of([endpoint("a", 1.0), endpoint("b", 1.0)]), exploration_share=0.05)
    scene.warm({"a": 0.3, "b": 30.0})
    chosen = []
    for _ in range(4000):
        first = scene.rank()[0]
        chosen.append(first)
        scene.call(first, 0.3 if first == "a" else 30.0)
        scene.now_s += 0.05
    assert 1 <= chosen.count("b") <= 0.05 * 4000 + 20


def test_one_that_could_not_win_at_its_best_is_not_explored() -> None:
    scene = Scene(model_of([endpoint("a", 1.0), endpoint("dear", 50.0)]))
    scene.warm({"a": 0.3, "dear": 30.0})
    assert "dear" not in scene.shares(4000, per_s=20.0)


def test_a_price_change_counts_at_once() -> None:
    scene = Scene(model_of([endpoint("a", 1.0), endpoint("b", 2.0)]))
    scene.warm({"a": 0.3, "b": 0.3})
    assert scene.shares(200)["a"] > 0.95
    scene.show(model_of([endpoint("a", 3.0), endpoint("b", 2.0)]))
    scene.now_s += 15  # slow start over
    assert scene.shares(200)["b"] > 0.95


CACHING: dict[str, Any] = {"price": Price(prompt=10**9, completion=10**9, input_cache_read=10**8)}


def test_a_conversation_goes_back_to_the_endpoint_that_holds_its_prompt() -> None:
    scene = Scene(model_of([endpoint(tag, **CACHING) for tag in "abc"]))
    scene.warm(dict.fromkeys("abc", 0.3))
    conversation = ("account", "acme/large", "talk")
    pick = next(each for each in scene.router.rank(scene.model, now_s=scene.now_s, rng=scene.random.random))
    tag = pick.endpoint.tag
    scene.router.remember(conversation, pick, scene.now_s, by_session=True, cached_tokens=0)
    assert {scene.rank(conversation=conversation)[0] for _ in range(100)} == {tag}
    assert len({scene.rank(conversation=("other", "acme/large", "talk"))[0] for _ in range(200)}) > 1
    scene.now_s += 601
    assert len({scene.rank(conversation=conversation)[0] for _ in range(200)}) > 1


def test_health_outranks_stickiness() -> None:
    scene = Scene(model_of([endpoint(tag, **CACHING) for tag in "ab"]))
    scene.warm(dict.fromkeys("ab", 0.3))
    pick = next(each for each in scene.router.rank(scene.model, now_s=scene.now_s, rng=lambda: 0.0))
    conversation = ("account", "acme/large", "talk")
    scene.router.remember(conversation, pick, scene.now_s, by_session=True, cached_tokens=0)
    scene.fail(pick.endpoint.tag)
    scene.fail(pick.endpoint.tag)
    assert scene.rank(conversation=conversation)[0] != pick.endpoint.tag


def test_only_a_cheaper_cache_that_was_used_makes_sticky() -> None:
    scene = Scene(model_of([endpoint("plain"), endpoint("caching", **CACHING)]))
    plain, caching = (type(pick)(pick.model, pick.endpoint) for pick in scene.router.rank(scene.model, now_s=0.0, rng=lambda: 0.0))
    scene.router.remember("plain", plain, 0.0, by_session=True, cached_tokens=500)
    scene.router.remember("unused", caching, 0.0, by_session=False, cached_tokens=0)
    assert len(scene.router.sticky) == 0
    scene.router.remember("used", caching, 0.0, by_session=False, cached_tokens=500)
    assert len(scene.router.sticky) == 1


def test_what_control_pushes_is_believed_and_its_absence_survived() -> None:
    here, there, fleet = Scene(TWO), Scene(TWO), Fleet()
    here.warm({"a": 0.3, "b": 0.3}, calls=5)
    there.warm({"a": 9.0, "b": 0.3}, calls=60)  # the other edge saw that a is slow
    assert here.shares(100)["a"] > 0.5
    fleet.observe("here", here.router.report(here.now_s), 0.0)
    fleet.observe("there", there.router.report(there.now_s), 0.0)
    here.router.take(fleet.merged(0.0), "here", here.now_s)
    here.now_s += 1.0
    assert here.shares(100).get("a", 0.0) < 0.1
    here.now_s += 60.0  # control is silent: own figures again
    here.rank()
    here.now_s += 15.0  # grown in again
    assert here.shares(100)["a"] > 0.5


def test_what_was_reported_is_not_counted_twice_when_it_comes_back() -> None:
    scene, fleet = Scene(TWO), Fleet()
    scene.warm({"a": 0.3}, calls=10)
    observed = scene.router.report(scene.now_s)
    assert scene.live("a").figures(scene.now_s).windows[-1].ok == 10
    fleet.observe("me", observed, 0.0)
    scene.call("a")
    scene.router.take(fleet.merged(0.0), "me", scene.now_s)
    assert scene.live("a").figures(scene.now_s).windows[-1].ok == 11


def test_every_choice_can_be_explained() -> None:
    scene = Scene(THREE)
    scene.warm({"a": 0.3, "b": 0.6, "c": 0.3})
    for _ in range(5):
        scene.fail("c")
    rows = scene.router.explain(scene.model, scene.now_s)
    assert [row.endpoint_id for row in rows][-1] == "acme/large@c"
    assert rows[-1].cost is None
    assert "ejected" in rows[-1].reason
    assert "price x1.00" in rows[0].reason
    assert sum(row.share for row in rows) == pytest.approx(1.0, abs=0.001)


def test_a_decision_is_cheap() -> None:
    scene = Scene(model_of([endpoint(f"p{i}", 1.0) for i in range(8)]))
    scene.warm({f"p{i}": 0.3 for i in range(8)})
    rank, model, rng = scene.router.rank, scene.model, scene.random.random
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(500):
            rank(model, now_s=scene.now_s, rng=rng)
        best = min(best, time.perf_counter() - began)
    assert best / 500 < 10e-6  # the best of twenty: a busy machine is no failure


def test_the_cost_of_sharing_out_grows_with_the_endpoints_and_not_with_their_square() -> None:
    def cost(endpoints: int) -> int:
        """Bytecodes of the first choice after a change, when all are known and share."""
        tags = [f"p{number}" for number in range(endpoints)]
        scene = Scene(model_of([endpoint(tag, 1.0) for tag in tags]))
        scene.warm(dict.fromkeys(tags, 0.3))
        scene.now_s += 1.0
        order: list[str] = []
        spent = bytecodes(lambda: order.extend(scene.rank())).total()
        assert sorted(order) == sorted(tags)
        return spent

    few, many = cost(50), cost(200)
    assert many < 5 * few
