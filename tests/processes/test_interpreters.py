"""Nothing that a caller sends is run: no template, no pickle, no command, by no process of the gateway."""

from __future__ import annotations

import ast
import asyncio
import base64
import pickle
import signal
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import psutil  # type: ignore[import-untyped]
import pytest

import gateway
from bench.provider import Provider
from tests.conftest import MODEL, StartGateway
from tests.money.shop import sim

READS_CODE = {"pickle", "marshal", "shelve", "dill", "yaml", "jinja2", "code", "codeop", "runpy", "imp"}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
STARTS_PROCESSES = {"subprocess", "multiprocessing", "pty"}
SOURCES = sorted(Path(gateway.__file__).parent.rglob("*.py"))


class Touch:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def payloads(canary: Path) -> list[str]:
    return [
        f"{{{{ self.__init__.__globals__['os'].system('touch {canary}') }}}}",
        f"${{jndi:ldap://127.0.0.1/touch {canary}}}",
        f"__import__('os').system('touch {canary}')",
        f"'; touch {canary}; '",
        f"$(touch {canary})",
        f"`touch {canary}`",
        f"| touch {canary}",
        f'!!python/object/apply:os.system ["touch {canary}"]',
        f"<%= system('touch {canary}') %>",
        f"%(asctime)s {{0.__class__}} touch {canary}",
        base64.b64encode(pickle.dumps(Touch(canary))).decode(),
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-2:]))
def test_aut_11_no_module_reads_or_runs_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            for name in names:
                assert name.split(".")[0] not in READS_CODE, (name, node.lineno)
                assert name.split(".")[0] not in STARTS_PROCESSES or "supervisor" in path.parts, (name, node.lineno)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in RUNS_CODE, (node.func.id, node.lineno)


@pytest.mark.system("strace")
async def test_aut_11_no_payload_starts_a_process(start_gateway: StartGateway, provider: Provider, tmp_path: Path) -> None:
    running = start_gateway({"north": f"{provider.url}/v1"})
    management = await asyncio.to_thread(running.create_account, "grace@example.com")
    canary, trace = tmp_path / "canary", tmp_path / "trace"
    health = running.health()
    pids = [health["control"], *health["edges"]]
    watched = [part for pid in pids for part in ("-p", str(pid))]
    watcher = subprocess.Popen(
        ["strace", "-f", "-e", "trace=execve,execveat,fork,vfork", "-o", str(trace), *watched], stderr=subprocess.PIPE
    )
    try:
        assert watcher.stderr is not None
        for _ in pids:
            assert b"attached" in await asyncio.to_thread(watcher.stderr.readline)
        async with aiohttp.ClientSession() as session:
            for payload in payloads(canary):
                await offer(session, running.url, running.key, management["management_key"], payload)
        assert not [child for pid in pids for child in psutil.Process(pid).children(recursive=True)]
    finally:
        watcher.send_signal(signal.SIGINT)
        watcher.communicate()
    assert not [line for line in trace.read_text().splitlines() if "exec" in line or "fork" in line]
    assert not canary.exists()


async def offer(session: aiohttp.ClientSession, url: str, key: str, management_key: str, payload: str) -> None:
    """The payload wherever a caller may write: each is answered, and none by an error of ours."""
    messages = [{"role": "system", "content": payload}, {"role": "user", "content": payload, "name": payload}]
    tool = {"type": "function", "function": {"name": "f", "description": payload, "parameters": {"description": payload}}}
    chat = {"model": MODEL, "messages": messages, **sim(tokens=2)}
    headers = {"X-Title": payload, "HTTP-Referer": payload, "User-Agent": payload, "X-Session-Id": payload[:200]}
    requests: list[tuple[str, str, str, dict[str, Any] | None]] = [
        ("POST", "/api/v1/chat/completions", key, chat),
        ("POST", "/api/v1/chat/completions", key, {**chat, "tools": [tool], "user": payload, "stop": [payload]}),
        ("POST", "/api/v1/chat/completions", key, {**chat, "model": payload}),
        ("POST", "/api/v1/chat/completions", key, {**chat, "plugins": [{"id": payload}], "preset": payload, "transforms": [payload]}),
        ("POST", "/api/v1/chat/completions", key, {**chat, "provider": {"order": [payload], "sort": payload}}),
        ("POST", "/api/v1/completions", key, {"model": MODEL, "prompt": payload}),
        ("POST", "/api/v1/keys", management_key, {"name": payload[:100]}),
        ("GET", "/api/v1/models", key, None),
        ("GET", "/api/v1/generation", key, None),
    ]
    for method, path, secret, body in requests:
        query = {} if body is not None else {"q": payload, "id": payload, "sort": payload}
        async with session.request(
            method, url + path, json=body, params=query, headers={**headers, "Authorization": f"Bearer {secret}"}
        ) as answer:
            await answer.read()
            assert answer.status < 500, (path, payload)
