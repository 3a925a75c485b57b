"""Endpoints that fail or limit are left alone, come back, and are asked all the same where nobody else is left."""

from __future__ import annotations

import pytest

from gateway.domain.errors import NoEndpointMatches, Throttled
from tests.routing.scene import Scene, endpoint, model_of

TWO = model_of([endpoint("a", 1.0), endpoint("b", 1.1)])


def test_ups_05_the_sick_one_of_four_gets_no_more_than_a_twentieth() -> None:
    scene = Scene(model_of([endpoint(tag, 1.0) for tag in "abcd"]))
    scene.warm(dict.fromkeys("abcd", 0.3))
    for _ in range(5):
        scene.fail("a")
    calls = 0
    for _ in range(1000):
        first = scene.rank()[0]
        if first == "a":
            calls += 1
            scene.fail("a")
        else:
            scene.call(first)
        scene.now_s += 0.02
    assert calls <= 50


def test_ups_05_with_all_of_them_sick_traffic_still_spreads_and_comes_back() -> None:
    scene = Scene(model_of([endpoint(tag, 1.0) for tag in "abcd"]))
    scene.warm(dict.fromkeys("abcd", 0.3))
    seen = set()
    for _ in range(400):
        for tag in scene.rank():
            scene.fail(tag)
            seen.add(tag)
        scene.now_s += 0.1
    assert seen == set("abcd")
    healed_at_s = scene.now_s
    good = dict.fromkeys("abcd", 0)
    while scene.now_s < healed_at_s + 60:
        first = scene.rank()[0]
        scene.call(first)
        if scene.now_s > healed_at_s + 50:
            good[first] += 1
        scene.now_s += 0.05
    assert min(good.values()) >= 0.8 * sum(good.values()) / 4


def test_an_ejected_endpoint_comes_back_however_little_is_called() -> None:
    scene = Scene(TWO)
    for _ in range(5):
        scene.fail("a")
    assert scene.rank() == ["b"]
    came_back = False
    for _ in range(20):  # one call in two minutes: nothing is ever known of speeds
        scene.now_s += 120
        first = scene.rank()[0]
        came_back = came_back or first == "a"
        scene.call(first)
    assert came_back
    assert scene.live("a").breaker.admits(scene.now_s)


def test_an_ejected_endpoint_comes_back_also_where_all_callers_sort() -> None:
    scene = Scene(TWO)

    def cheapest_first() -> list[str]:
        resolved = [scene.router.resolve("acme/large:floor")]
        order = scene.router.rank_as_wished(resolved, scene.router.wishes.find(None), now_s=scene.now_s, rng=scene.random.random)
        return [pick.endpoint.tag for pick in order]

    assert cheapest_first() == ["a", "b"]
    for _ in range(5):
        scene.fail("a")
    assert cheapest_first() == ["b"]
    scene.now_s += 6
    assert cheapest_first() == ["a", "b"]
    probe = scene.live("a").begin(scene.now_s, stream=True)
    assert cheapest_first() == ["b"]  # one at a time
    scene.live("a").first_content(probe, scene.now_s + 0.2)
    assert cheapest_first() == ["a", "b"]


def test_ups_06_one_that_fails_at_once_gets_no_more_than_a_twentieth_after_twenty_requests() -> None:
    scene = Scene(TWO, price_weight=1.0)
    failures = 0
    for number in range(500):
        first = scene.rank()[0]
        if first == "a":
            failures += number >= 20
            scene.fail("a")
        else:
            scene.call("b")
        scene.now_s += 0.05
    assert failures <= 25


def test_ups_03_a_rate_limited_endpoint_is_left_alone_for_as_long_as_it_said() -> None:
    scene = Scene(TWO)
    scene.warm({"a": 0.3, "b": 0.3})
    scene.throttle("a", 30.0)
    until_s = scene.now_s + 30.0
    while scene.now_s < until_s - 0.1:
        assert scene.rank() == ["b"]
        scene.call("b")
        scene.now_s += 0.1
    scene.now_s = until_s + 20
    assert "a" in scene.rank()


def test_ups_03_without_an_alternative_the_caller_is_told_when_to_come_back() -> None:
    scene = Scene(TWO)
    scene.throttle("a", 30.0)
    scene.throttle("b", 10.0)
    with pytest.raises(Throttled) as refused:
        scene.rank()
    assert refused.value.http_status == 429
    assert refused.value.retry_after_s == pytest.approx(10.0)
    scene.now_s += 10.0
    assert scene.rank() == ["b"]


def test_a_lone_endpoint_that_named_no_time_is_still_asked() -> None:
    scene = Scene(model_of([endpoint("a")]))
    scene.throttle("a")
    assert scene.rank() == ["a"]


def test_a_callers_own_fault_never_counts() -> None:
    scene = Scene(TWO)
    scene.warm({"a": 0.3, "b": 0.3})
    before = scene.shares(500)
    for _ in range(1000):
        live = scene.live("a")
        live.told_nothing(live.begin(scene.now_s, stream=True))
    assert scene.live("a").breaker.admits(scene.now_s)
    assert scene.shares(500)["a"] == pytest.approx(before["a"], abs=0.1)
    assert scene.live("a").inflight == 0


def test_a_model_without_endpoints_in_service_is_404_since_no_waiting_helps() -> None:
    scene = Scene(TWO)
    scene.show(TWO, without=[each.id for each in TWO.endpoints])
    with pytest.raises(NoEndpointMatches) as refused:
        scene.rank()
    assert (refused.value.http_status, refused.value.retry_after_s) == (404, None)
