"""Sessions, consents, key pages, daily sums and deleted accounts: the management part of the store on SQLite."""

from __future__ import annotations

import datetime
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import aiosqlite
import msgspec

from gateway.control.store import GRANTS_BOOK, Account, Key, KeyUsage
from gateway.control.store.management import (
    FORFEIT_BOOK,
    GRANTED_NOTE,
    AuthCode,
    Creation,
    DailyUsage,
    KeyChange,
    KeyWish,
    ModelUse,
    Session,
)
from gateway.control.store.sqlite import accounts, ledger
from gateway.control.store.sqlite.database import listed, row_of
from gateway.domain.errors import BadRequest
from gateway.domain.generation import Generation, decode, encode
from gateway.domain.money import AMOUNT_NANOS_MAX
from gateway.domain.resources import window_start
from gateway.domain.rules import AccountRules

DAYS_AT_ONCE = 10  # other readers get in between
ACCOUNTS_AT_ONCE = 200  # likewise: the busiest have a hundred sums a week
CREATION_S = 86_400  # how long a creation may be repeated
_wish_decoder = msgspec.msgpack.Decoder(KeyWish)
_encoder = msgspec.msgpack.Encoder()


class SqliteManagement:
    """`ManagementStore` over the transactions and reads of the store that this is a part of."""

    def _transaction(self) -> AbstractAsyncContextManager[aiosqlite.Connection]:
        raise NotImplementedError

    async def _read(self, sql: str, arguments: Sequence[Any]) -> list[sqlite3.Row]:
        raise NotImplementedError

    # Keys.

    async def page_of_keys(
        self, account_id: str, *, management: bool, include_disabled: bool, expired_by_s: int, offset: int, limit: int
    ) -> list[Key]:
        return [
            accounts.key_of(row)
            for row in await self._read(accounts.KEY_PAGE, (account_id, management, include_disabled, expired_by_s, limit, offset))
        ]

    async def usage_of_keys(self, digests: Sequence[str], now_s: float) -> dict[str, tuple[KeyUsage, str | None]]:
        daily, weekly, monthly = (window_start(reset, now_s) for reset in ("daily", "weekly", "monthly"))
        rows = await self._read(_USAGE_OF_KEYS, (daily, weekly, monthly, listed(digests)))
        return {
            row[0]: (KeyUsage(total_nanos=row[1], daily_nanos=row[2], weekly_nanos=row[3], monthly_nanos=row[4]), row[5]) for row in rows
        }

    async def change_key(self, before: Key, change: KeyChange, now_ms: int) -> Key | None:
        fields = {name: value for name, value in msgspec.structs.asdict(change).items() if value is not msgspec.UNSET}
        _require_limit(fields.get("limit_nanos"))
        async with self._transaction() as db:
            row = await row_of(db, accounts.KEYS, (listed((before.digest,)),))
            if row is None:
                return None
            key = msgspec.structs.replace(accounts.key_of(row), **fields, updated_at_ms=now_ms)
            await accounts.replace_key(db, key)
            return key

    async def delete_key(self, digest: str) -> bool:
        async with self._transaction() as db:
            return (await db.execute("DELETE FROM keys WHERE digest = ?", (digest,))).rowcount > 0

    async def create_key_once(self, key: Key, creation: Creation) -> Creation | None:
        _require_limit(key.limit_nanos)
        async with self._transaction() as db:
            await db.execute("DELETE FROM creations WHERE created_at_s <= ?", (creation.created_at_s - CREATION_S,))
            row = await row_of(db, _CREATION, (creation.digest,))
            if row is not None:
                return Creation(
                    digest=row[0], account_id=row[1], body_digest=row[2], key_digest=row[3], salt=row[4], created_at_s=row[5]
                )  # fmt: skip
            await accounts.require_account(db, key.account_id)
            await accounts.insert_key(db, key)
            await db.execute("INSERT INTO creations VALUES (?, ?, ?, ?, ?, ?)", msgspec.structs.astuple(creation))
            return None

    # Accounts and sessions.

    async def account_by_email(self, email: str) -> Account | None:
        rows = await self._read(accounts.ACCOUNT_BY_EMAIL, (email,))
        return accounts.account_of(rows[0]) if rows else None

    async def sign_up(self, account: Account, *, grant_nanos: int) -> None:
        async with self._transaction() as db:
            await accounts.insert_account(db, account)
            if grant_nanos:
                lines = [(account.id, grant_nanos), (GRANTS_BOOK, -grant_nanos)]
                await ledger.post(db, "grant", lines, reference=f"signup:{account.id}", note=GRANTED_NOTE, now_ms=account.created_at_ms)

    async def set_password(self, account_id: str, password_hash: str) -> list[str]:
        async with self._transaction() as db:
            await db.execute("UPDATE accounts SET password_hash = ? WHERE id = ? AND deleted_at_ms IS NULL", (password_hash, account_id))
            return [row[0] for row in await db.execute_fetchall(_END_SESSIONS, (account_id,))]

    async def open_session(self, session: Session, *, proven: str | None, ended_before_s: int) -> bool:
        async with self._transaction() as db:
            await db.execute("DELETE FROM sessions WHERE created_at_s < ?", (ended_before_s,))
            opened = await db.execute(_OPEN_SESSION, (*msgspec.structs.astuple(session), session.account_id, proven))
            return opened.rowcount > 0

    async def find_session(self, digest: str) -> Session | None:
        rows = await self._read("SELECT digest, account_id, created_at_s, used_at_s FROM sessions WHERE digest = ?", (digest,))
        return Session(digest=rows[0][0], account_id=rows[0][1], created_at_s=rows[0][2], used_at_s=rows[0][3]) if rows else None

    async def find_sessions(self, digests: Iterable[str]) -> dict[str, tuple[Session, AccountRules]]:
        return {
            row[0]: (Session(digest=row[0], account_id=row[1], created_at_s=row[2], used_at_s=row[3]), accounts.rules_of(row[4]))
            for row in await self._read(_SESSIONS, (listed(digests),))
        }

    async def sessions_of(self, account_id: str) -> list[str]:
        return [row[0] for row in await self._read("SELECT digest FROM sessions WHERE account_id = ?", (account_id,))]

    async def touch_session(self, digest: str, used_at_s: int) -> None:
        async with self._transaction() as db:
            await db.execute("UPDATE sessions SET used_at_s = ? WHERE digest = ?", (used_at_s, digest))

    async def close_session(self, digest: str) -> None:
        async with self._transaction() as db:
            await db.execute("DELETE FROM sessions WHERE digest = ?", (digest,))

    # Consents.

    async def add_code(self, code: AuthCode, *, now_s: int) -> None:
        async with self._transaction() as db:
            await db.execute("DELETE FROM auth_codes WHERE expires_at_s < ?", (now_s - CREATION_S,))
            await db.execute(
                "INSERT INTO auth_codes VALUES (?, ?, ?, ?)", (code.digest, code.account_id, code.expires_at_s, _encoder.encode(code.wish))
            )

    async def take_code(self, digest: str) -> AuthCode | None:
        async with self._transaction() as db:
            row = await row_of(db, "DELETE FROM auth_codes WHERE digest = ? RETURNING digest, account_id, expires_at_s, wish", (digest,))
        return AuthCode(digest=row[0], account_id=row[1], expires_at_s=row[2], wish=_wish_decoder.decode(row[3])) if row else None

    # What days came to.

    async def daily_usage(self, account_id: str, first_day: str, last_day: str, key_digests: Iterable[str] | None) -> list[DailyUsage]:
        if key_digests is None:
            return [DailyUsage(*row) for row in await self._read(_ACTIVITY, (account_id, first_day, last_day))]
        first, last = datetime.date.fromisoformat(first_day), datetime.date.fromisoformat(last_day)
        days = [(last - datetime.timedelta(days=back)).isoformat() for back in range((last - first).days + 1)]
        keys = listed(key_digests)
        found: list[DailyUsage] = []
        for start in range(0, len(days), DAYS_AT_ONCE):
            some = days[start : start + DAYS_AT_ONCE]
            rows = await self._read(_OF_KEYS[len(some)], [argument for day in some for argument in (day, account_id, day, keys)])
            found.extend(DailyUsage(*row) for row in rows)
        return found

    async def model_use(self, first_day: str) -> dict[str, ModelUse]:
        found: dict[str, ModelUse] = {}
        last = ""
        while accounts_read := await self._read(_SOME_ACCOUNTS, (last, ACCOUNTS_AT_ONCE)):
            ids = [row[0] for row in accounts_read]
            last = ids[-1]
            for model, requests, tokens in await self._read(_MODEL_USE, (listed(ids), first_day)):
                before = found.get(model, ModelUse(0, 0))
                found[model] = ModelUse(before.requests + requests, before.tokens + tokens)
        return found

    # Deleted accounts.

    async def delete_account(self, account_id: str, *, now_s: int, erase_until_s: int) -> tuple[list[str], list[str]]:
        async with self._transaction() as db:
            await accounts.require_account(db, account_id)
            balance = await row_of(db, "SELECT nanos FROM balances WHERE book = ?", (account_id,))
            if balance is not None and balance[0] > 0:
                lines = [(account_id, -balance[0]), (FORFEIT_BOOK, balance[0])]
                reference = f"deleted:{account_id}"
                await ledger.post(db, "adjustment", lines, reference=reference, note="account deleted", now_ms=now_s * 1000)
            keys = [row[0] for row in await db.execute_fetchall("DELETE FROM keys WHERE account_id = ? RETURNING digest", (account_id,))]
            sessions = [row[0] for row in await db.execute_fetchall(_END_SESSIONS, (account_id,))]
            for statement in _FORGET:
                await db.execute(statement, (account_id,))
            await db.execute(_DELETED, (account_id, now_s * 1000, account_id))
            await db.execute("INSERT OR REPLACE INTO erasures VALUES (?, ?)", (account_id, erase_until_s))
        return keys, sessions

    async def erasures(self) -> dict[str, int]:
        return {row[0]: row[1] for row in await self._read("SELECT account_id, until_s FROM erasures", ())}

    async def erase_generations(self, account_id: str, after_id: str, limit: int) -> str | None:
        rows = await self._read(_GENERATIONS_OF_ACCOUNT, (account_id, after_id, after_id, limit))
        told = [one for row in rows if _is_personal(one := decode(row[1]))]
        if told:
            async with self._transaction() as db:
                await db.executemany("UPDATE generations SET record = ? WHERE id = ?", [(encode(_bare(one)), one.id) for one in told])
        return str(rows[-1][0]) if len(rows) == limit else None

    async def finish_erasure(self, account_id: str) -> None:
        async with self._transaction() as db:
            await db.execute("DELETE FROM erasures WHERE account_id = ?", (account_id,))


# In the order of their numbers, without a sort: so each batch costs what it reads, however many generations there are.
_BITS = ledger.ENTRY_BITS
_GENERATIONS_OF_ACCOUNT = f"""
SELECT g.id, g.record
FROM entries e JOIN generations g ON g.number BETWEEN e.number << {_BITS} AND (e.number << {_BITS}) + {ledger.ROWS_PER_ENTRY - 1}
WHERE e.book = ? AND e.number >= (SELECT number >> {_BITS} FROM retention)
    AND e.number >= COALESCE((SELECT number >> {_BITS} FROM generations WHERE id = ?), 0)
    AND g.number > COALESCE((SELECT number FROM generations WHERE id = ?), 0)
ORDER BY e.number, g.number LIMIT ?
"""  # noqa: S608

_PERSONAL = dict.fromkeys(("http_referer", "title", "user_agent", "external_user", "session_id", "upstream_id"), "")


def _is_personal(generation: Generation) -> bool:
    return any(getattr(generation, field) for field in _PERSONAL)


def _bare(generation: Generation) -> Generation:
    return msgspec.structs.replace(generation, **_PERSONAL)


def _require_limit(limit_nanos: int | None) -> None:
    if limit_nanos is not None and not 0 <= limit_nanos <= AMOUNT_NANOS_MAX:
        raise BadRequest("limit: is negative or out of range")


_OPEN_SESSION = "INSERT INTO sessions SELECT ?, ?, ?, ? WHERE EXISTS (SELECT 1 FROM accounts WHERE id = ? AND password_hash = ?)"
_SESSIONS = """
SELECT digest, account_id, created_at_s, used_at_s,
       (SELECT rules FROM account_rules WHERE account_rules.account_id = sessions.account_id)
FROM sessions WHERE digest IN (SELECT value FROM json_each(?))
"""
_END_SESSIONS = "DELETE FROM sessions WHERE account_id = ? RETURNING digest"
_CREATION = "SELECT digest, account_id, body_digest, key_digest, salt, created_at_s FROM creations WHERE digest = ?"
_FORGET = (
    "DELETE FROM auth_codes WHERE account_id = ?",
    "DELETE FROM account_rules WHERE account_id = ?",
    "DELETE FROM creations WHERE account_id = ?",
)
_DELETED = "UPDATE accounts SET email = 'deleted:' || ?, password_hash = NULL, deleted_at_ms = ? WHERE id = ?"
_USAGE_OF_KEYS = """
SELECT wanted.value,
       COALESCE((SELECT nanos FROM key_totals t WHERE t.key_digest = wanted.value), 0),
       (SELECT COALESCE(SUM(nanos), 0) FROM usage_daily u WHERE u.key_digest = wanted.value AND u.day >= ?1),
       (SELECT COALESCE(SUM(nanos), 0) FROM usage_daily u WHERE u.key_digest = wanted.value AND u.day >= ?2),
       (SELECT COALESCE(SUM(nanos), 0) FROM usage_daily u WHERE u.key_digest = wanted.value AND u.day >= ?3),
       (SELECT MAX(day) FROM usage_daily u WHERE u.key_digest = wanted.value)
FROM json_each(?4) wanted
"""
_ACTIVITY = """
SELECT day, model, endpoint_id, provider, requests, prompt_tokens, completion_tokens, reasoning_tokens, cached_tokens, nanos
FROM activity_daily WHERE account_id = ? AND day BETWEEN ? AND ? ORDER BY 1 DESC, 2, 3, 4
"""
_SOME_ACCOUNTS = "SELECT id FROM accounts WHERE id > ? ORDER BY id LIMIT ?"
_MODEL_USE = """
SELECT model, SUM(requests), SUM(prompt_tokens + completion_tokens)
FROM json_each(?) wanted CROSS JOIN activity_daily ON account_id = wanted.value AND day >= ? GROUP BY model
"""
_DAY_OF_KEYS = """
SELECT ? AS day, model, endpoint_id, provider, SUM(requests), SUM(prompt_tokens), SUM(completion_tokens), SUM(reasoning_tokens),
       SUM(cached_tokens), SUM(nanos)
FROM usage_daily WHERE account_id = ? AND day = ? AND key_digest IN (SELECT value FROM json_each(?)) GROUP BY model, endpoint_id, provider
"""
# For so many days, by their number. Groups of one day fit a small tree: a third of the time of all at once.
_OF_KEYS = [" UNION ALL ".join([_DAY_OF_KEYS] * days) + " ORDER BY 1 DESC, 2, 3, 4" for days in range(DAYS_AT_ONCE + 1)]
