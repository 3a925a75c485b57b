"""What this edge knows, as control sent it: keys, and the endpoints of the catalog. Read without locks, replaced whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from gateway.domain.catalog import CONTEXT_MOST, Catalog, Endpoint, Model
from gateway.domain.keys import KeyRecord
from gateway.ledger.pricing import Worst, worst
from gateway.link.client import LinkClient
from gateway.link.messages import KeyFound
from gateway.routing.live import Live
from gateway.routing.router import Router
from gateway.wire.shape import Shape

KEYS_MAX = 200_000
UNKNOWN_MAX = 20_000
SESSION_S = 60.0  # so that control knows which browsers are in use; a session that ended is pushed, so nobody relies on this
FIRST_TOKENS = 4096  # of an answer whose longest nobody knows: credit is held for these, and for more as they are made
UNKNOWN_S = 5.0  # a made-up key costs control one look-up per this long; a new key is pushed, so nobody waits for it


class Keys:
    """Key records by digest: known ones until control says otherwise, unknown ones for a moment."""

    def __init__(self, link: LinkClient) -> None:
        self._link = link
        self._loop = asyncio.get_running_loop()
        self.known: dict[str, KeyRecord] = {}
        self._unknown: dict[str, float] = {}  # digest -> until

    def find(self, digest: str, then: Callable[[KeyRecord | None, bool], None]) -> None:
        """Of a key that is not known: calls `then(record, unavailable)` when control has answered, or where it has lately at once."""
        until = self._unknown.get(digest)
        if until is not None and until > self._loop.time():
            then(None, False)
            return

        def found(answer: KeyFound) -> None:
            self._remember(digest, answer)
            then(answer.key, answer.unavailable)

        self._link.find_key(digest, found)

    def _remember(self, digest: str, answer: KeyFound) -> None:
        if answer.key is not None:
            if len(self.known) >= KEYS_MAX:
                del self.known[next(iter(self.known))]
            self.known[digest] = answer.key
            if answer.key.session:
                self._loop.call_later(SESSION_S, self.known.pop, digest, None)
            self._unknown.pop(digest, None)
        elif not answer.unavailable:
            if len(self._unknown) >= UNKNOWN_MAX:
                del self._unknown[next(iter(self._unknown))]
            self._unknown[digest] = self._loop.time() + UNKNOWN_S

    def change(self, digest: str, record: KeyRecord | None) -> None:
        """Control's push: the new truth of one key; None: revoked."""
        self._unknown.pop(digest, None)
        if record is None:
            self.known.pop(digest, None)
        elif digest in self.known:
            self.known[digest] = record

    def forget(self) -> None:
        """After a lost link: changes may have been missed."""
        self.known.clear()
        self._unknown.clear()


class Rivals:
    """The endpoints of one model that are in service."""

    __slots__ = ("dearest", "number")

    def __init__(self) -> None:
        self.number = 0
        self.dearest: tuple[Choice, ...] = ()  # whatever is asked, the one that can cost most is among these

    def are(self, choices: Sequence[Choice]) -> None:
        """These, in this order."""
        self.number = len(choices)
        dearest: list[Choice] = []
        for choice in choices:
            if not any(each.costs_as_much_as(choice) for each in dearest):
                dearest = [each for each in dearest if not choice.costs_as_much_as(each)]
                dearest.append(choice)
        self.dearest = tuple(dearest)


class Choice(msgspec.Struct, frozen=True):
    """An endpoint that may serve, with its model and what it can cost at most."""

    model: Model
    endpoint: Endpoint
    live: Live  # its state, as this edge knows it
    worst: Worst
    completion_tokens_max: int  # that it makes of its own accord; where nobody knows, as many as credit is held for at first
    completion_tokens_most: int  # that it makes for callers who ask for more: the same, where it is known
    prompt_tokens_most: int  # that it may say to have read
    limit_name: str | None  # the only name of the token limit that it knows; None: both, or nobody said
    shape: Shape  # of its events
    rivals: Rivals  # itself among them

    @property
    def context_length(self) -> int:
        return min(self.endpoint.room, self.endpoint.max_prompt_tokens or self.endpoint.room)

    @property
    def is_open(self) -> bool:
        """Whether nobody knows how much it makes of its own accord."""
        return self.completion_tokens_max < self.completion_tokens_most

    def costs_as_much_as(self, other: Choice) -> bool:
        """Or more, whatever is asked."""
        mine, its = self.worst, other.worst
        return (
            mine.prompt >= its.prompt
            and mine.completion >= its.completion
            and mine.fixed >= its.fixed
            and mine.image >= its.image
            and self.completion_tokens_max >= other.completion_tokens_max
            and self.completion_tokens_most >= other.completion_tokens_most
        )


def choices_of(catalog: Catalog, router: Router[Choice], in_service: Callable[[Endpoint], bool]) -> dict[str, list[Choice]]:
    """By model id, the endpoints whose provider can be reached."""
    found: dict[str, list[Choice]] = {}
    for model in catalog.models.values():
        rivals = Rivals()
        choices = [_choice(model, endpoint, router.live(endpoint), rivals) for endpoint in model.endpoints if in_service(endpoint)]
        rivals.are(choices)
        found[model.id] = choices
    return found


def _choice(model: Model, endpoint: Endpoint, live: Live, rivals: Rivals) -> Choice:
    ceiling = endpoint.max_completion_tokens or model.max_completion_tokens or endpoint.context_length
    known = [name for name in ("max_tokens", "max_completion_tokens") if name in endpoint.supported_parameters]
    return Choice(
        model=model,
        endpoint=endpoint,
        live=live,
        worst=worst(endpoint.price),
        completion_tokens_max=ceiling or FIRST_TOKENS,
        completion_tokens_most=ceiling or CONTEXT_MOST,
        prompt_tokens_most=2 * endpoint.room,  # no tokenizer is that far off, a mistaken or hostile count is
        limit_name=known[0] if len(known) == 1 else None,
        shape=Shape(),
        rivals=rivals,
    )
