"""What days came to: completed ones only, exact, filtered, and as a table that no spreadsheet takes for a program."""

from __future__ import annotations

import csv
import datetime
import io
from decimal import Decimal
from typing import Any

import pytest
from openrouter import components

from gateway.control.api.workspace import workspace_of
from gateway.control.store.management import ModelUse
from gateway.control.store.sqlite import management
from gateway.domain.keys import digest
from gateway.domain.usage import Usage
from tests.control.api.premises import DAY, MODEL, NOW, Premises, spent

ACTIVITY = "/api/v1/activity"


async def rows(premises: Premises, query: str = "") -> Any:
    return (await premises.ask("GET", f"{ACTIVITY}?{query}", premises.ada_management))["data"]


async def test_days_models_and_endpoints_are_summed_over_keys_exactly(premises: Premises) -> None:
    other = {"model": "acme/gone", "endpoint_id": "acme/gone@west", "provider": "west"}
    await premises.journal(
        *(spent(premises.ada, number, NOW - DAY, 0.000000001) for number in range(3)),
        spent(premises.ada_management, 10, NOW - DAY, 0.1),
        spent(premises.ada, 11, NOW - DAY, 0.2, **other),
        spent(premises.ada, 12, NOW - 30 * DAY, 0.3),
        spent(premises.ada, 13, NOW - 31 * DAY, 7),
        spent(premises.ada, 14, NOW, 7),
        spent(premises.eve, 15, NOW - DAY, 7, account="user_eve"),
    )
    body = await premises.ask("GET", ACTIVITY, premises.ada_management)
    components.ActivityResponse.model_validate(body)
    gone, sage, old = body["data"]
    assert sage == {
        "date": "2026-11-24", "model": MODEL, "model_permaslug": "acme/sage-1-20260401", "endpoint_id": f"{MODEL}@north",
        "provider_name": "North", "usage": 0.100000003, "byok_usage_inference": 0, "requests": 4, "prompt_tokens": 28,
        "completion_tokens": 20, "reasoning_tokens": 4, "cached_tokens": 8,
    }  # fmt: skip
    assert (gone["model"], gone["model_permaslug"], gone["provider_name"]) == ("acme/gone", "acme/gone", "west")
    assert (old["date"], old["usage"]) == ("2026-10-26", 0.3)


async def test_filters_by_day_key_and_person(premises: Premises) -> None:
    await premises.journal(
        spent(premises.ada, 1, NOW - DAY, 0.1),
        spent(premises.ada, 2, NOW - 2 * DAY, 0.2),
        spent(premises.ada_management, 3, NOW - DAY, 0.4),
    )
    assert [row["usage"] for row in await rows(premises)] == [0.5, 0.2]
    assert [row["usage"] for row in await rows(premises, "date=2026-11-23")] == [0.2]
    assert [row["usage"] for row in await rows(premises, f"api_key_hash={digest(premises.ada)}")] == [0.1, 0.2]
    assert await rows(premises, f"api_key_hash={digest(premises.eve)}") == []
    assert len(await rows(premises, "user_id=user_ada")) == 2
    assert await rows(premises, "user_id=user_eve") == []
    [first, _] = await rows(premises, f"group_by=workspace&workspace_id={workspace_of('user_ada')}")
    assert first["workspace_id"] == workspace_of("user_ada")
    # A key that is gone has still spent what it spent.
    await premises.ask("DELETE", f"/api/v1/keys/{digest(premises.ada)}", premises.ada_management)
    assert [row["usage"] for row in await rows(premises)] == [0.5, 0.2]


@pytest.mark.parametrize(
    "query", ["date=2026-11-25", "date=2026-10-25", "date=2026-02-30", "date=x", "date=", "date=20261124", "group_by=model", "format=pdf"]
)
async def test_bad_filters_are_refused_by_name(premises: Premises, query: str) -> None:
    error = (await premises.ask("GET", f"{ACTIVITY}?{query}", premises.ada_management, 400))["error"]
    assert error["message"].startswith(query.partition("=")[0] + ": ")


async def test_a_day_is_complete_at_midnight_utc(premises: Premises) -> None:
    await premises.journal(spent(premises.ada, 1, NOW, 0.1))
    premises.now = datetime.datetime(2026, 11, 25, 23, 59, 59, tzinfo=datetime.UTC)
    assert await rows(premises) == []
    premises.now += datetime.timedelta(seconds=1)
    assert len(await rows(premises)) == 1
    premises.now += 30 * DAY
    assert await rows(premises) == []


async def test_the_table_has_all_digits_and_no_formulas(premises: Premises) -> None:
    names = ("=1+1", "+x", "-x", "@x", "\tx", "\rx", "\nx", "\uff1dx", 'a"b,c\nd')
    await premises.journal(*(spent(premises.ada, number, NOW - DAY, 1e-9, model=name) for number, name in enumerate(names)))
    async with premises.http.get(f"{ACTIVITY}?format=csv", headers={"Authorization": f"Bearer {premises.ada_management}"}) as answer:
        assert (answer.status, answer.content_type, answer.charset) == (200, "text/csv", "utf-8")
        assert "attachment" in answer.headers["Content-Disposition"]
        table = list(csv.DictReader(io.StringIO(await answer.text(), newline="")))
    assert {row["model"] for row in table} == {"'=1+1", "'+x", "'-x", "'@x", "'\tx", "'\rx", "'\nx", "'\uff1dx", 'a"b,c\nd'}
    assert sum(Decimal(row["usage"]) for row in table) == Decimal("0.000000009")


async def test_every_surface_tells_the_same_sum(premises: Premises) -> None:
    premises.now += DAY
    await premises.journal(*(spent(premises.ada, number, NOW - number % 20 * DAY, 0.000000123) for number in range(100)))
    told = {
        sum(Decimal(str(row["usage"])) for row in await rows(premises)),
        Decimal(str((await premises.ask("GET", "/api/v1/credits", premises.ada))["data"]["total_usage"])),
        Decimal(str((await premises.ask("GET", "/api/v1/key", premises.ada))["data"]["usage"])),
        sum(Decimal(str(row["usage"])) for row in (await premises.ask("GET", "/api/v1/keys", premises.ada_management))["data"]),
    }
    assert told == {Decimal("0.0000123")}


async def test_models_are_sorted_by_what_all_accounts_asked_of_them_in_a_week(premises: Premises, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(management, "ACCOUNTS_AT_ONCE", 1)
    tiny = "acme/tiny:free"
    few = Usage(prompt_tokens=1, completion_tokens=1)
    week_ago, today = NOW - 7 * DAY, NOW
    await premises.journal(
        *(
            spent(premises.eve, number, today, 0, account="user_eve", model=tiny, endpoint_id=f"{tiny}@south", usage=few)
            for number in (1, 2, 3)
        ),
        spent(premises.ada, 4, today),
        spent(premises.ada, 5, today - 6 * DAY),
        *(spent(premises.ada, number, week_ago) for number in (6, 7, 8)),
    )
    assert await premises.store.model_use("2026-11-19") == {tiny: ModelUse(3, 6), MODEL: ModelUse(2, 24)}

    async def order(sort: str) -> list[str]:
        return [row["id"] for row in (await premises.ask("GET", f"/api/v1/models?sort={sort}"))["data"]]

    assert await order("most-popular") == [tiny, MODEL]
    assert await order("top-weekly") == [MODEL, tiny]
