"""One door for what an account allows: stored, then told to the edges for all its keys and sessions, as far as it can be kept to."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from gateway.control.store import Store
from gateway.domain.errors import BadRequest
from gateway.domain.keys import KeyRecord
from gateway.domain.rules import AccountRules, RulesChange
from gateway.domain.sessions import session_name
from gateway.log import Log

_NOT_KEPT = RulesChange(log_prompts=False)


class Told:
    """What edges are told of the rules of keys and sessions: as stored, but that nobody's prompts are kept where there is no key to
    encrypt them with. So nobody pays less for what is not done; the account's wish stays, and holds again once there is a key.
    """

    def __init__(self, *, keeps_content: bool, log: Log) -> None:
        self._keeps_content = keeps_content
        self._log = log
        self._warned = False

    def __call__(self, record: KeyRecord) -> KeyRecord:
        if self._keeps_content or not record.rules.log_prompts:
            return record
        if not self._warned:
            self._warned = True
            self._log.error(
                "content_dropped", reason="no_key", message="an account has its prompts kept, and there is no key to encrypt them with"
            )
        return msgspec.structs.replace(record, rules=_NOT_KEPT.applied_to(record.rules))


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
