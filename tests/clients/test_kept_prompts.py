"""Kept prompts in a running gateway: who is given the key, and what its callers and its operator may switch."""

from __future__ import annotations

import psutil  # type: ignore[import-untyped]
import requests

from gateway.domain.content_keys import new_key
from tests.conftest import StartGateway

VARIABLE = "GATEWAY_CONTENT_KEY"


def test_edges_are_not_given_the_key_and_the_toggle_works_through_them(start_gateway: StartGateway) -> None:
    key = new_key()
    gateway = start_gateway({"north": "http://127.0.0.1:9/v1"}, environ={VARIABLE: key})
    account = gateway.create_account("eve@example.com")
    processes = {pid: psutil.Process(pid).environ() for pid in gateway.processes()}
    edges = set(gateway.health()["edges"])
    assert len(edges) == 1 and len(processes) == 3
    assert {pid for pid, environ in processes.items() if VARIABLE in environ} == processes.keys() - edges
    headers = {"Authorization": f"Bearer {account['management_key']}"}
    changed = requests.patch(f"{gateway.url}/api/v1/privacy", json={"log_prompts": True}, headers=headers, timeout=10)
    assert changed.json()["data"]["log_prompts"] is True
    assert gateway.admin("account", "set", "--account", account["account_id"])["log_prompts"] is True
    content = f"{gateway.url}/api/v1/generation/content"
    assert requests.delete(content, params={"all": "true"}, headers=headers, timeout=10).json() == {"deleted": True, "count": 0}
    assert requests.get(content, params={"id": "gen-1-a"}, headers=headers, timeout=10).status_code == 404
    assert key not in str(gateway.log) and key not in gateway.metrics()
