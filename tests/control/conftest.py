"""Parts that several modules of these tests stand on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.control.store import Account, Key
from gateway.control.store.sqlite import SqliteStore
from tests.control.books import USD, Books


@pytest.fixture
async def books(tmp_path: Path) -> AsyncIterator[Books]:
    store = await SqliteStore.open(tmp_path / "gateway.db")
    for name in ("ann", "bob"):
        key = Key(digest=f"digest-{name[0]}", account_id=f"user_{name}", name=name, label="x", created_at_ms=1)
        await store.create_account(Account(id=f"user_{name}", email=name, created_at_ms=1), [key], topup_nanos=10 * USD)
    books = Books(tmp_path, store)
    yield books
    try:
        assert (await store.verify_ledger()).ok
    finally:
        await books.close()  # its threads would keep the tests from ending
