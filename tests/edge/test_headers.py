"""INP-08, INP-10, AUT-02, AUT-08: what crosses the gateway is what is named here, and nothing that a caller or a provider adds.

The sets below are the published allow-lists: towards providers, towards callers, and past the edge to control.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path

import pytest

from bench.behaviour import Behaviour
from gateway.domain.errors import GatewayError
from gateway.edge.bodies import Bodies
from gateway.edge.caller import CallerConnection
from gateway.edge.heads import RequestHead
from gateway.edge.passage import Passage
from gateway.edge.resolver import Resolver
from gateway.edge.site import Site
from gateway.edge.upstream import Origin, Pool
from gateway.settings import Server
from tests.edge.stage import FIRST, GOOD, HELLO, Stage, behaving, stage_of
from tests.provider_caller import Caller

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROUTE = "/api/v1/chat/completions"
PROVIDER_KEY = "canary-provider-key-5d1f9c2e7a"

TO_PROVIDER = {"host", "user-agent", "accept", "accept-encoding", "content-type", "authorization", "content-length"}
TO_CALLER = {"access-control-allow-origin", "access-control-expose-headers", "content-type", "x-content-type-options", "x-generation-id"}
TO_CALLER_WHOLE = TO_CALLER | {"content-length"}
TO_CALLER_STREAM = TO_CALLER | {"transfer-encoding", "cache-control", "x-accel-buffering"}

FROM_CALLER = (
    "Connection: X-Listed, keep-alive",
    "X-Listed: canary",
    "Keep-Alive: timeout=canary",
    "TE: trailers",
    "Trailer: canary",
    "Proxy-Authorization: Basic canary",
    "Proxy-Connection: keep-alive",
    "Proxy: http://canary",
    "Cookie: session=canary",
    "X-Forwarded-For: 10.9.8.7",
    "X-Forwarded-Host: canary",
    "X-Forwarded-Proto: https",
    "Forwarded: for=10.9.8.7",
    "X-Real-IP: 10.9.8.7",
    "X-Gateway-Caller: 10.9.8.7",
    "Via: 1.1 canary",
    "Referer: http://canary/",
    "HTTP-Referer: http://canary/",
    "X-Title: canary",
    "X-Request-Id: canary",
    "Idempotency-Key: canary",
    "OpenAI-Organization: canary",
    "X-API-Key: canary",
    "api-key: canary",
    "Accept: canary/canary",
    "Accept-Encoding: gzip, br",
    "User-Agent: canary",
    "Range: bytes=0-1",
    "If-None-Match: canary",
)
FROM_PROVIDER = {
    "Set-Cookie": "session=canary",
    "Server": "canary",
    "Via": "1.1 canary",
    "Alt-Svc": 'h3="canary:443"',
    "Location": "http://canary/",
    "X-Powered-By": "canary",
    "Strict-Transport-Security": "max-age=1",
    "Access-Control-Allow-Credentials": "true",
    "Access-Control-Allow-Origin": "http://canary",
    "X-Generation-Id": "canary",
    "OpenAI-Organization": "canary",
    "X-RateLimit-Remaining-Requests": "9471",
    "Proxy-Authenticate": "Basic",
    "WWW-Authenticate": "Bearer",
    "Keep-Alive": "timeout=9471",
    "Refresh": "0; url=http://canary/",
    "Link": "<http://canary/>",
}


ERRORS = (301, 302, 307, 400, 401, 429, 500, 503)
stage = stage_of(
    models={f"acme/answers-{status}": ("first",) for status in ERRORS},  # some say when to come back: then nobody is sent there
    catalog=lambda text: text.replace('slug = "first"\n', 'slug = "first"\napi_key_env = "CANARY_KEY"\n'),
    environ={"CANARY_KEY": PROVIDER_KEY},
)


def body(model: object = FIRST, **fields: object) -> bytes:
    return json.dumps({"model": model, "max_tokens": 2, "messages": HELLO, **fields}).encode()


def request(stage: Stage, data: bytes, *lines: str, target: str = ROUTE) -> bytes:
    key = f"Authorization: Bearer {stage.gateway.key}"
    head = "\r\n".join((f"POST {target} HTTP/1.1", "Host: gw", key, f"Content-Length: {len(data)}", *lines, "", ""))
    return head.encode("latin-1") + data


async def logged_so_far(stage: Stage) -> int:
    """The number of log lines once everything that happened so far is among them."""
    generation = (await stage.ask(GOOD)).headers["X-Generation-Id"]
    last = await asyncio.to_thread(stage.exchange, generation)
    return stage.gateway.log.index(last) + 1


async def logged_since(stage: Stage, begun: int) -> list[str]:
    """Records of requests since the `begun`-th log line, as text."""
    ended = await logged_so_far(stage) - 1
    return [json.dumps(line) for line in stage.gateway.log[begun:ended] if line["event"] in ("exchange", "refused")]


# INP-10


@pytest.mark.parametrize("stream", [False, True])
async def test_inp_10_nothing_of_a_callers_headers_reaches_a_provider(stage: Stage, stream: bool) -> None:
    async with asyncio.timeout(5.0), stage.connected() as caller:
        caller.writer.write(request(stage, body(stream=stream), *FROM_CALLER))
        assert (await caller.answer())[0] == 200
    entry = stage.first.books.entries[-1]
    names = [name.lower() for name, _ in entry.headers]
    assert sorted(names) == sorted(TO_PROVIDER)
    headers = {name.lower(): value for name, value in entry.headers}
    assert headers["authorization"] == f"Bearer {PROVIDER_KEY}"
    assert "canary" not in json.dumps(headers).replace(PROVIDER_KEY, "")
    assert headers["host"] == stage.first.url.removeprefix("http://") and headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("stream", [False, True])
async def test_inp_10_nothing_of_a_providers_headers_reaches_a_caller(stage: Stage, stream: bool) -> None:
    with behaving(stage.first, Behaviour(headers=FROM_PROVIDER)):
        async with asyncio.timeout(5.0), stage.connected() as caller:
            caller.writer.write(request(stage, body(stream=stream)))
            status, headers, data = await caller.answer()
    assert status == 200 and set(headers) == (TO_CALLER_STREAM if stream else TO_CALLER_WHOLE)
    assert headers["access-control-allow-origin"] == "*" and headers["x-generation-id"].startswith("gen-")
    assert "canary" not in json.dumps(headers) and b"canary" not in data


@pytest.mark.parametrize("status", ERRORS)
async def test_inp_10_nothing_of_a_providers_error_headers_reaches_a_caller(stage: Stage, status: int) -> None:
    with behaving(stage.first, Behaviour(status=status, headers=FROM_PROVIDER, retry_after="7")):
        async with asyncio.timeout(5.0), stage.connected() as caller:
            caller.writer.write(request(stage, body(f"acme/answers-{status}")))
            answered, headers, _ = await caller.answer()
    assert answered >= 400 and set(headers) - {"retry-after"} == TO_CALLER_WHOLE
    assert "canary" not in json.dumps(headers)


SITE = Site(Server(trusted_proxies=("10.0.0.0/8",)))


class PassageDoor:
    """Lets every request pass to what listens at a unix socket."""

    draining = False

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.bodies = Bodies(1 << 20)

    def open_exchange(self, caller: CallerConnection, head: RequestHead) -> Passage:
        return Passage(self._pool, caller, head, SITE.caller(head.headers, caller.peer), lambda status: None)

    def on_opened(self, caller: CallerConnection) -> None: ...
    def on_closed(self, caller: CallerConnection) -> None: ...
    def on_refused(self, error: GatewayError) -> None: ...


async def test_inp_10_controls_answers_keep_their_lengths(stage: Stage) -> None:
    """One after another on a kept connection, each of another length than the one before."""
    async with stage.connected() as caller:
        for query in ("", "?q=nothing", "?limit=1", "?limit=2", "", "?q=nothing"):
            caller.send({}, f"/api/v1/models{query}", method="GET")
            status, headers, body = await asyncio.wait_for(caller.answer(), 10.0)
            assert (status, int(headers["content-length"])) == (200, len(body))
            json.loads(body)


async def test_inp_10_control_is_told_the_callers_address_by_the_edge_alone(tmp_path: Path) -> None:
    heads: list[bytes] = []

    async def control(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        answer = (b"HTTP/1.1 200 OK", b"Content-Length: 2", b"Server: canary", b"Connection: X-Listed", b"X-Listed: a", b"Set-Cookie: a=b")
        writer.write(b"\r\n".join((*answer, b"Keep-Alive: timeout=1", b"Proxy-Authenticate: Basic", b"", b"{}")))
        await reader.read()
        writer.close()

    socket = str(tmp_path / "control.sock")
    pool = Pool(Origin(unix_path=socket), resolver=Resolver(), tls=None, calls_max=8)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(5.0), await asyncio.start_unix_server(control, socket):
        edge = await loop.create_server(lambda: CallerConnection(PassageDoor(pool), Server()), "127.0.0.1", 0)
        async with edge:
            reader, writer = await asyncio.open_connection(*edge.sockets[0].getsockname())
            caller = Caller(reader, writer)
            lines = ("GET /api/v1/keys?a=b HTTP/1.1", "Host: gw", "Authorization: Bearer mine", *FROM_CALLER, "", "")
            writer.write("\r\n".join(lines).encode())
            status, headers, data = await caller.answer()
            writer.close()
            await pool.close()
    assert (status, data) == (200, b"{}")
    assert headers == {"content-length": "2", "set-cookie": "a=b"}
    sent = dict(line.split(": ", 1) for line in heads[0].decode().split("\r\n")[1:] if line)
    assert sent.pop("X-Gateway-Caller") == "127.0.0.1" and sent["Authorization"] == "Bearer mine" and sent["Cookie"] == "session=canary"
    claimed = ("connection", "x-listed", "keep-alive", "te", "trailer", "proxy", "x-forwarded", "forwarded", "x-real-ip", "x-gateway")
    assert [name for name in sent if name.lower().startswith(claimed)] == []


# INP-08

HOSTILE = 'a\r\nX-Injected: 1\r\n\r\nGET / HTTP/1.1\r\n\x00\x1b[2J\x1b]0;x\x07\x7f\x85\u2028" \\ {"event": "exchange"}\n'


@pytest.mark.parametrize("field", ["user", "metadata", "session_id", "content", "model", "models"])
async def test_inp_08_hostile_text_in_a_body_stays_text(stage: Stage, field: str) -> None:
    values: dict[str, object] = {
        "metadata": {"x": HOSTILE},
        "content": HOSTILE,
        "models": [FIRST, HOSTILE],
    }
    begun = await logged_so_far(stage)
    stage.first.books.clear()
    value = values.get(field, HOSTILE)
    data = body(messages=[{"role": "user", "content": value}]) if field == "content" else body(**{field: value})
    async with asyncio.timeout(5.0), stage.connected() as caller:
        caller.writer.write(request(stage, data))
        status, headers, answer = await caller.answer()
    assert status == (400 if field in ("model", "models") else 200)
    assert "x-injected" not in headers and (status == 200 or b"Injected" not in answer)
    for entry in stage.first.books.entries:
        assert sorted(name.lower() for name, _ in entry.headers) == sorted(TO_PROVIDER)
    lines = await logged_since(stage, begun)
    assert len(lines) == 1 and "Injected" not in lines[0]


@pytest.mark.parametrize("name", ["X-Title", "HTTP-Referer", "Referer", "X-Request-Id", "User-Agent", "Idempotency-Key", "X-Session-Id"])
async def test_inp_08_hostile_text_in_headers_is_refused_or_stays_outside(stage: Stage, name: str) -> None:
    begun = await logged_so_far(stage)
    values = {"a\rb": 400, "a\nX-Injected: 1": 400, "a\x00b": 400, "\x1b[2J": 400, "t\u00e9\tx \u0085": 200}
    for value, expected in values.items():
        stage.first.books.clear()
        async with asyncio.timeout(5.0), stage.connected() as caller:
            caller.writer.write(request(stage, body(), f"{name}: {value}"))
            status, headers, answer = await caller.answer()
        assert status == expected and "x-injected" not in headers and b"Injected" not in answer
        assert len(stage.first.books.entries) == (status == 200)
        for entry in stage.first.books.entries:
            assert sorted(name.lower() for name, _ in entry.headers) == sorted(TO_PROVIDER)
    lines = await logged_since(stage, begun)
    assert len(lines) == len(values) and not [line for line in lines if "Injected" in line or "\\u001b" in line]


async def test_inp_08_hostile_text_of_a_provider_stays_text(stage: Stage) -> None:
    begun = await logged_so_far(stage)
    with behaving(stage.first, Behaviour(status=400, error_message=HOSTILE, error_code=HOSTILE)):
        async with asyncio.timeout(5.0), stage.connected() as caller:
            caller.writer.write(request(stage, body()))
            status, headers, answer = await caller.answer()
    assert status == 400 and "x-injected" not in headers and json.loads(answer)["error"]["code"] == 400
    assert len(await logged_since(stage, begun)) == 1


# AUT-02


async def test_aut_02_secrets_stay_out_of_logs_metrics_errors_and_files(stage: Stage) -> None:
    key = stage.gateway.key
    told: list[bytes] = []

    async def ask(data: bytes, *lines: str, target: str = ROUTE) -> None:
        async with asyncio.timeout(5.0), stage.connected() as caller:
            caller.writer.write(request(stage, data, *lines, target=target))
            caller.writer.write_eof()
            told.append(await caller.reader.read())

    await ask(body())
    echo = f"Incorrect API key provided: Authorization: Bearer {PROVIDER_KEY}"
    for status in (302, 400, 401, 403, 404, 408, 422, 429, 500, 503):
        with behaving(stage.first, Behaviour(status=status, error_message=echo, error_code=PROVIDER_KEY, headers={"X-Echo": PROVIDER_KEY})):
            await ask(body())
            await ask(body(stream=True))
    for behaviour in (
        Behaviour(error_body=True, error_message=echo),
        Behaviour(error_event_after=0, error_message=echo),
        Behaviour(error_event_after=2, error_message=echo),
        Behaviour(refuse=True),
        Behaviour(html=True),
        Behaviour(raw=(b"HTTP/1.1 500 Authorization: Bearer %b\r\n\r\n" % PROVIDER_KEY.encode(),)),
        Behaviour(raw=(b"Authorization: Bearer %b\r\n\r\n" % PROVIDER_KEY.encode(),)),
    ):
        with behaving(stage.first, behaviour):
            await ask(body())
            async with asyncio.timeout(5.0), stage.connected() as caller:
                caller.writer.write(request(stage, body(stream=True), "Connection: close"))
                told.append(await caller.reader.read())
    await ask(body(model=key))
    await ask(body(user=key, metadata={"key": key}))
    await ask(body(max_tokens=key))
    await ask(key.encode())
    await ask(b"{}", f"X: a\rb{key}")
    await ask(b"{}", f"X-{'a' * 9000}: {key}")
    await ask(b"{}", target=f"{ROUTE}?key={key}")
    await ask(b"{}", target=f"/api/v1/keys/{key}?api_key={key}")
    await ask(b"{}", target=f"http://{key}@gw/")
    await logged_since(stage, 0)  # all of it is logged
    public = b"".join(told).decode("latin-1") + json.dumps(stage.gateway.log) + stage.gateway.metrics() + "".join(stage.gateway.noise)
    stored = b"".join(path.read_bytes() for path in stage.gateway.folder.rglob("*") if path.is_file()).decode("latin-1")
    assert len(told) > 40
    for secret in (key, key[20:40], PROVIDER_KEY):
        assert secret not in public
        assert secret not in stored


# AUT-08


def mutations() -> list[tuple[str, str, str]]:
    """(method, target, header line): ways to the chat route that a router, a proxy or an operator's rule might read differently."""
    targets = [
        ROUTE,
        "/v1/chat/completions",
        "/api/v1/completions",
        "/api//v1/chat/completions",
        "//api/v1/chat/completions",
        "/api/v1/chat/completions/",
        "/api/v1/chat/./completions",
        "/api/v1/x/../chat/completions",
        "/x/../api/v1/chat/completions",
        "/api/v1/chat%2fcompletions",
        "/api/v1/%63hat/completions",
        "/API/V1/CHAT/COMPLETIONS",
        "/api/v1/Chat/Completions",
        "/api/v1/chat/completions;a=b",
        "/api/v1/chat/completions?a=/",
        "/api/v1/chat/completions%00",
        "/api/v1/chat/completions%20",
        "/api/v1/chat/completions#x",
        "/api/v1/chat\\completions",
        "/api/v1/chat/completions/../completions",
        "/api/v1/models/../chat/completions",
        "/api/v1/chat/completions/../../models",
        "/./api/v1/chat/completions",
        "/%2e%2e/api/v1/chat/completions",
        "http://localhost/api/v1/chat/completions",
        "/api/v1/chat/completions?key=sk-or-v1-x",
    ]
    lines = [
        "X: y",
        "X-Forwarded-For: 127.0.0.1",
        "X-Forwarded-Host: localhost",
        "X-Original-URL: /api/v1/models",
        "X-Rewrite-URL: /api/v1/models",
        "X-HTTP-Method-Override: GET",
        "Forwarded: for=127.0.0.1;host=localhost",
        "X-Gateway-Caller: 127.0.0.1",
        "X-Forwarded-User: admin",
    ]
    hosts = ["Authorization: Bearer ", "Authorization: Basic Og==", "Authorization: Bearer null", "X-API-Key: ", "Cookie: session=1"]
    every = [("POST", target, line) for target, line in itertools.product(targets, lines)]
    return every + [("POST", target, line) for target, line in itertools.product(targets[:3], hosts)]


async def test_aut_08_no_spelling_of_a_route_needs_no_key(stage: Stage) -> None:
    asked = mutations()
    assert len(asked) >= 200
    stage.good.books.clear()
    data = body(GOOD)
    for number, (method, target, line) in enumerate(asked):
        host = ("gw", "localhost", "127.0.0.1:9464", "openrouter.ai")[number % 4]
        async with asyncio.timeout(5.0), stage.connected() as caller:
            caller.writer.write(
                f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n{line}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
            )
            status, _, answer = await caller.answer()
        assert status in (400, 401, 404, 405), (target, line, status)
        if target.partition("?")[0] in (ROUTE, "/v1/chat/completions", "/api/v1/completions"):
            assert status == 401 and b"error" in answer
    assert not stage.good.books.entries
