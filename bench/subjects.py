"""What a bench loads: subjects, each started in front of the simulated provider and pinned to one core.

A subject is fetched into `bench/.peers/` on first use. One that cannot be had raises Unavailable, which says why: it is reported,
never guessed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from bench import envoy, gateway, proxies
from bench.children import ChildFailed
from bench.load import Target

MODEL = "sage-1"
PACED_MODEL = "paced-1"  # the provider answers it slowly: peers drop what they do not know of a body, so the model says it
REQUEST_BYTES = 1024
ALL = ("direct", "envoy", "nginx", "haproxy", "vllm-router", "portkey", "litellm", "gateway")


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What is loaded: where, as whom, and the process whose CPU is counted."""

    name: str
    url: str  # of chat completions
    pid: int
    prefix: str = ""  # of its names of models
    headers: dict[str, str] = {}
    version: str = ""
    streams: bool = True  # False: only its JSON answers are right

    def target(self, *, stream: bool, model: str = MODEL, max_tokens: int = 64, body_bytes: int = REQUEST_BYTES) -> Target:
        body = request_body(self.prefix + model, stream, "", max_tokens, body_bytes)
        return Target(url=self.url, body=body, stream=stream, headers=self.headers)


def request_body(model: str, stream: bool, sim: str, max_tokens: int, body_bytes: int = REQUEST_BYTES) -> bytes:
    """A chat request of `body_bytes` (longer only if its fixed parts are)."""
    body: dict[str, object] = {"model": model, "stream": stream, "max_tokens": max_tokens}
    if stream:
        body["stream_options"] = {"include_usage": True}
    if sim:
        body["metadata"] = {"sim": sim}
    words = "Say what the river does. "
    bare = msgspec.json.encode(body | {"messages": [{"role": "user", "content": ""}]})
    content = (words * (body_bytes // len(words) + 1))[: max(1, body_bytes - len(bare))]
    return msgspec.json.encode(body | {"messages": [{"role": "user", "content": content}]})


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where subjects are started: in front of which provider, on which core, with files in which folder."""

    upstream_url: str
    provider_pid: int
    core: int | None
    folder: Path
    stack: AsyncExitStack  # ends what was started


async def start(name: str, place: Place) -> Subject:
    """Raises Unavailable when it cannot be had, ChildFailed when it does not start."""
    return await STARTERS[name](place)


async def _direct(place: Place) -> Subject:
    return Subject(name="direct", url=place.upstream_url + "/v1/chat/completions", pid=place.provider_pid)


async def _envoy(place: Place) -> Subject:
    try:
        binary = await envoy.ensure_envoy()
    except (ChildFailed, TimeoutError) as error:
        raise proxies.Unavailable(f"envoy: {error}") from error
    at, pid = await place.stack.enter_async_context(envoy.envoy(binary, place.upstream_url, core=place.core, folder=place.folder))
    return Subject(name="envoy", url=at + "/v1/chat/completions", pid=pid, version=envoy.VERSION)


async def _gateway(place: Place) -> Subject:
    return await start_gateway(place, "gateway", gateway.SETTINGS)


async def start_gateway(place: Place, name: str, settings: str) -> Subject:
    """The gateway under this name, with these settings. Raises ChildFailed."""
    folder = place.folder / name
    folder.mkdir()
    running = gateway.gateway(place.upstream_url, core=place.core, folder=folder, settings=settings)
    at, pid, key = await place.stack.enter_async_context(running)
    headers = {"Authorization": f"Bearer {key}"}
    return Subject(name=name, url=at + "/api/v1/chat/completions", pid=pid, prefix=gateway.PREFIX, headers=headers)


def _proxy(name: str) -> Callable[[Place], Awaitable[Subject]]:
    async def started(place: Place) -> Subject:
        folder = place.folder / name
        folder.mkdir()
        proxy = proxies.PROXIES[name]
        program, version = await proxy.fetch()
        at, pid = await place.stack.enter_async_context(proxies.running(proxy, program, place.upstream_url, core=place.core, folder=folder))
        headers = proxy.headers(place.upstream_url)
        return Subject(name=name, url=at + "/v1/chat/completions", pid=pid, headers=headers, version=version)

    return started


STARTERS: dict[str, Callable[[Place], Awaitable[Subject]]] = {
    "direct": _direct,
    "envoy": _envoy,
    "gateway": _gateway,
    **{name: _proxy(name) for name in proxies.PROXIES},
}
