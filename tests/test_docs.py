"""What the operator reads is complete: every setting, metric and route of the code stands in its document."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec
import pytest

from gateway.config import load_settings
from gateway.domain.metrics import METRICS
from gateway.settings import Settings

REPOSITORY = Path(__file__).parent.parent
SETTINGS_FILE = REPOSITORY / "config" / "gateway.toml"
README = REPOSITORY / "README.md"


def sections() -> Iterator[tuple[str, dict[str, Any]]]:
    """(section, key -> default) of every table of the settings."""
    for field in msgspec.structs.fields(Settings):
        kind = get_args(field.type)[0] if get_origin(field.type) else field.type
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            yield field.name, {each.name: each.default for each in msgspec.structs.fields(kind)}


def routes() -> Iterator[str]:
    """Paths that callers may ask for, without their base: string literals of that form in the modules that route."""
    api = REPOSITORY / "gateway" / "control" / "api"
    for source in (REPOSITORY / "gateway" / "edge" / "server.py", *sorted(api.rglob("*.py"))):
        if source == api / "admin.py":  # the admin socket: never reachable by callers
            continue
        tree = ast.parse(source.read_text())
        pieces = {id(piece) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in pieces:
                path = re.sub("^(/api)?/v1(?=/|$)", "", node.value)
                if re.fullmatch(r"(/[a-z0-9_{}.-]+)+", path):
                    yield path


@pytest.fixture(scope="module")
def written_settings() -> dict[str, Any]:
    return tomllib.loads(SETTINGS_FILE.read_text())


@pytest.mark.parametrize(("section", "defaults"), list(sections()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_setting_is_documented_at_its_default(written_settings: dict[str, Any], section: str, defaults: dict[str, Any]) -> None:
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
    assert written_settings[section] == plain


def test_the_documented_settings_load() -> None:
    load_settings(SETTINGS_FILE, environ={})


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_is_in_the_readme(name: str) -> None:
    assert f"`{name}" in README.read_text()


def test_every_route_is_in_the_readme() -> None:
    text = README.read_text()
    missing = sorted({route for route in routes() if f"{route}`" not in text and f"{route} " not in text})
    assert not missing


def test_the_routes_are_found_in_the_sources() -> None:
    assert {"/chat/completions", "/completions"} <= set(routes())


def test_every_link_within_the_readme_leads_somewhere() -> None:
    text = README.read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    there = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    linked = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert linked and linked <= there
