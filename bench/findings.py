"""What runs of the bench leave behind: a JSON file each, by name and date."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

RESULTS = Path(__file__).parent / "results"


def now() -> str:
    """The date as results tell it, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def result_file(name: str) -> Path:
    """Where the tool of this name leaves what it finds, unless it is told another place."""
    return RESULTS / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{name}.json"


def write(found: object, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
