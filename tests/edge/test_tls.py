"""A provider that cannot prove who it is gets nothing, not even the request's first byte (UPS-12)."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ssl
import warnings
from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio
import trustme

from bench.provider import Provider
from tests.conftest import RunningGateway, render_catalog
from tests.edge.stage import HELLO, RawCall, RawProvider, completion, plain

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRET = "sk-provider-0123456789abcdef"
CODES = {"hangs up": ("connect_failed",), "old protocol": ("tls_failed", "connect_failed")}  # the latter may just hang up
KINDS = ("expired", "not yet", "wrong host", "self-signed", "old protocol", "no TLS", "hangs up")


class Plaintext:
    """Listens without TLS, and keeps what it is sent; `answer` is all it says."""

    def __init__(self, answer: bytes) -> None:
        self.received = b""
        self._answer = answer
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Plaintext:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            self.received += await reader.read(65536)
            writer.write(self._answer)
        writer.close()


def context(certificate: trustme.LeafCert, *, old: bool = False) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(made)
    if old:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            made.set_ciphers("ALL:@SECLEVEL=0")
            made.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
            made.maximum_version = ssl.TLSVersion.TLSv1_1
    return made


class Site:
    """One gateway with a provider of each kind."""

    def __init__(self) -> None:
        self.tls: dict[str, RawProvider] = {}
        self.plain: dict[str, Plaintext] = {}
        self.good: RawProvider
        self.gateway: RunningGateway
        self.session: aiohttp.ClientSession

    async def ask(self, model: str, *, stream: bool = False) -> tuple[int, bytes, str]:
        """Status, body and generation id."""
        body = {"model": model, "messages": HELLO, "stream": stream}
        headers = {"Authorization": f"Bearer {self.gateway.key}"}
        async with self.session.post(f"{self.gateway.url}/api/v1/chat/completions", json=body, headers=headers) as answer:
            return answer.status, await answer.read(), answer.headers["X-Generation-Id"]


async def _answering(call: RawCall) -> None:
    call.keep = True
    await call.write(plain(completion()))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("tls")
    authority, stranger = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(folder / "authority.pem")
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    good = authority.issue_cert("localhost")
    contexts = {
        "good": context(good),
        "expired": context(authority.issue_cert("localhost", not_before=now - 9 * day, not_after=now - day)),
        "not yet": context(authority.issue_cert("localhost", not_before=now + day, not_after=now + 9 * day)),
        "wrong host": context(authority.issue_cert("elsewhere.example")),
        "self-signed": context(stranger.issue_cert("localhost")),
        "old protocol": context(good, old=True),
    }
    site = Site()
    async with contextlib.AsyncExitStack() as opened:
        for kind, made in contexts.items():
            site.tls[kind] = await opened.enter_async_context(RawProvider(tls=made))
            site.tls[kind].script = _answering
        site.good = site.tls.pop("good")
        for kind, answer in (("no TLS", plain(completion())), ("hangs up", b"")):
            site.plain[kind] = await opened.enter_async_context(Plaintext(answer))
        healthy = await opened.enter_async_context(Provider())
        ports = {kind: bad.port for kind, bad in site.tls.items()} | {kind: bad.port for kind, bad in site.plain.items()}
        ports["good"] = site.good.port
        urls = {kind.replace(" ", "-").lower(): f"https://localhost:{port}/v1" for kind, port in ports.items()}
        models = {f"tls/{slug}": (slug,) for slug in urls} | {f"tls/{slug}-then-healthy": (slug, "healthy") for slug in urls}
        text = render_catalog({**urls, "healthy": f"{healthy.url}/v1"}, models)
        text = text.replace('base_url = "https:', 'api_key_env = "TLS_SECRET"\nbase_url = "https:')
        environ = {"SSL_CERT_FILE": str(folder / "authority.pem"), "TLS_SECRET": SECRET}
        site.gateway = RunningGateway(folder / "g", text, environ=environ)
        opened.push_async_callback(asyncio.to_thread, site.gateway.close)
        await asyncio.to_thread(site.gateway.start)
        await asyncio.to_thread(site.gateway.create_account)
        site.session = await opened.enter_async_context(aiohttp.ClientSession())
        yield site


async def test_ups_12_a_good_certificate_of_a_given_authority_is_taken_and_its_connection_kept(site: Site) -> None:
    for _ in range(5):
        assert (await site.ask("tls/good"))[0] == 200
    assert (len(site.good.calls), site.good.connections) == (5, 1)
    assert f"Authorization: Bearer {SECRET}\r\n".encode() in site.good.calls[0].head


@pytest.mark.parametrize("kind", KINDS)
async def test_ups_12_without_proof_nothing_is_sent(site: Site, kind: str) -> None:
    slug = kind.replace(" ", "-").lower()
    for stream in (False, True):
        status, body, generation = await site.ask(f"tls/{slug}", stream=stream)
        assert status == 502
        code = (await asyncio.to_thread(site.gateway.logged, "exchange", generation=generation))["error"]
        assert code in CODES.get(kind, ("tls_failed",))
        assert SECRET not in body.decode()
        status, body, _ = await site.ask(f"tls/{slug}-then-healthy", stream=stream)
        assert status == 200 and b'"Healthy"' in body
    if kind in site.tls:
        assert site.tls[kind].calls == []
    else:
        received = site.plain[kind].received
        assert received[:2] == b"\x16\x03"  # a TLS handshake
        assert SECRET.encode() not in received and b"POST" not in received
