"""One control, and one edge that has joined it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.link.ends import Control, Edge


@pytest.fixture
async def control(tmp_path: Path) -> AsyncIterator[Control]:
    control = Control(tmp_path)
    await control.start()
    yield control
    await control.server.stop()


@pytest.fixture
async def edge(control: Control) -> AsyncIterator[Edge]:
    edge = Edge(control)
    await edge.link.start()
    assert await edge.next() == ("welcome", "1", "control-1")
    yield edge
    await edge.link.stop()
