"""What must be installed, and how new at least: asked before anything of it is imported, once per start."""

from __future__ import annotations

import re
from importlib import metadata

_LEAST = re.compile(r"([A-Za-z0-9._-]+) *>= *([0-9.]+)")  # as pyproject.toml writes all of ours


def unmet() -> list[str]:
    """One line for each package that is missing or too old; empty where all is well, or gateway itself was never installed."""
    try:
        written = metadata.requires("gateway") or []
    except metadata.PackageNotFoundError:  # it runs from its sources
        return []
    return [line for text in written if (least := _LEAST.fullmatch(text)) is not None and (line := _unmet(least[1], least[2]))]


def _unmet(package: str, least: str) -> str:
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"{package} is not installed; {least} or newer is needed"
    return "" if _order(found) >= _order(least) else f"{package} {found} is too old; {least} or newer is needed"


def _order(version: str) -> tuple[list[int], bool]:
    """Sorts as versions do, as far as it takes to tell an older one: 3.14 is 3.14.0, and 3.15rc1 comes before 3.15."""
    numbers = re.match(r"[0-9]+(\.[0-9]+)*", version)
    if numbers is None:
        return [], False
    counted = [int(each) for each in numbers[0].split(".")]
    while counted and not counted[-1]:
        counted.pop()
    return counted, re.match(r"[-._]?(a|b|c|rc|alpha|beta|pre|dev)", version[numbers.end() :]) is None
