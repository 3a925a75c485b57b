"""Workspaces: each account is one, and every object that it owns says so. Clients require an id of a UUID's form."""

from __future__ import annotations

import uuid

_ACCOUNTS = uuid.UUID("5d2dbb2e-8f0c-4c0e-9a4e-2a3f9a6f1c57")


def workspace_of(account_id: str) -> str:
    """The same for the same account, always."""
    return str(uuid.uuid5(_ACCOUNTS, account_id))
