"""Accounts and keys: statements, and rows as records."""

from __future__ import annotations

import sqlite3

import aiosqlite
import msgspec

from gateway.control.store import Account, Key
from gateway.control.store.sqlite.database import row_of
from gateway.domain.errors import Conflict, NotFound
from gateway.domain.rules import NO_RULES, AccountRules, RulesChange

_decode_rules = msgspec.json.Decoder(AccountRules).decode

_KEY_COLUMNS = (
    "digest, account_id, name, label, created_at_ms, management, disabled, limit_nanos, limit_reset, expires_at_s, updated_at_ms, "
    "include_byok_in_limit"
)

ACCOUNT = "SELECT id, email, created_at_ms, password_hash FROM accounts WHERE id = ?"
ACCOUNTS = "SELECT id, email, created_at_ms, password_hash FROM accounts ORDER BY created_at_ms, id LIMIT ? OFFSET ?"
RULES = "SELECT rules FROM account_rules WHERE account_id = ?"
_KEY = f"{_KEY_COLUMNS}, (SELECT rules FROM account_rules WHERE account_rules.account_id = keys.account_id)"  # noqa: S608
KEYS = f"SELECT {_KEY} FROM keys WHERE digest IN (SELECT value FROM json_each(?))"  # noqa: S608
KEYS_OF_ACCOUNT = f"SELECT {_KEY} FROM keys WHERE account_id = ? ORDER BY created_at_ms DESC, digest LIMIT ? OFFSET ?"  # noqa: S608
ACCOUNT_BY_EMAIL = "SELECT id, email, created_at_ms, password_hash FROM accounts WHERE email = ?"
_ALL_KEYS_OF_ACCOUNT = f"SELECT {_KEY} FROM keys WHERE account_id = ?"  # noqa: S608
KEY_PAGE = f"""
SELECT {_KEY} FROM keys WHERE account_id = ? AND management = ? AND disabled <= ? AND COALESCE(expires_at_s > ?, 1)
ORDER BY created_at_ms DESC, digest LIMIT ? OFFSET ?
"""  # noqa: S608
_INSERT_KEY = f"INSERT INTO keys ({_KEY_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
_REPLACE_KEY = """
UPDATE keys SET name = ?, disabled = ?, limit_nanos = ?, limit_reset = ?, include_byok_in_limit = ?, updated_at_ms = ? WHERE digest = ?
"""


async def insert_account(db: aiosqlite.Connection, account: Account) -> None:
    """Raises Conflict: the email exists."""
    if await row_of(db, "SELECT 1 FROM accounts WHERE email = ?", (account.email,)):
        raise Conflict("an account with this email exists")
    await db.execute(
        "INSERT INTO accounts (id, email, password_hash, created_at_ms) VALUES (?, ?, ?, ?)",
        (account.id, account.email, account.password_hash, account.created_at_ms),
    )


async def insert_key(db: aiosqlite.Connection, key: Key) -> None:
    await db.execute(
        _INSERT_KEY,
        (
            key.digest, key.account_id, key.name, key.label, key.created_at_ms, key.management, key.disabled,
            key.limit_nanos, key.limit_reset, key.expires_at_s, key.updated_at_ms, key.include_byok_in_limit,
        ),
    )  # fmt: skip


async def replace_key(db: aiosqlite.Connection, key: Key) -> None:
    """What may change of a key; whose it is and its class stay."""
    await db.execute(
        _REPLACE_KEY,
        (key.name, key.disabled, key.limit_nanos, key.limit_reset, key.include_byok_in_limit, key.updated_at_ms, key.digest),
    )


async def require_account(db: aiosqlite.Connection, account_id: str) -> None:
    """Raises NotFound."""
    if not await row_of(db, "SELECT 1 FROM accounts WHERE id = ? AND deleted_at_ms IS NULL", (account_id,)):
        raise NotFound("no such account")


async def change_rules(db: aiosqlite.Connection, account_id: str, change: RulesChange) -> tuple[AccountRules, list[Key]]:
    """Within a transaction. Raises NotFound."""
    await require_account(db, account_id)
    row = await row_of(db, RULES, (account_id,))
    rules = change.applied_to(rules_of(row[0] if row is not None else None))
    everything = msgspec.json.encode(msgspec.structs.asdict(rules)).decode()
    await db.execute("INSERT OR REPLACE INTO account_rules (account_id, rules) VALUES (?, ?)", (account_id, everything))
    return rules, [key_of(row) for row in await db.execute_fetchall(_ALL_KEYS_OF_ACCOUNT, (account_id,))]


def rules_of(text: str | None) -> AccountRules:
    """From the database; None: nobody said."""
    rules = _decode_rules(text) if text is not None else NO_RULES
    return NO_RULES if rules == NO_RULES else rules  # the very object, by which edges know the commonest rules


def account_of(row: sqlite3.Row) -> Account:
    return Account(id=row[0], email=row[1], created_at_ms=row[2], password_hash=row[3])


def key_of(row: sqlite3.Row) -> Key:
    return Key(
        digest=row[0], account_id=row[1], name=row[2], label=row[3], created_at_ms=row[4], management=bool(row[5]), disabled=bool(row[6]),
        limit_nanos=row[7], limit_reset=row[8], expires_at_s=row[9], updated_at_ms=row[10], include_byok_in_limit=bool(row[11]),
        rules=rules_of(row[12]),
    )  # fmt: skip
