"""What an operator does: accounts, keys, credits, the ledger's check. The same for the command line and the admin socket.

Words come in as text (amounts as decimal USD) and are checked here; secrets are made here, returned once and kept
nowhere. Refusals are caller faults, a store that fails is StoreUnavailable.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Awaitable, Callable

import msgspec

from gateway.control.account_rules import change_rules
from gateway.control.content import Rotated
from gateway.control.content.store import ContentStore
from gateway.control.fees import purchase_fee_nanos
from gateway.control.passwords import FORM
from gateway.control.provider_slugs import provider_slugs
from gateway.control.store import Account, Key, LedgerReport, Store
from gateway.domain import resources
from gateway.domain.catalog import Catalog
from gateway.domain.errors import BadRequest
from gateway.domain.keys import KeyRecord, digest, label, new_secret
from gateway.domain.money import format_usd, parse_usd
from gateway.domain.rules import RulesChange
from gateway.settings import Billing

NAME_MAX = 200
NOTE_MAX = 500
EMAIL_MAX = 254  # RFC 5321
ROTATION_S = 1.0  # of work on what accounts have kept, in one answer

# Deliberately narrower than what mail allows: no quotes, no blanks, no look-alike letters.
_EMAIL = re.compile(r"[a-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*")


class NewAccount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    email: str
    usd: str = "0"  # first credit
    password_hash: str | None = None  # as `passwords.hash_password` makes it; a plain password does not travel


class NewKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    account_id: str
    name: str
    limit: str | None = None  # USD
    limit_reset: resources.LimitReset | None = None
    management: bool = False


class NewCredits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    account_id: str
    usd: str
    note: str = ""
    with_fee: bool = False  # book the fee of a purchase along with it, as paid on top


class NewRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is to become of an account's rules; what is left out stays."""

    account_id: str
    train_paid: bool | msgspec.UnsetType = msgspec.UNSET
    train_free: bool | msgspec.UnsetType = msgspec.UNSET
    publish_free: bool | msgspec.UnsetType = msgspec.UNSET
    zdr: bool | msgspec.UnsetType = msgspec.UNSET
    log_prompts: bool | msgspec.UnsetType = msgspec.UNSET
    allow: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET  # provider slugs; none: all
    ignore: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET


class ContentRotation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Encrypt anew what is kept under older keys, from here on."""

    after: tuple[str, int] = ("", 0)  # as `Rotated` told


class AccountCreated(msgspec.Struct, frozen=True, kw_only=True):
    account_id: str
    key: str
    management_key: str


class KeyCreated(msgspec.Struct, frozen=True, kw_only=True):
    key: str
    hash: str


class CreditsAdded(msgspec.Struct, frozen=True, kw_only=True):
    balance_usd: msgspec.Raw  # a JSON number with all its digits, which no float is in between
    fee_usd: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET  # where there is one


class AccountRulesSet(msgspec.Struct, frozen=True, kw_only=True):
    """All rules of an account."""

    account_id: str
    train_paid: bool
    train_free: bool
    publish_free: bool
    zdr: bool
    log_prompts: bool
    allow: tuple[str, ...]
    ignore: tuple[str, ...]


class Administration:
    """`on_key_changed(digest, record)` is called after each commit that made or changed a key, `on_funded(resource)` after each
    that may have made more of a leased resource. `drained()` says whether all finished exchanges are in the store. `billing` has
    the allowance of new accounts and the fee of purchases; `catalog()` is the one in force, whose providers rules may name.
    `content_key_env` is where the keys of `content` should be.
    """

    def __init__(
        self,
        *,
        store: Store,
        on_key_changed: Callable[[str, KeyRecord | None], None] = lambda digest, record: None,
        on_funded: Callable[[str], None] = lambda resource: None,
        drained: Callable[[], Awaitable[bool]],
        billing: Billing,
        catalog: Callable[[], Catalog],
        content: ContentStore,
        content_key_env: str,
    ) -> None:
        self._store = store
        self._billing = billing
        self._on_key_changed = on_key_changed
        self._on_funded = on_funded
        self._drained = drained
        self._catalog = catalog
        self._content = content
        self._content_fault = "" if content.has_key else f"the variable {content_key_env} ([content] key_env) is not set"

    async def create_account(self, wish: NewAccount) -> AccountCreated:
        """An account with an inference key, a management key, its first credit and the allowance, all or nothing.

        Raises Conflict: the email exists.
        """
        account = Account(
            id=f"user_{secrets.token_hex(12)}",
            email=email_address(wish.email),
            created_at_ms=_now_ms(),
            password_hash=_password_hash(wish.password_hash),
        )
        secret, management_secret = new_secret(), new_secret()
        keys = (_key(secret, account.id, "default"), _key(management_secret, account.id, "management", management=True))
        grant_nanos = parse_usd(self._billing.signup_usd)
        await self._store.create_account(account, keys, topup_nanos=_nanos("usd", wish.usd), grant_nanos=grant_nanos)
        for key in keys:
            self._key_changed(key)
        return AccountCreated(account_id=account.id, key=secret, management_key=management_secret)

    async def create_key(self, wish: NewKey) -> KeyCreated:
        """Raises NotFound: no such account."""
        secret = new_secret()
        limit_nanos = _nanos("limit", wish.limit) if wish.limit is not None else None
        key = _key(secret, wish.account_id, printable_text("name", wish.name, 1, NAME_MAX), management=wish.management)
        key = msgspec.structs.replace(key, limit_nanos=limit_nanos, limit_reset=wish.limit_reset)
        await self._store.create_key(key)
        self._key_changed(key)
        return KeyCreated(key=secret, hash=key.digest)

    async def set_rules(self, wish: NewRules) -> AccountRulesSet:
        """What the account allows, from now on and for all its keys.

        Raises NotFound: no such account. BadRequest: no provider of the catalog is named so, or prompts cannot be kept.
        """
        change = RulesChange(
            train_paid=wish.train_paid,
            train_free=wish.train_free,
            publish_free=wish.publish_free,
            zdr=wish.zdr,
            log_prompts=wish.log_prompts,
            allowed=provider_slugs("allow", wish.allow, self._catalog),
            ignored=provider_slugs("ignore", wish.ignore, self._catalog),
        )
        rules = await change_rules(self._store, wish.account_id, change, self._on_key_changed, content_fault=self._content_fault)
        return AccountRulesSet(
            account_id=wish.account_id,
            train_paid=rules.train_paid,
            train_free=rules.train_free,
            publish_free=rules.publish_free,
            zdr=rules.zdr,
            log_prompts=rules.log_prompts,
            allow=rules.allowed,
            ignore=rules.ignored,
        )

    async def add_credits(self, wish: NewCredits) -> CreditsAdded:
        """Raises NotFound: no such account."""
        nanos = _nanos("usd", wish.usd)
        if nanos == 0:
            raise BadRequest("usd: must be more than 0")
        fee_nanos = purchase_fee_nanos(nanos, self._billing) if wish.with_fee else 0
        note = printable_text("note", wish.note, 0, NOTE_MAX)
        balance_nanos = await self._store.add_credits(wish.account_id, nanos, note=note, fee_nanos=fee_nanos)
        self._on_funded(resources.balance(wish.account_id))
        return CreditsAdded(balance_usd=_number(balance_nanos), fee_usd=_number(fee_nanos) if fee_nanos else msgspec.UNSET)

    async def verify_ledger(self) -> LedgerReport:
        """After the journals have drained. Where they do not in time, a ledger that agrees with itself proves nothing yet."""
        drained = await self._drained()
        report = await self._store.verify_ledger()
        return report if drained or not report.ok else msgspec.structs.replace(report, ok=None)

    async def rotate_content(self, wish: ContentRotation) -> Rotated:
        """As much as can be done in `ROTATION_S`: to be asked again with what it told. Raises BadRequest: there is no key."""
        if self._content_fault:
            raise BadRequest(self._content_fault)
        began_s = time.monotonic()
        done = await self._content.rotate(wish.after)
        while done.after is not None and time.monotonic() - began_s < ROTATION_S:
            part = await self._content.rotate(done.after)
            done = Rotated(rotated=done.rotated + part.rotated, unreadable=done.unreadable + part.unreadable, after=part.after)
        return done

    def _key_changed(self, key: Key) -> None:
        self._on_key_changed(key.digest, key.record())
        if key.limit_nanos is not None:
            self._on_funded(resources.key_limit(key.digest, key.limit_reset, time.time()))


def _key(secret: str, account_id: str, name: str, *, management: bool = False) -> Key:
    return Key(digest=digest(secret), account_id=account_id, name=name, label=label(secret), created_at_ms=_now_ms(), management=management)


def email_address(text: str) -> str:
    """An address as accounts are known by. Raises BadRequest."""
    email = text.strip().lower()
    if len(email) > EMAIL_MAX or not _EMAIL.fullmatch(email):
        raise BadRequest("email: not an address such as name@example.com")
    return email


def _password_hash(text: str | None) -> str | None:
    if text is not None and not FORM.fullmatch(text):
        raise BadRequest("password_hash: not an Argon2id hash in PHC form")
    return text


def _nanos(field: str, text: str) -> int:
    try:
        nanos = parse_usd(text)
    except ValueError as error:
        raise BadRequest(f"{field}: {error}") from None
    if nanos < 0:
        raise BadRequest(f"{field}: must not be negative")
    return nanos


def _number(nanos: int) -> msgspec.Raw:
    return msgspec.Raw(format_usd(nanos).encode())


def printable_text(field: str, text: str, length_min: int, length_max: int) -> str:
    """`text` without the blanks around it. Raises BadRequest, naming the field."""
    text = text.strip()
    if not length_min <= len(text) <= length_max or not text.isprintable():
        raise BadRequest(f"{field}: must be {length_min} to {length_max} printable characters")
    return text


def _now_ms() -> int:
    return int(time.time() * 1000)
