"""What an account allows, in force at every edge as soon as it is said: for all of its keys, and for nobody else's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp

from bench.provider import Provider
from tests.conftest import MODEL, RunningGateway
from tests.processes.test_fleet import Line, a_line_to_each

DATA = {
    "north": "data = { trains = true, retains = true }",
    "south": "data = { trains = false, retains = true }",
    "west": "data = { trains = false, retains = false, zdr = true }",
    "silent": "",
}
PRICES = {"north": "0.000001", "south": "0.000002", "west": "0.000003", "silent": "0"}


def catalog(url: str) -> str:
    parts = [f'[[providers]]\nslug = "{slug}"\nname = "{slug}"\nbase_url = "{url}/v1"\n{data}\n' for slug, data in DATA.items()]
    parts.append(f'[[models]]\nid = "{MODEL}"\nname = "x"\ncontext_length = 131072\n')
    for slug, price in PRICES.items():
        pricing = f'pricing = {{ prompt = "{price}", completion = "{price}" }}'
        parts.append(f'[[models.endpoints]]\nprovider = "{slug}"\nupstream_model = "m"\nmax_completion_tokens = 100\n{pricing}\n')
    return "\n".join(parts)


async def answers(line: Line) -> set[str]:
    """Which providers may serve: each is asked for alone."""
    found = set()
    for slug in DATA:
        status, served = await line.ask(provider={"only": [slug]})
        assert status in (200, 404)
        if status == 200:
            assert served == slug
            found.add(slug)
    return found


CASES: list[tuple[tuple[str, ...], set[str]]] = [
    ((), {"south", "west"}),  # training is off unless it was switched on, and who says nothing is taken to train
    (("--train-paid", "on"), {"north", "south", "west"}),
    (("--train-free", "on"), {"south", "west", "silent"}),
    (("--train-paid", "on", "--train-free", "on", "--zdr", "on"), {"west"}),
    (("--allow", "north,west"), {"west"}),
    (("--train-paid", "on", "--ignore", "south"), {"north", "west"}),
]
OFF = {"--train-paid": "off", "--train-free": "off", "--publish-free": "off", "--zdr": "off", "--allow": "", "--ignore": ""}


async def test_rules_hold_at_every_edge_at_once_and_for_one_account_alone(tmp_path: Path, provider: Provider) -> None:
    gateway = RunningGateway(tmp_path / "gateway", catalog(provider.url), workers=2)
    await asyncio.to_thread(gateway.start)
    try:
        ann = await asyncio.to_thread(gateway.create_account)
        bob = await asyncio.to_thread(gateway.create_account, "bob@example.com")
        second = await asyncio.to_thread(gateway.admin, "key", "create", "--account", ann["account_id"], "--name", "second")
        async with a_line_to_each(gateway, [ann["key"], second["key"], bob["key"]]) as [first, other, bobs]:
            lines = [*first.values(), *other.values()]  # both keys at both edges, and known to them
            for given, expected in CASES:
                wishes = {**OFF, **dict(zip(given[::2], given[1::2], strict=True))}
                words = [word for pair in wishes.items() for word in pair]
                await asyncio.to_thread(gateway.admin, "account", "set", "--account", ann["account_id"], *words)
                for line in lines:
                    assert await answers(line) == expected, given
            for line in bobs.values():
                assert await answers(line) == {"south", "west"}
    finally:
        await asyncio.to_thread(gateway.close)


PATCHES: list[tuple[dict[str, Any], set[str]]] = [
    ({"enable_paid_model_training": True}, {"north", "south", "west"}),
    ({"enforce_zdr": True}, {"west"}),
    ({"enforce_zdr": False, "ignored_providers": ["west"]}, {"north", "south"}),
    ({"allowed_providers": ["west", "south"]}, {"south"}),
]


async def test_what_an_account_itself_says_holds_at_every_edge_within_a_second(tmp_path: Path, provider: Provider) -> None:
    gateway = RunningGateway(tmp_path / "gateway", catalog(provider.url), workers=2)
    await asyncio.to_thread(gateway.start)
    try:
        ann = await asyncio.to_thread(gateway.create_account)
        headers = {"Authorization": f"Bearer {ann['management_key']}"}
        async with a_line_to_each(gateway, [ann["key"]]) as [lines], aiohttp.ClientSession(headers=headers) as manager:
            for patch, expected in PATCHES:
                async with manager.patch(f"{gateway.url}/api/v1/privacy", json=patch) as answer:
                    assert answer.status == 200, await answer.text()
                for line in lines.values():
                    assert await settled(line, expected) == expected, patch
            async with manager.patch(f"{gateway.url}/api/v1/privacy", json={"ignored_providers": ["wset"]}) as answer:
                assert answer.status == 400
                assert "ignored_providers: 'wset'" in (await answer.json())["error"]["message"]
            for line in lines.values():
                assert await answers(line) == PATCHES[-1][1]
    finally:
        await asyncio.to_thread(gateway.close)


async def settled(line: Line, expected: set[str]) -> set[str]:
    """What may serve, as soon as it is as expected; at the latest a second from now."""
    until = asyncio.get_running_loop().time() + 1.0
    while (found := await answers(line)) != expected and asyncio.get_running_loop().time() < until:
        pass
    return found
