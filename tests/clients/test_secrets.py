"""What callers and people prove themselves with is nowhere but with them: not on disk, not in logs, metrics or errors."""

from __future__ import annotations

import secrets
from pathlib import Path

import requests

from tests.conftest import RunningGateway, StartGateway


def test_AUT_02_secrets_never_reach_disk_logs_metrics_or_errors(start_gateway: StartGateway) -> None:
    gateway = start_gateway({"north": "http://127.0.0.1:9/v1"})
    account = gateway.create_account("eve@example.com")
    password, wrong, made_up = (f"canary-{secrets.token_hex(12)}" for _ in range(3))
    credentials = {"email": "grace@example.com", "password": password}
    api, answers = f"{gateway.url}/api/v1", []
    with requests.Session() as http:

        def ask(method: str, path: str, **sent: object) -> requests.Response:
            answer = http.request(method, api + path, timeout=10, **sent)  # type: ignore[arg-type]
            answers.append(answer.text)
            return answer

        ask("POST", "/account", json=credentials)
        ask("POST", "/session", json={**credentials, "password": wrong})
        signed_in = ask("POST", "/session", json=credentials)
        cookie = signed_in.headers["Set-Cookie"].partition(";")[0]
        headers = {"Cookie": cookie, "X-CSRF-Token": signed_in.json()["data"]["csrf_token"]}
        own = ask("POST", "/keys", json={"name": "x"}, headers={**headers, "Idempotency-Key": "once"}).json()["key"]
        code = ask("POST", "/auth/keys/code", json={"callback_url": "https://app.example"}, headers=headers).json()["data"]["id"]
        taken = ask("POST", "/auth/keys", json={"code": code}).json()["key"]
        shown = len(answers)
        ask("POST", "/auth/keys", json={"code": code})
        for secret in (own, taken, account["management_key"], made_up):
            for path in ("/keys", "/key", "/credits", "/activity?date=x"):
                ask("GET", path, headers={"Authorization": f"Bearer {secret}"})
                ask("GET", path, headers={"x-api-key": secret})
        ask("GET", "/session", headers={"Cookie": "__Host-session=" + made_up})
        ask("POST", "/keys", data=made_up, headers=headers)
    canaries = [password, wrong, made_up, cookie.partition("=")[2], own, taken, code, account["key"], account["management_key"]]
    metrics = gateway.metrics()
    gateway.stop()
    places = {"answers": "".join(answers[shown:]), "log": str(gateway.log), "metrics": metrics, **on_disk(gateway)}
    found = [(place, canary[:12]) for place, text in places.items() for canary in canaries if canary in text]
    assert not found
    assert "grace@example.com" in places["gateway.db"]  # the search finds what is there


def on_disk(gateway: RunningGateway) -> dict[str, str]:
    files = [path for path in Path(gateway.folder).rglob("*") if path.is_file()]
    return {path.name: path.read_bytes().decode("latin-1") for path in files}
