"""The JavaScript clients against a running gateway, in node's own test runner. Not part of `make test`: `make test-node`."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from pathlib import Path

import pytest

from bench.answers import text_of
from bench.behaviour import Behaviour
from bench.provider import Provider
from tests.conftest import MODEL, StartGateway

HERE = Path(__file__).parent
TOOL_MODEL = "acme/tools-1"
TOKENS = 16

pytestmark = pytest.mark.node


async def run(*command: str, **environ: str) -> str:
    """What it printed; an assertion that it went well."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=HERE, env={**os.environ, **environ}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    printed, _ = await process.communicate()
    assert process.returncode == 0, printed.decode(errors="replace")
    return printed.decode(errors="replace")


@pytest.mark.timeout(600)
async def test_the_javascript_clients_find_what_they_expect(start_gateway: StartGateway) -> None:
    for program in ("node", "npm"):
        assert shutil.which(program), f"{program} is not installed; node 18 or newer is needed"
    await run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
    behaviours = {"tools-1": Behaviour(tool_call=True, tokens=TOKENS)}
    async with Provider(name="North", behaviour=Behaviour(tokens=TOKENS), behaviours=behaviours) as provider:
        models = {MODEL: ("north",), TOOL_MODEL: ("north",)}
        gateway = await asyncio.to_thread(lambda: start_gateway({"north": f"{provider.url}/v1"}, models=models, workers=2))
        account = await asyncio.to_thread(gateway.create_account, "node@example.com")
        told = await run(
            "node",
            "--test",
            "--test-reporter=tap",
            GATEWAY_URL=gateway.url,
            GATEWAY_KEY=account["key"],
            GATEWAY_MANAGEMENT_KEY=account["management_key"],
            GATEWAY_TEXT=text_of(TOKENS),
        )
        assert re.search(r"^# pass [1-9]", told, re.MULTILINE) and provider.books.entries  # none at all is no failure to node
        assert (await asyncio.to_thread(gateway.admin, "ledger", "verify"))["ok"]
