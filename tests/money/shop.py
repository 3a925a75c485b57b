"""A running gateway whose prices are the test's own, and every place where it says what something cost.

Three providers: `cheap` and `good` are simulated, `raw` speaks what a test writes. Amounts are read as decimal text: no
float stands between what was said and what is compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import aiohttp
import psutil  # type: ignore[import-untyped]

from bench.provider import Provider
from gateway.domain.content_keys import new_key
from gateway.domain.generation import Generation, decode
from tests.conftest import RunningGateway
from tests.edge.stage import HELLO, UNMOVED, Answered, RawProvider, in_order
from tests.provider_caller import Caller, connected

CONTENT_KEY = new_key()
CONTEXT = 131_072
PLAIN = {"prompt": "0.000001", "completion": "0.000002"}
RICH = {
    "prompt": "0.000003",
    "completion": "0.000015",
    "input_cache_read": "0.0000003",
    "input_cache_write": "0.00000375",
    "internal_reasoning": "0.0000011",
    "request": "0.000013",
    "discount": "0.07",
}
TINY = {"prompt": "0.000000000001", "completion": "0.000000000007"}
FREE = {"prompt": "0", "completion": "0"}
TIERED = PLAIN | {"overrides": [{"min_prompt_tokens": 100_000, "prompt": "0.000005", "completion": "0.00001"}]}
TWO: dict[str, Mapping[str, Any]] = {"cheap": PLAIN, "good": {"prompt": "0.000004", "completion": "0.00000533"}}

UNLIMITED = {"free_requests_per_day": 0, "free_requests_per_minute": 0, "free_requests_per_day_credited": 0, "requests_per_minute_max": 0}

# Model -> its endpoints, cheapest first, which is the order in which callers here wish them to be tried.
MODELS: dict[str, dict[str, Mapping[str, Any]]] = {
    "acme/plain": {"good": PLAIN},
    "acme/rich": {"good": RICH},
    "acme/tiny": {"good": TINY},
    "acme/free": {"good": FREE},
    "acme/tiered": {"good": TIERED},
    "acme/raw": {"raw": PLAIN},
    "acme/open": {"good": PLAIN},
    "acme/two": TWO,
    "acme/two-0": TWO,  # for what makes an endpoint rest
    "acme/two-1": TWO,
    "acme/broken": {"cheap": PLAIN, "raw": {"prompt": "0.000002", "completion": "0.000003"}},
}
OPEN = ("acme/open",)  # nobody knows how long their answers get


def nanos(usd: object) -> int:
    """Nanos of an amount that was read as decimal text. Fails when there is a part of a nano."""
    scaled = Decimal(str(usd)) * 10**9
    assert scaled == scaled.to_integral_value(), usd
    return int(scaled)


def exactly(body: bytes | str) -> Any:
    """JSON with its numbers as they are written."""
    return json.loads(body, parse_float=Decimal)


def priced(pricing: Mapping[str, Any], usage: Mapping[str, int], paid: Fraction = Fraction(1)) -> int:
    """Nanos of these counts at these prices, by rational arithmetic from the catalog's own text; `paid`: what an account pays of it."""
    unit = {kind: Fraction(text) for kind, text in pricing.items() if isinstance(text, str)}
    cached, written = usage.get("cached", 0), usage.get("written", 0)
    usd = (
        (usage["prompt"] - cached - written) * unit["prompt"]
        + cached * unit.get("input_cache_read", unit["prompt"])
        + written * unit.get("input_cache_write", unit["prompt"])
        + usage["completion"] * unit["completion"]
        + usage.get("reasoning", 0) * unit.get("internal_reasoning", Fraction(0))
        + unit.get("request", Fraction(0))
    ) * (1 - unit.get("discount", Fraction(0)))
    usd *= paid
    return -(-usd.numerator * 10**9 // usd.denominator)


def render(urls: Mapping[str, str]) -> str:
    """The catalog of MODELS at these providers."""
    providers = [
        {"slug": slug, "name": slug.title(), "base_url": url, "data": {"trains": False, "retains": False}} for slug, url in urls.items()
    ]
    models = [
        {
            "id": model,
            "name": model,
            **({} if model in OPEN else {"context_length": CONTEXT}),
            "endpoints": [
                {
                    "provider": slug,
                    "upstream_model": model.partition("/")[2],
                    **({} if model in OPEN else {"max_completion_tokens": 8192}),
                    "prefill": True,
                    "pricing": dict(pricing),
                }
                for slug, pricing in endpoints.items()
            ],
        }
        for model, endpoints in MODELS.items()
    ]
    return f"providers = {toml(providers)}\nmodels = {toml(models)}\n"


def toml(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {toml(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)  # of texts, numbers and truth: the same in TOML


def sim(**behaviour: object) -> dict[str, Any]:
    """The part of a request that tells a simulated provider how to behave."""
    return {"metadata": {"sim": ";".join(f"{name}={value}" for name, value in behaviour.items())}}


@dataclass
class Account:
    id: str
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


@dataclass
class Shop:
    """One gateway, its providers, and a rich account of its own."""

    gateway: RunningGateway
    raw: RawProvider
    cheap: Provider
    good: Provider
    session: aiohttp.ClientSession
    account: Account

    async def ask(
        self, model: str = "acme/plain", *, stream: bool = False, account: Account | None = None, prompt: str = "", **more: Any
    ) -> Answered:
        """One request, answered whole: a chat, or with `prompt` a completion."""
        said: dict[str, object] = {"prompt": prompt} if prompt else {"messages": HELLO}
        body = {"model": model, "stream": stream, **said, **in_order(MODELS.get(model, {}), more), **more}
        url = f"{self.gateway.url}/api/v1/{'completions' if prompt else 'chat/completions'}"
        async with self.session.post(url, json=body, headers=(account or self.account).headers) as answer:
            return Answered(answer.status, answer.headers, await answer.read())

    @contextlib.asynccontextmanager
    async def asking(self, model: str, account: Account | None = None, **more: Any) -> AsyncIterator[Caller]:
        """A raw connection on which was asked, to be left at will."""
        key = f"Authorization: Bearer {(account or self.account).key}\r\n"
        async with connected(self.gateway) as caller:
            body = {"model": model, "messages": HELLO, **in_order(MODELS.get(model, {}), more), **more}
            caller.send(body, "/api/v1/chat/completions", key)
            yield caller

    @property
    def edge(self) -> psutil.Process:
        return self.gateway.edge

    async def new_account(self, email: str, usd: str) -> Account:
        made = await asyncio.to_thread(self.gateway.create_account, email, usd)
        return Account(made["account_id"], made["key"])

    async def new_key(self, account: Account, *options: str) -> Account:
        """Another key of the account."""
        made = await asyncio.to_thread(self.gateway.admin, "key", "create", "--account", account.id, "--name", "limited", *options)
        return Account(account.id, made["key"])

    async def add(self, account: Account, usd: str) -> None:
        await asyncio.to_thread(self.gateway.admin, "credits", "add", "--account", account.id, "--usd", usd)

    async def get(self, path: str, account: Account | None = None) -> Any:
        """`data` of one of our own routes, its numbers as written; None for a 404."""
        async with self.session.get(f"{self.gateway.url}/api/v1/{path}", headers=(account or self.account).headers) as answer:
            body = await answer.text()
            assert answer.status in (200, 404), body
            return exactly(body)["data"] if answer.status == 200 else None

    async def generation(self, generation_id: str, account: Account | None = None) -> dict[str, Any]:
        """The record as callers read it, waited for."""
        async with asyncio.timeout(10.0):
            while (found := await self.get(f"generation?id={generation_id}", account)) is None:
                await asyncio.sleep(0.05)
        row: dict[str, Any] = found
        return row

    async def record(self, generation_id: str) -> Generation:
        """The record as the store keeps it, waited for."""
        await self.generation(generation_id)
        return stored(self.gateway)[generation_id]

    async def used(self, account: Account | None = None) -> int:
        """Nanos that /credits says were used."""
        return nanos((await self.get("credits", account))["total_usage"])

    async def until_used(self, expected: int, account: Account | None = None) -> None:
        """Until /credits says that so many nanos were used: bookkeeping comes a moment after the answer."""
        async with asyncio.timeout(10.0):
            while await self.used(account) != expected:
                await asyncio.sleep(0.05)

    async def verify(self) -> dict[str, Any]:
        """`gateway ledger verify`; fails when it does not find everything in order."""
        return await asyncio.to_thread(self.gateway.admin, "ledger", "verify")


def stored(gateway: RunningGateway) -> dict[str, Generation]:
    """All records in the store."""
    with contextlib.closing(sqlite3.connect(f"file:{gateway.folder}/gateway.db?mode=ro", uri=True)) as db:
        return {row[0]: decode(row[1]) for row in db.execute("SELECT id, record FROM generations")}


def log_prompts(gateway: RunningGateway, account_id: str) -> None:
    """Switches it on in the store itself: for an account none of whose keys an edge knows yet."""
    with contextlib.closing(sqlite3.connect(gateway.folder / "gateway.db", timeout=10.0, isolation_level=None)) as db:
        db.execute("INSERT OR REPLACE INTO account_rules (account_id, rules) VALUES (?, '{\"log_prompts\":true}')", (account_id,))


def stored_count(gateway: RunningGateway) -> int:
    """How many."""
    with contextlib.closing(sqlite3.connect(f"file:{gateway.folder}/gateway.db?mode=ro", uri=True)) as db:
        return int(db.execute("SELECT COUNT(*) FROM generations").fetchone()[0])


@contextlib.asynccontextmanager
async def opened(
    folder: Path, *, settings: Mapping[str, Any] | None = None, workers: int = 1, environ: Mapping[str, str] | None = None
) -> AsyncIterator[Shop]:
    """A ready Shop."""
    async with contextlib.AsyncExitStack() as stack:
        raw = await stack.enter_async_context(RawProvider())
        cheap = await stack.enter_async_context(Provider(name="Cheap"))
        good = await stack.enter_async_context(Provider(name="Good"))
        catalog = render({"raw": raw.url, "cheap": f"{cheap.url}/v1", "good": f"{good.url}/v1"})
        gateway = RunningGateway(
            folder / "g",
            catalog,
            settings={"routing": UNMOVED, "limits": UNLIMITED, **(settings or {})},
            workers=workers,
            environ={"GATEWAY_CONTENT_KEY": CONTENT_KEY, **(environ or {})},  # without one no account's prompts are kept, or cost less
        )
        stack.push_async_callback(asyncio.to_thread, gateway.close)
        await asyncio.to_thread(gateway.start)
        session = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=30.0))
        )
        made = await asyncio.to_thread(gateway.create_account)
        yield Shop(gateway, raw, cheap, good, session, Account(made["account_id"], made["key"]))
