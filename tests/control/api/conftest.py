"""The premises that most tests of the API stand on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.control.api.premises import Premises, opened


@pytest.fixture
async def premises(tmp_path: Path) -> AsyncIterator[Premises]:
    async with opened(tmp_path) as there:
        yield there
