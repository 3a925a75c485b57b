"""What admission holds: the dearest endpoint's worst, to the nano, however it is found."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.catalog import Catalog, Endpoint, Model, Price
from gateway.edge.quotes import quote, worst_nanos
from gateway.edge.snapshots import Choice, choices_of
from gateway.routing.router import Router
from gateway.settings import Routing
from gateway.wire.envelope import parse

few = st.integers(0, 4)  # so that many are alike, and many differ in one thing
endpoints = st.lists(st.tuples(few, few, few, few, st.sampled_from((None, 5, 60, 700))), min_size=1, max_size=8)


def choices(name: str, told: list[tuple[int, int, int, int, int | None]]) -> list[Choice]:
    made = tuple(
        Endpoint(
            id=f"{name}@{number}",
            model_id=name,
            provider="n",
            tag="n",
            upstream_model="b",
            price=Price(prompt=prompt * 700, completion=completion * 900, request=request * 10**11, image=image * 10**9),
            context_length=1000 * (number % 2),  # 0: nobody knows how much it makes
            max_completion_tokens=most,
        )
        for number, (prompt, completion, request, image, most) in enumerate(told)
    )
    model = Model(id=name, canonical_slug=name, name="b", context_length=1000, endpoints=made)
    return choices_of(Catalog(revision="1", providers={}, models={name: model}), Router(Routing()), lambda _: True)[name]


@given(endpoints, endpoints, st.none() | st.integers(1, 2000), st.booleans(), st.booleans(), st.data())
def test_the_most_is_that_of_the_dearest_endpoint_whichever_of_them_are_left(
    told: list[tuple[int, int, int, int, int | None]],
    others: list[tuple[int, int, int, int, int | None]],
    max_tokens: int | None,
    has_image: bool,
    has_fallback: bool,
    data: st.DataObject,
) -> None:
    own = choices("a/b", told)
    offered = [*own, *choices("a/c", others)] if has_fallback else own
    left = data.draw(st.lists(st.sampled_from(offered), min_size=1, unique_by=id))
    content = [{"type": "text", "text": "héllo"}]
    if has_image:
        content.append({"type": "image_url", "image_url": {"url": "https://x/y.png"}})  # type: ignore[dict-item]
    body: dict[str, object] = {"model": "a/b", "messages": [{"role": "user", "content": content}]}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    if has_fallback:
        body["models"] = ["a/c"]
    envelope = parse(json.dumps(body).encode(), "chat")
    assert worst_nanos(envelope, left) == quote(envelope, left).nanos
    assert worst_nanos(envelope, offered) == quote(envelope, offered).nanos
    assert own[0].rivals.number == len(own) and 1 <= len(own[0].rivals.dearest) <= len(own)
