"""The floors: who may import whom. Read from the sources, so that a forbidden import fails before it runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "gateway"

FLOORS = {
    "__init__": -1,  # the version
    "domain": 0,
    "settings": 0,
    "config": 0,
    "log": 0,
    "places": 0,
    "requirements": 0,
    "wire": 1,
    "routing": 1,
    "ledger": 1,
    "link": 2,
    "edge": 3,
    "control": 3,
    "cli": 5,
    "supervisor": 5,
    "__main__": 5,
}
ASYNC_FLOOR = 2  # below it: no event loop, no aiohttp, time and chance come as arguments
SAME_FLOOR = {("settings", "domain"), ("cli", "supervisor"), ("__main__", "cli")}
SAME_FLOOR |= {("config", "settings"), ("config", "domain"), ("config", "places")}
EVENT_LOOPS = {"asyncio", "aiohttp", "uvloop", "aiosqlite"}
SOURCES = sorted(PACKAGE.rglob("*.py"))


class Import(NamedTuple):
    module: str  # dotted, absolute
    line: int


def part_of(path: Path) -> str:
    """The top-level part that a source file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[Import]:
    """Every import, also those inside functions. `from gateway import x` counts as gateway.x if that is a part."""
    package = ["gateway", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                yield Import(f"gateway.{alias.name}" if module == "gateway" and alias.name in FLOORS else module, node.lineno)


def may_import(importer: str, imported: str) -> bool:
    return importer == imported or FLOORS[imported] < FLOORS[importer] or (importer, imported) in SAME_FLOOR


def test_every_part_has_a_floor() -> None:
    assert {part_of(path) for path in SOURCES} <= FLOORS.keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_go_down_only(path: Path) -> None:
    part = part_of(path)
    for module, line in imports_of(path):
        top, _, rest = module.partition(".")
        assert top not in ("bench", "tests"), f"line {line}: the product imports {module}"
        if top == "gateway":
            imported = rest.partition(".")[0] or "__init__"
            assert may_import(part, imported), f"line {line}: {part} imports {module}"
        if FLOORS[part] < ASYNC_FLOOR:
            assert top not in EVENT_LOOPS, f"line {line}: {part} is below floor {ASYNC_FLOOR} and imports {module}"


@pytest.mark.parametrize("path", [path for path in SOURCES if FLOORS.get(part_of(path), 9) < ASYNC_FLOOR], ids=lambda path: path.stem)
def test_nothing_waits_below_the_async_floor(path: Path) -> None:
    waiting = (ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith, ast.Await)
    lines = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, waiting)]
    assert not lines, f"waits at lines {lines}"


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("edge", "link", True),
        ("edge", "control", False),
        ("control", "edge", False),
        ("wire", "routing", False),
        ("link", "edge", False),
        ("settings", "domain", True),
        ("config", "settings", True),
        ("settings", "config", False),
        ("domain", "settings", False),
        ("log", "domain", False),
        ("supervisor", "cli", False),
    ],
)
def test_the_rule_itself(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) is allowed
