"""What a route is: a path and a method, who may use it, the structs that its input is decoded into, and what answers.

The table of all routes is the one place that says who may do what: it is enforced from it, documented from it and
tested from it. A route without a class cannot be made.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Generic, Literal, TypeVar

import msgspec
from aiohttp import web

from gateway.control.store import Key
from gateway.control.store.management import Session

# public: anybody. visitor: anybody, from a page of ours. key: a key of either class. either: a key of either class, or a
# session. management: a management key, or a session. session: a session alone.
Access = Literal["public", "visitor", "key", "either", "management", "session"]
OWN_PAGES: frozenset[Access] = frozenset(("visitor", "session"))  # classes that pages of other origins have no part in
API_BASES = ("/api/v1", "/v1")  # one API: OpenRouter's base path, and the one that OpenAI clients assume

QueryT = TypeVar("QueryT")
BodyT = TypeVar("BodyT")


class Nothing(msgspec.Struct, frozen=True):
    """Of a query that is not read, or a body that is not."""


NOTHING = Nothing()


class Caller(msgspec.Struct, frozen=True):
    """Who asks: the owner of a key or of a session; neither on routes that anybody may use."""

    account_id: str = ""
    key: Key | None = None
    session: Session | None = None


NOBODY = Caller()


class Call(Generic[QueryT, BodyT]):
    """One request, checked and decoded."""

    __slots__ = ("body", "caller", "query", "request")

    def __init__(self, request: web.Request, caller: Caller, query: QueryT, body: BodyT) -> None:
        self.request = request
        self.caller = caller
        self.query = query
        self.body = body


Handler = Callable[[Call[Any, Any]], Awaitable[web.StreamResponse]]


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """`query`, `body` and `answer` are structs; they are the OpenAPI document, too. `path` is without the API's base."""

    method: Literal["GET", "POST", "PATCH", "DELETE"]
    path: str
    access: Access
    handler: Handler
    summary: str
    query: type[msgspec.Struct] = Nothing
    body: type[msgspec.Struct] = Nothing
    answer: type | None = None  # None: any object
    status: int = 200
    content_type: str = "application/json"
    also: tuple[str, ...] = ()  # other types of answers
    bases: tuple[str, ...] = API_BASES

    @property
    def operation(self) -> str:
        """Names it in documents: `createKey`."""
        first, *rest = self.handler.__name__.split("_")
        return first + "".join(word.title() for word in rest)
