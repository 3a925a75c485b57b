"""`openrouter_metadata`, for callers who ask with a header: which endpoints could serve, how each stood, what was tried.

Beside the contract's members an endpoint has `endpoint`, `calls`, `share`, `cost` and `reason`, and an attempt its `outcome`.
Source: OpenRouter router metadata, read 2026-11.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from gateway.domain.catalog import Model
from gateway.domain.errors import CallerGone, GatewayError
from gateway.domain.generation import HEDGE_LOST
from gateway.edge.snapshots import Choice
from gateway.routing.router import Explained, Router
from gateway.wire.envelope import Envelope

if TYPE_CHECKING:
    from gateway.edge.attempts import Attempt

UNEXPLAINED = frozenset({401, 429, 500})  # errors that say nothing of routing


class _Available(msgspec.Struct):
    provider: str
    model: str
    selected: bool
    endpoint: str
    calls: int  # under way there from this edge, when the choice was made
    share: float | None = None  # of the model's traffic without wishes
    cost: float | None = None  # 1.0: best in everything; null: not tried by its own merit now
    reason: str = ""


class _Endpoints(msgspec.Struct):
    total: int
    available: list[_Available]


class _Attempt(msgspec.Struct):
    provider: str
    model: str
    status: int  # the provider's; where it gave none, what its failure is to a caller
    outcome: str


class _Metadata(msgspec.Struct):
    requested: str
    strategy: str
    summary: str
    attempt: int  # that served, from 1; 0: none did
    endpoints: _Endpoints
    attempts: list[_Attempt]
    region: str | None = None
    is_byok: bool = False


_encode = msgspec.json.Encoder().encode


class Explanation:
    """How endpoints stood when an exchange's were chosen; `told` adds what came of it."""

    def __init__(self, router: Router[Choice], envelope: Envelope, now_s: float) -> None:
        self._requested = envelope.model
        self._providers = router.catalog.providers
        self._choices: tuple[Choice, ...] = ()
        self._calls: list[int] = []
        self._models = list(_models(router, (envelope.model, *envelope.models)))
        self._rows: dict[str, Explained] = {}
        for model in self._models:
            self._rows.update((row.endpoint_id, row) for row in router.explain(model, now_s))

    def chosen(self, choices: Sequence[Choice]) -> None:
        """Who may serve, in order."""
        self._choices = tuple(choices)
        self._calls = [choice.live.inflight for choice in choices]

    def member(self, attempts: Sequence[Attempt], served: Attempt | None) -> bytes:
        """`,"openrouter_metadata":{...}`, to stand behind another member."""
        return b',"openrouter_metadata":' + _encode(self.told(attempts, served))

    def told(self, attempts: Sequence[Attempt], served: Attempt | None) -> _Metadata:
        """`served` is the one of `attempts` whose answer the caller has."""
        tried = [_Attempt(each.upstream.provider.name, each.model.id, _status(each), each.outcome) for each in attempts]
        number = attempts.index(served) + 1 if served is not None else 0
        return _Metadata(
            requested=self._requested,
            strategy=self._strategy(served),
            summary=f"{len(self._choices)} of {len(self._rows)} endpoints could serve; {_course(tried, number)}",
            attempt=number,
            endpoints=_Endpoints(
                len(self._rows), [self._available(choice, calls, served) for choice, calls in zip(self._choices, self._calls, strict=True)]
            ),
            attempts=tried,
        )

    def _available(self, choice: Choice, calls: int, served: Attempt | None) -> _Available:
        endpoint = choice.endpoint
        row = self._rows.get(endpoint.id)
        found = _Available(
            provider=self._providers[endpoint.provider].name,
            model=endpoint.model_id,
            selected=served is not None and served.choice is choice,
            endpoint=endpoint.id,
            calls=calls,
        )
        if row is not None:
            found.share, found.cost, found.reason = row.share, row.cost, row.reason
        return found

    def _strategy(self, served: Attempt | None) -> str:
        if not self._models:
            return "direct"
        first = self._models[0].id
        if served is not None and served.model.id != first:
            return "fallback"
        if self._requested == first or self._requested.startswith(f"{first}:"):
            return "direct"
        return "latest" if self._requested.startswith("~") else "alias"


def _models(router: Router[Choice], names: Sequence[str]) -> Iterator[Model]:
    for name in names:
        try:
            yield router.resolve(name).model
        except GatewayError:
            continue


def _course(tried: Sequence[_Attempt], number: int) -> str:
    if not tried:
        return "none was tried"
    return ", ".join(f"{each.provider}: {each.outcome}" for each in tried) + ("" if number else "; none served")


def _status(attempt: Attempt) -> int:
    return attempt.provider_status or _STATUSES.get(attempt.outcome, 502)


def _classes(of: type[GatewayError]) -> Iterator[type[GatewayError]]:
    for kind in of.__subclasses__():
        yield kind
        yield from _classes(kind)


_STATUSES = {kind.code: kind.status for kind in _classes(GatewayError)} | {HEDGE_LOST: CallerGone.status}  # it was we who hung up
