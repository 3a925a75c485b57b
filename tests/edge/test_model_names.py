"""INP-06: a model's name is that name and no other. What only looks like it is refused, and nobody's price is taken for it."""

from __future__ import annotations

import pytest

from tests.edge.stage import GOOD, Stage, stage_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

stage = stage_of()

ALIKE = {
    "upper case": "ACME/good",
    "title case": "Acme/good",
    "Cyrillic a": "\u0430cme/good",
    "Greek o": "acme/g\u03bfod",
    "full width": "\uff41cme/good",
    "full-width solidus": "acme\uff0fgood",
    "division slash": "acme\u2215good",
    "zero-width space": "acme/go\u200bod",
    "zero-width joiner": "acme/good\u200d",
    "byte order mark": "\ufeffacme/good",
    "soft hyphen": "acme/go\u00adod",
    "composed": "acme/g\u00f6od",
    "combining mark": "acme/good\u0301",
    "ligature": "acme/g\u1d11d",
    "trailing dot": "acme/good.",
    "trailing slash": "acme/good/",
    "leading slash": "/acme/good",
    "double slash": "acme//good",
    "dot segment": "acme/./good",
    "parent segment": "acme/x/../good",
    "percent": "acme%2Fgood",
    "backslash": "acme\\good",
    "leading space": " acme/good",
    "trailing space": "acme/good ",
    "no-break space": "acme/good\u00a0",
    "tab": "acme/good\t",
    "line end": "acme/good\n",
    "NUL": "acme/good\0",
    "after NUL": "acme/good\0x",
    "cut": "acme/goo",
    "author only": "acme",
    "slug only": "good",
    "empty": "",
    "wildcard": "acme/*",
    "pattern": "acme/g%",
    "right-to-left mark": "acme/good\u200f",
}


@pytest.mark.parametrize("how", ALIKE)
async def test_inp_06_what_looks_like_a_model_is_none(stage: Stage, how: str) -> None:
    before = stage.good.books.requests, stage.first.books.requests
    for stream in (False, True):
        answered = await stage.ask(ALIKE[how], stream=stream)
        assert (answered.status, answered.error["code"]) == (400, 400)
    answered = await stage.ask(GOOD, models=[ALIKE[how]])
    assert answered.status in (200, 400)
    if answered.status == 200:
        assert answered.json["model"] == GOOD
    assert stage.first.books.requests == before[1] and stage.good.books.requests - before[0] == (answered.status == 200)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("acme/none", "acme/none"),
        ("none", "the model"),
        ("acme/none:nitro:floor", "acme/none:nitro:floor"),
        (f"{GOOD}:extended", f"{GOOD}:extended"),
        ("acme/\u202egood", "the model"),
        ('acme/"><script>', "the model"),
        ("x" * 200, "the model"),
        ("sk-or-v1-" + "0" * 40, "the model"),
        ("acme/sk-or-v1-" + "0" * 40, "the model"),
    ],
)
async def test_a_model_that_is_none_is_named_where_its_name_has_the_form_of_one(stage: Stage, name: str, told: str) -> None:
    answer = await stage.ask(name)
    assert answer.status == 400
    assert answer.error["message"] == f"{told} is not a valid model ID; see /api/v1/models"
