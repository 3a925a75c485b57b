"""`/generation/content`: what an account has kept, for its keys alone; its deletion; and the toggle that has it kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openrouter import OpenRouter, errors

from gateway.control.erasure import Erasure
from gateway.domain.content_keys import ContentKey
from gateway.domain.errors import StoreUnavailable
from gateway.domain.generation import AttemptRecord
from gateway.log import Log
from tests.control.api.premises import PASSWORD, Premises, opened, spent
from tests.control.kept import said

PATH = "/api/v1/generation/content"
MESSAGES = [{"role": "user", "content": "ask rivers"}]


def ours(number: int, account: str = "user_ada", **more: Any) -> Any:
    """An exchange from before the premises' now."""
    return said(number, account, "rivers", **more)


async def content(premises: Premises, number: int, secret: str, status: int = 200) -> Any:
    return await premises.ask("GET", f"{PATH}?id={ours(number).generation_id}", secret, status)


async def test_what_is_kept_is_read_with_every_key_of_the_account_and_with_no_other(premises: Premises) -> None:
    await premises.content.add([ours(1)])
    browser = await premises.browser()
    expected = {
        "data": {
            "input": {"messages": MESSAGES},
            "output": {"completion": "answer rivers", "reasoning": None},
            "error": None,
            "truncated": False,
        }
    }
    for secret in (premises.ada, premises.ada_management):
        assert await content(premises, 1, secret) == expected
    assert await browser.ask("GET", f"{PATH}?id={ours(1).generation_id}") == expected
    absent = await content(premises, 2, premises.ada, 404)
    for secret in (premises.eve, premises.eve_management):
        assert await content(premises, 1, secret, 404) == absent
    assert (await premises.ask("GET", f"{PATH}?id={'%00' * 3}", premises.ada, 404)) == absent
    await premises.ask("GET", PATH, premises.ada, 400)
    await premises.ask("GET", f"{PATH}?id={ours(1).generation_id}", None, 401)


async def test_openrouters_own_client_parses_it(premises: Premises) -> None:
    error = {"code": 502, "message": "Provider returned error", "metadata": {"provider_name": "South", "raw": "tired"}}
    events = [{"choices": [{"delta": {"content": "Ri"}}]}, {"choices": [{"delta": {"reasoning": "Hm"}}]}, {"error": error, "choices": []}]
    stream = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    await premises.content.add([ours(1), ours(2, request=b'{"prompt": "Say hi"}', answer=stream, truncated=True)])
    attempts = (
        AttemptRecord(endpoint_id="acme/sage-1@north", provider="north", outcome="throttled", status=429),
        AttemptRecord(endpoint_id="acme/sage-1@south", provider="south", outcome="stream_broken"),
    )
    await premises.journal(spent(premises.ada, 2, id=ours(2).generation_id, attempts=attempts))
    async with OpenRouter(api_key=premises.ada, server_url=str(premises.http.make_url("/api/v1"))) as openrouter:
        plain = (await openrouter.generations.list_generation_content_async(id=ours(1).generation_id)).data
        assert plain.model_dump() == {
            "input": {"messages": MESSAGES}, "output": {"completion": "answer rivers", "reasoning": None}, "error": None,
        }  # fmt: skip
        failed = (await openrouter.generations.list_generation_content_async(id=ours(2).generation_id)).data
        assert failed.model_dump() == {
            "input": {"prompt": "Say hi"},
            "output": {"completion": "Ri", "reasoning": "Hm"},
            "error": {
                "message": "Provider returned error", "provider_name": "South", "raw": "tired", "status": 502,
                "previous_errors": [{"code": 429, "message": "throttled", "provider_name": "North", "raw": None}],
            },
        }  # fmt: skip
        with pytest.raises(errors.NotFoundResponseError):
            await openrouter.generations.list_generation_content_async(id=ours(3).generation_id)


async def test_one_is_deleted_or_all_of_the_account_by_its_owner_alone(premises: Premises) -> None:
    await premises.content.add([*(ours(number) for number in range(5)), ours(9, "user_eve")])
    one = f"{PATH}?id={ours(1).generation_id}"
    absent = await premises.ask("DELETE", f"{PATH}?id={ours(8).generation_id}", premises.eve_management, 404)
    assert await premises.ask("DELETE", one, premises.eve_management, 404) == absent
    await premises.ask("DELETE", one, premises.ada, 403)  # a key for inference reads, and deletes nothing
    assert await premises.ask("DELETE", one, premises.ada_management) == {"deleted": True, "count": 1}
    await premises.ask("DELETE", one, premises.ada_management, 404)
    await content(premises, 1, premises.ada, 404)
    for query in ("", "?all=false", f"?all=true&id={ours(2).generation_id}", "?id=", "?all=maybe"):
        await premises.ask("DELETE", PATH + query, premises.ada_management, 404 if query == "?id=" else 400)
    browser = await premises.browser()
    await browser.ask("DELETE", f"{PATH}?all=true", 403, headers={"X-CSRF-Token": ""})
    assert await browser.ask("DELETE", f"{PATH}?all=true") == {"deleted": True, "count": 4}
    assert await premises.ask("DELETE", f"{PATH}?all=true", premises.ada_management) == {"deleted": True, "count": 0}
    await content(premises, 2, premises.ada, 404)
    await content(premises, 9, premises.eve)


async def test_an_account_that_is_deleted_takes_with_it_what_it_had_kept(premises: Premises) -> None:
    await premises.content.add([ours(1), ours(2, "user_eve")])
    browser = await premises.browser()
    await browser.ask("DELETE", "/api/v1/account", json={"password": PASSWORD})
    erasure = Erasure(store=premises.store, erase_content=premises.content.delete_all, log=Log("test", fd=-1), now=premises.now.timestamp)
    assert premises.deleted == 1 and await erasure.work() is not None
    assert await premises.content.find(ours(1).generation_id, "user_ada") is None
    assert await premises.content.find(ours(2).generation_id, "user_eve") is not None
    assert not (await premises.store.rules("user_ada")).log_prompts


async def test_content_that_cannot_be_erased_is_tried_again_and_keeps_nothing_else_from_being_erased(premises: Premises) -> None:
    asked: list[str] = []

    async def fails(account_id: str) -> int:
        asked.append(account_id)
        if len(asked) == 1:
            raise StoreUnavailable("no")
        return 0

    await premises.journal(spent(premises.ada, 1, external_user="grace"))
    browser = await premises.browser()
    await browser.ask("DELETE", "/api/v1/account", json={"password": PASSWORD})
    now_s = premises.now.timestamp() + 7200  # the last exchanges have come in by then
    erasure = Erasure(store=premises.store, erase_content=fails, log=Log("test", fd=-1), now=lambda: now_s)
    wait_s = await erasure.work()
    erased = await premises.store.generation(spent(premises.ada, 1).id)
    assert erased is not None and erased.external_user == ""
    assert wait_s == 60 and await premises.store.erasures()
    assert await erasure.work() is None and asked == ["user_ada"] * 2 and not await premises.store.erasures()


async def test_switching_it_off_deletes_nothing(premises: Premises) -> None:
    await premises.ask("PATCH", "/api/v1/privacy", premises.ada_management, json={"log_prompts": True})
    await premises.content.add([ours(1)])
    await premises.ask("PATCH", "/api/v1/privacy", premises.ada_management, json={"log_prompts": False})
    await content(premises, 1, premises.ada)


async def test_without_a_key_nobody_can_switch_it_on_but_everybody_off(tmp_path: Path) -> None:
    async with opened(tmp_path, content_keys=()) as premises:
        refused = await premises.ask(
            "PATCH", "/api/v1/privacy", premises.ada_management, 400, json={"log_prompts": True, "enforce_zdr": True}
        )
        assert refused["error"]["message"].startswith("log_prompts: prompts cannot be kept here") and "key" in refused["error"]["message"]
        rules = (await premises.ask("GET", "/api/v1/privacy", premises.ada_management))["data"]
        assert rules["log_prompts"] is False and rules["enforce_zdr"] is False and premises.changed == []
        await premises.ask("PATCH", "/api/v1/privacy", premises.ada_management, json={"log_prompts": False})
        await content(premises, 1, premises.ada, 404)
        assert not (tmp_path / "content.sqlite").exists()


async def test_a_key_that_is_gone_is_told_without_a_word_of_what_was_said(tmp_path: Path) -> None:
    async with opened(tmp_path) as premises:
        await premises.content.add([ours(1)])
    (tmp_path / "gateway.db").unlink()
    async with opened(tmp_path, content_keys=[ContentKey(b"x" * 32)]) as premises:
        told = await content(premises, 1, premises.ada, 500)
        assert "which the gateway was not given" in told["error"]["message"] and "rivers" not in str(told)
        await content(premises, 1, premises.eve, 404)


async def test_a_content_file_that_fails_is_a_503_and_leaves_the_rest_of_the_api_alone(tmp_path: Path) -> None:
    (tmp_path / "content.sqlite").write_bytes(b"no database, this" * 1000)
    async with opened(tmp_path) as premises:
        await content(premises, 1, premises.ada, 503)
        await premises.ask("DELETE", f"{PATH}?all=true", premises.ada_management, 503)
        await premises.ask("GET", "/api/v1/credits", premises.ada)
        await premises.ask("PATCH", "/api/v1/privacy", premises.ada_management, json={"log_prompts": True})
