"""The providers of the current catalog as this edge reaches them: pool, credential, and the request head made once."""

from __future__ import annotations

import asyncio
import os
import ssl
from urllib.parse import urlsplit

from gateway import __version__
from gateway.config import provider_secret
from gateway.domain.catalog import Catalog, Endpoint, Provider
from gateway.edge.resolver import Resolver
from gateway.edge.telemetry import Counter, Telemetry
from gateway.edge.upstream import Origin, Pool
from gateway.wire.dialect import DIALECTS
from gateway.wire.envelope import Kind


class Upstream:
    """One provider as this edge calls it."""

    __slots__ = ("_heads", "dropped_events", "pool", "provider", "secret", "stream_options")

    def __init__(self, provider: Provider, secret: str, pool: Pool, dropped_events: Counter) -> None:
        self.provider = provider
        self.secret = secret
        self.pool = pool
        self.dropped_events = dropped_events
        self.stream_options = DIALECTS[provider.dialect].stream_options
        self._heads = {
            (kind, stream): _head(provider, secret, kind, stream=stream) for kind in ("chat", "text") for stream in (True, False)
        }

    def __repr__(self) -> str:
        return f"<Upstream {self.provider.slug} {self.pool!r}>"

    def request(self, kind: Kind, body: bytes, *, stream: bool) -> bytes:
        """Head and body. Nothing of the caller's own headers is in it."""
        return b"%b%d\r\n\r\n%b" % (self._heads[kind, stream], len(body), body)


class Providers:
    """Upstreams by slug, replaced when the catalog is. Pools live on where the origin stays the same."""

    def __init__(self, *, telemetry: Telemetry, calls_max: int) -> None:
        self._telemetry = telemetry
        self._calls_max = calls_max
        self._resolver = Resolver(self._on_addresses_changed)
        self._tls: ssl.SSLContext | None = None
        self._upstreams: dict[str, Upstream] = {}
        self._pools: dict[tuple[str, str, int, bool], Pool] = {}
        self._retired: list[Pool] = []

    def of(self, endpoint: Endpoint) -> Upstream | None:
        """The upstream of an endpoint; None while its credential is missing."""
        return self._upstreams.get(endpoint.provider)

    def calls(self) -> dict[tuple[str, ...], float]:
        """Calls under way by provider."""
        return {(slug,): upstream.pool.calls for slug, upstream in self._upstreams.items()}

    def update(self, catalog: Catalog) -> None:
        """Take over a new catalog: credentials are read again, pools of vanished providers run dry."""
        upstreams: dict[str, Upstream] = {}
        used: set[tuple[str, str, int, bool]] = set()
        for slug, provider in catalog.providers.items():
            secret = provider_secret(provider, os.environ)
            if secret is None:
                continue
            key = (slug, *_origin_of(provider))
            used.add(key)
            dropped_events = self._telemetry.counter("gateway_dropped_events_total", slug)
            upstreams[slug] = Upstream(provider, secret, self._pools.get(key) or self._open_pool(key), dropped_events)
        for key in [key for key in self._pools if key not in used]:
            self._retired.append(self._pools.pop(key))
        self._upstreams = upstreams

    def _open_pool(self, key: tuple[str, str, int, bool]) -> Pool:
        slug, host, port, tls = key
        if tls and self._tls is None:
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        opened = self._telemetry.counter("gateway_upstream_connections_total", slug)
        pool = Pool(
            Origin(host, port, tls=tls),
            resolver=self._resolver,
            tls=self._tls,
            calls_max=self._calls_max,
            known_heads=True,
            on_connected=opened.add,
        )
        self._pools[key] = pool
        return pool

    def sweep(self) -> None:
        for pool in self._pools.values():
            pool.sweep()
        for pool in self._retired:
            pool.sweep()
            pool.retire()
        self._retired = [pool for pool in self._retired if pool.in_use]

    def _on_addresses_changed(self, host: str) -> None:
        for (_, pool_host, _, _), pool in self._pools.items():
            if pool_host == host:
                pool.retire()

    async def close(self) -> None:
        await asyncio.gather(*(pool.close() for pool in (*self._pools.values(), *self._retired)))
        await self._resolver.close()


def _origin_of(provider: Provider) -> tuple[str, int, bool]:
    url = urlsplit(provider.base_url)
    tls = url.scheme == "https"
    assert url.hostname is not None  # checked when the catalog was read
    return url.hostname, url.port or (443 if tls else 80), tls


def _head(provider: Provider, secret: str, kind: Kind, *, stream: bool) -> bytes:
    """A request head up to and with `Content-Length: `."""
    dialect = DIALECTS[provider.dialect]
    url = urlsplit(provider.base_url)
    lines = [
        f"POST {url.path.rstrip('/')}{dialect.chat_path if kind == 'chat' else dialect.text_path} HTTP/1.1",
        f"Host: {url.netloc}",
        f"User-Agent: gateway/{__version__}",
        f"Accept: {'text/event-stream' if stream else 'application/json'}",
        "Accept-Encoding: identity",
        "Content-Type: application/json",
    ]
    if secret:
        lines.append(f"{dialect.auth_header}: {dialect.auth_value % secret}")
    lines.extend(f"{name}: {value}" for name, value in provider.headers.items())
    return ("\r\n".join(lines) + "\r\nContent-Length: ").encode()
