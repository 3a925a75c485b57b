"""Requests made up from our own OpenAPI document, good and bad, against a running gateway: no failure of ours, no answer beside it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation

from tests.conftest import RunningGateway, StartGateway

INFERENCE = ("/chat/completions", "/completions")
# What would end the session that the others are asked with.
LAST = ("DELETE /session",)
# Rules beyond a schema (a day that exists, a moment to come) refuse what fits one; the tests of each field tell which.
UNCHECKED = ("positive_data_acceptance",)


def signed_in(gateway: RunningGateway) -> Mapping[str, str]:
    """Headers of a browser of ours, for an account of its own."""
    credentials = {"email": "grace@example.com", "password": "correct horse battery"}
    with requests.Session() as http:
        http.post(f"{gateway.url}/api/v1/account", json=credentials).raise_for_status()
        answer = http.post(f"{gateway.url}/api/v1/session", json=credentials)
    token = answer.json()["data"]["csrf_token"]
    return {"Cookie": answer.headers["Set-Cookie"].partition(";")[0], "X-CSRF-Token": token, "Origin": gateway.url}


def operations(gateway: RunningGateway) -> Iterator[tuple[str, APIOperation[Any, Any, Any, Any]]]:
    """Each with the name of the credential that opens it. Without theirs, `test_routes` asks all of them."""
    document = requests.get(f"{gateway.url}/openapi.json", timeout=10).json()
    del document["components"]["securitySchemes"]
    opened_by = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            opened_by[f"{method.upper()} {path}"] = next((name for scheme in operation.pop("security") for name in scheme), "nobody")
    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()
        if operation.path not in INFERENCE and operation.label not in LAST:
            yield opened_by[operation.label], operation


def make_up(operation: APIOperation[Any, Any, Any, Any], url: str, headers: Mapping[str, str], *, cases_each: int, seed: int) -> int:
    """How many requests were made and found right. Raises what is wrong with the first answer that is not."""
    made = 0
    unchecked: list[Any] = [check for check in CHECKS.get_all() if check.__name__ in UNCHECKED]
    with requests.Session() as http:
        for mode in GenerationMode:

            @hypothesis.seed(seed)
            @hypothesis.settings(
                max_examples=cases_each, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def run(case: Case[Any]) -> None:
                nonlocal made
                made += 1
                answer = case.call(base_url=f"{url}/api/v1", session=http, headers=dict(headers))
                case.validate_response(answer, excluded_checks=unchecked)

            try:
                run()
            except Unsatisfiable:
                assert mode is GenerationMode.NEGATIVE  # nothing can be wrong with what takes no input
    return made


@pytest.fixture
def asked(start_gateway: StartGateway) -> RunningGateway:
    """A gateway whose provider nobody calls."""
    return start_gateway({"north": "http://127.0.0.1:9/v1"})


def check(gateway: RunningGateway, *, cases_each: int, seed: int) -> int:
    account = gateway.create_account("eve@example.com")
    credentials: dict[str, Mapping[str, str]] = {
        "nobody": {},
        "key": {"Authorization": f"Bearer {account['key']}"},
        "managementKey": {"Authorization": f"Bearer {account['management_key']}"},
        "session": signed_in(gateway),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of schemathesis itself
        made = sum(
            make_up(operation, gateway.url, credentials[name], cases_each=cases_each, seed=seed) for name, operation in operations(gateway)
        )
    assert not [line for line in gateway.log if line["event"] in ("request_crashed", "request_failed")]
    assert gateway.admin("ledger", "verify")["ok"]
    return made


def test_inp_12_hundreds_of_made_up_requests_find_no_failure(asked: RunningGateway) -> None:
    assert check(asked, cases_each=6, seed=1) > 200


@pytest.mark.soak
def test_inp_12_ten_thousand_made_up_requests_find_no_failure(asked: RunningGateway) -> None:
    made = check(asked, cases_each=400, seed=2)
    print(f"{made} requests")
    assert made >= 10_000
