"""The simulated provider: an OpenAI-compatible server with scripted behaviour and its own books.

`POST <any prefix>/chat/completions` and `/completions`, `GET <any prefix>/models`; at run time `PUT /sim/models/{name}` (a
Behaviour as JSON), `GET /sim/books`, `DELETE /sim/books`. A request may change its own behaviour with
`metadata: {"sim": "ttft_ms=80;tokens=5"}`, which passes through gateways.

    python -m bench.provider --port 0 --name North --behaviour "ttft_ms=80;tokens_per_s=40"

prints one line `ready http://127.0.0.1:PORT`; SIGTERM ends it. Start reading at `Connection`.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import signal
import time
from collections.abc import Callable
from types import TracebackType
from typing import Annotated, Any, Self, cast
from urllib.parse import unquote

import msgspec
import uvloop

from bench.answers import Ask, tokens_of
from bench.behaviour import Behaviour
from bench.books import Books, Entry
from bench.delivery import Delivery
from bench.inbound import BadFraming, Head, Request, RequestReader
from bench.plan import models_body, whole
from bench.profile import Profile

PIPELINED_BYTES_MAX = 1_048_576  # more waits in the kernel
PROFILES_MAX = 256
REFUSES_PREFILL = "status=400;error_message=this model does not support assistant message prefill"


class Part(msgspec.Struct, gc=False):
    text: str | None = None


class Message(msgspec.Struct, gc=False):
    role: str = ""
    content: str | list[Part] | None = None


class StreamOptions(msgspec.Struct, gc=False):
    include_usage: bool | None = None


class Metadata(msgspec.Struct, gc=False):
    sim: str | None = None


class Body(msgspec.Struct, gc=False):
    """What a request's answer depends on."""

    model: str
    messages: list[Message] = []
    prompt: str | list[Any] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    metadata: Metadata | None = None

    def text_bytes(self) -> int:
        total = 0
        for message in self.messages:
            content = message.content
            if isinstance(content, str):
                total += len(content) if content.isascii() else len(content.encode())
            elif content:
                total += sum(len((part.text or "").encode()) for part in content)
        prompts = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        return total + sum(len(prompt.encode()) for prompt in prompts if isinstance(prompt, str))

    def prefill(self) -> str | None:
        """The text that the answer has begun with already; None: the prompt ends in no message of the model's own."""
        last = self.messages[-1] if self.messages else None
        return last.content if last is not None and last.role == "assistant" and isinstance(last.content, str) else None


class Provider:
    """The server and its books. `behaviours` are per upstream model name, `behaviour` is for all others.

    `async with Provider() as provider`: listens on `provider.url`; leaving closes every connection.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        name: str = "Simulated",
        behaviour: Behaviour | None = None,
        behaviours: dict[str, Behaviour] | None = None,
        keep_bodies: bool = False,
        keep_headers: bool = False,
    ) -> None:
        self.books = Books()
        self.name = name
        self.keep_bodies = keep_bodies
        self.keep_headers = keep_headers
        self.heads: dict[bytes, Head] = {}
        self.connections: set[Connection] = set()
        self._host, self._port = host, port
        self._default = Profile(behaviour or Behaviour())
        self._models = {model: Profile(own) for model, own in (behaviours or {}).items()}
        self._changed: dict[tuple[str, str], Profile] = {}
        self._server: asyncio.Server | None = None
        self._id_start = f"chatcmpl-{secrets.token_hex(4)}"
        self._decode = msgspec.json.Decoder(Body).decode

    @property
    def url(self) -> str:
        """The address, with the port that the kernel gave."""
        return f"http://{self._host}:{self._port}"

    async def up(self) -> None:
        """Listens, on the same port as before if there was one."""
        if self._server is None:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(lambda: Connection(self), self._host, self._port, backlog=4096)
            self._port = self._server.sockets[0].getsockname()[1]

    async def down(self) -> None:
        """Refuses connections from now on and resets the open ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self.connections):
            connection.abort()
        await self.books.wait_for(lambda books: books.open_connections == 0)

    async def __aenter__(self) -> Self:
        await self.up()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.down()

    async def wait_for(self, predicate: Callable[[Books], bool], timeout_s: float = 5.0) -> None:
        """Returns once `predicate(books)` is true. Raises TimeoutError."""
        await self.books.wait_for(predicate, timeout_s)

    def set_behaviour(self, behaviour: Behaviour, model: str | None = None) -> None:
        """From the next request on; None: for models without one of their own."""
        self._changed.clear()
        if model is None:
            self._default = Profile(behaviour)
        else:
            self._models[model] = Profile(behaviour)

    def read_ask(self, request: Request) -> tuple[Ask, Profile]:
        """What is asked and how to answer. Raises msgspec.MsgspecError."""
        body: Body = self._decode(request.body)
        profile = self._models.get(body.model, self._default)
        if body.metadata is not None and body.metadata.sim:
            profile = self._changed_profile(body.model, profile, body.metadata.sim)
        begun = 0
        if (prefill := body.prefill()) is not None:
            if profile.behaviour.prefill == "refused":
                profile = self._changed_profile(body.model, profile, REFUSES_PREFILL)
            elif profile.behaviour.prefill == "continues":
                begun = tokens_of(prefill) or 0
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        return Ask(
            model=body.model,
            chat=request.head.path.endswith("/chat/completions"),
            stream=body.stream is True,
            include_usage=body.stream_options is not None and body.stream_options.include_usage is True,
            limit=limit,
            prompt_tokens=(body.text_bytes() + 3) // 4,
            begun=begun,
        ), profile

    def _changed_profile(self, model: str, base: Profile, text: str) -> Profile:
        key = (model, text)
        profile = self._changed.get(key)
        if profile is None:
            if len(self._changed) >= PROFILES_MAX:
                self._changed.clear()
            profile = self._changed[key] = Profile(base.behaviour.changed_by(text))
        return profile

    def new_entry(self, request: Request, ask: Ask) -> Entry:
        sequence = self.books.next_sequence()
        head = request.head
        entry = Entry(
            sequence=sequence,
            model=ask.model,
            answer_id=f"{self._id_start}{sequence:012x}",
            stream=ask.stream,
            prompt_tokens=ask.prompt_tokens,
            started=time.monotonic(),
            headers=head.headers if self.keep_headers else head.shown_headers,
            body=request.body if self.keep_bodies else b"",
        )
        self.books.entries.append(entry)
        return entry

    def answer_other(self, request: Request) -> bytes:
        """Everything but completions."""
        head, close = request.head, request.head.close
        if head.method == "GET" and head.path.endswith("/models"):
            return whole(200, models_body(sorted(self._models), self.name), close=close)
        if head.method == "GET" and head.path == "/health":  # engines have one, and routers of engines wait for it
            return whole(200, b"{}", close=close)
        if head.path == "/sim/books" and head.method == "GET":
            return whole(200, self.books.to_json(), close=close)
        if head.path == "/sim/books" and head.method == "DELETE":
            self.books.clear()
            return whole(200, b"{}", close=close)
        if head.path.startswith("/sim/models/") and head.method == "PUT":
            try:
                behaviour = msgspec.json.decode(request.body, type=Behaviour)
            except msgspec.MsgspecError as error:
                return bad_request(str(error), close=close)
            self.set_behaviour(behaviour, unquote(head.path.removeprefix("/sim/models/")))
            return whole(200, b"{}", close=close)
        return whole(404, b'{"error":{"message":"no such route","type":"not_found_error"}}', close=close)


def bad_request(message: str, *, close: bool) -> bytes:
    body = msgspec.json.encode({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}})
    return whole(400, body, close=close)


class Connection(asyncio.Protocol):
    """One connection: one answer at a time, in the order of the requests."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self._books = provider.books
        self._reader = RequestReader(provider.heads)
        self._delivery: Delivery | None = None
        self._write_paused = False
        self._read_paused = False
        self._requests = 0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by class
        self._provider.connections.add(self)
        self._books.connections += 1
        self._books.open_connections += 1
        self._books.changed()

    def connection_lost(self, exc: Exception | None) -> None:
        self._provider.connections.discard(self)
        self._books.open_connections -= 1
        if self._delivery is not None:
            self._delivery.abandon()
        self._books.changed()

    def abort(self) -> None:
        self._transport.abort()

    def pause_writing(self) -> None:
        self._write_paused = True
        if self._delivery is not None:
            self._delivery.pause()

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._delivery is not None:
            self._delivery.resume()
        self._advance()

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        self._advance()

    def _advance(self) -> None:
        """Serves complete requests until one takes its time or none is left."""
        while self._delivery is None and not self._write_paused and not self._transport.is_closing():
            try:
                request = self._reader.next()
            except BadFraming as error:
                self._transport.write(bad_request(str(error), close=True))
                self._transport.close()
                return
            if request is None:
                if self._reader.takes_continue():
                    self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                break
            self._serve(request)
        self._bound_reading()

    def _bound_reading(self) -> None:
        full = self._delivery is not None and self._reader.buffered_bytes > PIPELINED_BYTES_MAX
        if full != self._read_paused and not self._transport.is_closing():
            self._read_paused = full
            (self._transport.pause_reading if full else self._transport.resume_reading)()

    def _serve(self, request: Request) -> None:
        self._books.requests += 1
        self._requests += 1
        head = request.head
        if head.method != "POST" or not head.path.endswith("/completions"):
            self._write(self._provider.answer_other(request), close=head.close)
            return
        try:
            ask, profile = self._provider.read_ask(request)
        except msgspec.MsgspecError as error:
            self._write(bad_request(str(error), close=head.close), close=head.close)
            return
        if profile.is_plain:
            self._answer_at_once(request, ask, profile)
        elif profile.behaviour.close_after_requests == self._requests:
            self._books.dropped_requests += 1
            self._transport.close()
        else:
            self._start(request, ask, profile)

    def _write(self, data: bytes, *, close: bool) -> None:
        self._transport.write(data)
        if close:
            self._transport.close()
        self._books.changed()

    def _answer_at_once(self, request: Request, ask: Ask, profile: Profile) -> None:
        entry = self._provider.new_entry(request, ask)
        template = profile.template(ask, request.head)
        entry.status = template.status
        entry.prompt_tokens = template.prompt_tokens
        entry.completion_tokens = template.completion_tokens
        entry.cached_tokens = template.cached_tokens
        entry.reasoning_tokens = template.reasoning_tokens
        entry.finished = entry.started
        self._write(entry.answer_id.encode().join(template.parts), close=template.close)

    def _start(self, request: Request, ask: Ask, profile: Profile) -> None:
        entry = self._provider.new_entry(request, ask)
        plan = profile.plan(ask, request.head)
        entry.status = plan.status
        entry.prompt_tokens = plan.prompt_tokens
        entry.cached_tokens = plan.cached_tokens
        entry.reasoning_tokens = plan.reasoning_tokens
        self._delivery = Delivery(self._transport, plan, entry, self._books, self._answered)
        self._books.changed()
        self._delivery.pump()

    def _answered(self) -> None:
        self._delivery = None
        # Not from within the pump that ended, so that pipelined requests cannot recurse.
        asyncio.get_running_loop().call_soon(self._advance)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.provider", description="A simulated OpenAI-compatible provider.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: the kernel's choice, printed")
    parser.add_argument("--name", default="Simulated")
    parser.add_argument("--behaviour", default="", help='"ttft_ms=80;tokens_per_s=40", see bench/behaviour.py')
    parser.add_argument(
        "--model", nargs=2, action="append", default=[], metavar=("NAME", "BEHAVIOUR"), help="a model of its own; repeatable"
    )
    parser.add_argument("--keep-bodies", action="store_true")
    parser.add_argument("--keep-headers", action="store_true")
    return parser.parse_args()


async def serve(arguments: argparse.Namespace) -> None:
    """Runs until SIGTERM or SIGINT. Raises msgspec.ValidationError for a bad behaviour, OSError for a bad address."""
    default = Behaviour().changed_by(arguments.behaviour)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with Provider(
        host=arguments.host,
        port=arguments.port,
        name=arguments.name,
        behaviour=default,
        behaviours={name: default.changed_by(text) for name, text in arguments.model},
        keep_bodies=arguments.keep_bodies,
        keep_headers=arguments.keep_headers,
    ) as provider:
        print(f"ready {provider.url}", flush=True)
        await stopped.wait()


if __name__ == "__main__":
    uvloop.run(serve(parse_arguments()))
