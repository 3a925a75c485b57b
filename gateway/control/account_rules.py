"""One door for what an account allows: stored, then told to the edges for all its keys and sessions."""

from __future__ import annotations

from collections.abc import Callable

from gateway.control.store import Store
from gateway.domain.errors import BadRequest
from gateway.domain.keys import KeyRecord
from gateway.domain.rules import AccountRules, RulesChange
from gateway.domain.sessions import session_name


async def change_rules(
    store: Store, account_id: str, change: RulesChange, on_key_changed: Callable[[str, KeyRecord | None], None], *, content_fault: str = ""
) -> AccountRules:
    """The rules as they are now. Raises NotFound: no such account. BadRequest: prompts are to be kept, which `content_fault` forbids."""
    if change.log_prompts is True and content_fault:
        raise BadRequest(f"log_prompts: {content_fault}")
    rules, keys = await store.change_rules(account_id, change)
    for key in keys:
        on_key_changed(key.digest, key)
    for digest in await store.sessions_of(account_id):
        on_key_changed(session_name(digest), None)  # asked about anew at its next request
    return rules
