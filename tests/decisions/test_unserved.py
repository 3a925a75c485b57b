"""What a gateway could do beside a model's answer, and this one does not: whoever asks for it is told, and nothing else is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.decisions.bodies import body_with, refusal, sent

FUNCTION = {"type": "function", "function": {"name": "note", "description": 'says "openrouter:web_search"', "parameters": {}}}
REFUSED: list[tuple[str, Any, str]] = [
    ("plugins", [{"id": "web"}], "plugins[0].id: this gateway does not search the web"),
    ("plugins", [{"id": "web", "enabled": True, "max_results": 3}], "plugins[0].id: this gateway does not search the web"),
    ("plugins", [{"id": "response-healing"}, {"id": "web"}], "plugins[1].id: "),
    ("plugins", [{"id": "web", "enabled": None}], "plugins[0].id: "),
    ("plugins", [{"id": "moderation"}], "plugins[0].id: this gateway has no such plugin"),
    ("plugins", [{"id": "web-fetch"}], "plugins[0].id: "),
    ("plugins", [{"id": "fusion"}], "plugins[0].id: "),
    ("plugins", [{"id": "sekret"}], "plugins[0].id: "),
    ("plugins", [{"id": "file-parser", "pdf": {"engine": "mistral-ocr"}}], "plugins[0].pdf.engine: "),
    ("plugins", [{"enabled": False}], "plugins: "),
    ("plugins", [{"id": 5}], "plugins: "),
    ("plugins", [{"id": "web", "enabled": "no"}], "plugins: "),
    ("preset", "sekret", "preset: this gateway keeps no presets"),
    ("preset", "", "preset: "),
    ("preset", {"slug": "sekret"}, "preset: "),
    ("tools", [{"type": "openrouter:web_search"}], "tools[0].type: "),
    ("tools", [FUNCTION, {"type": "openrouter:sekret", "parameters": {}}], "tools[1].type: "),
]
SERVED: list[tuple[str, Any]] = [
    ("plugins", None),
    ("plugins", []),
    ("plugins", [{"id": "web", "enabled": False}]),
    (
        "plugins",
        [{"id": "context-compression"}, {"id": "response-healing", "enabled": True}, {"id": "auto-router", "allowed_models": ["*"]}],
    ),
    ("plugins", [{"id": "file-parser"}, {"id": "file-parser", "pdf": {"engine": "native", "x": 1}}, {"id": "file-parser", "pdf": None}]),
    ("preset", None),
    ("tools", [FUNCTION]),
    ("tools", [{"type": "custom", "custom": {"name": "openrouter:x"}}, {"type": 5}, {}, FUNCTION]),
]


@pytest.mark.parametrize("kind", ["chat", "text"])
@pytest.mark.parametrize(("name", "value", "told"), REFUSED)
def test_what_is_not_served_is_refused_by_its_field_and_never_repeated(name: str, value: Any, told: str, kind: Any) -> None:
    message = refusal(body_with(b'"prompt":"x","%b":%b' % (name.encode(), json.dumps(value).encode())), kind)
    assert message.startswith(told)
    assert "sekret" not in message


@pytest.mark.parametrize("separators", [(",", ":"), (", ", " : ")])
@pytest.mark.parametrize(("name", "value"), SERVED)
def test_what_leaves_nothing_out_of_an_answer_passes(name: str, value: Any, separators: tuple[str, str]) -> None:
    told = sent(body_with(b'"%b":%b' % (name.encode(), json.dumps(value, separators=separators).encode())))
    assert told.keys() == {"model", "messages"} | ({"tools"} if name == "tools" else set())
    assert name != "tools" or told["tools"] == value
