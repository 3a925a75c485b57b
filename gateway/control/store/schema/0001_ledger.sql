-- Accounts, keys and the double-entry ledger. Money is integer nanos (1e-9 USD), times are unix milliseconds.

CREATE TABLE accounts (
    id            TEXT PRIMARY KEY,
    email         TEXT NOT NULL UNIQUE,      -- normalised to lower case by the writer
    password_hash TEXT,                      -- NULL: cannot sign in with a password
    created_at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE keys (
    digest        TEXT PRIMARY KEY,          -- SHA-256 of the secret, which is stored nowhere
    account_id    TEXT NOT NULL REFERENCES accounts (id),
    name          TEXT NOT NULL,
    label         TEXT NOT NULL,
    management    INTEGER NOT NULL DEFAULT 0 CHECK (management IN (0, 1)),
    disabled      INTEGER NOT NULL DEFAULT 0 CHECK (disabled IN (0, 1)),
    limit_nanos   INTEGER CHECK (limit_nanos BETWEEN 0 AND 4611686018427387904),
    limit_reset   TEXT CHECK (limit_reset IN ('daily', 'weekly', 'monthly')),
    expires_at_s  INTEGER,
    created_at_ms INTEGER NOT NULL,
    updated_at_ms INTEGER
) STRICT, WITHOUT ROWID;

CREATE INDEX keys_of_account ON keys (account_id, created_at_ms);

CREATE TABLE transactions (
    number        INTEGER PRIMARY KEY,
    kind          TEXT NOT NULL CHECK (kind IN ('topup', 'grant', 'usage', 'refund', 'adjustment', 'expiry')),
    reference     TEXT,                      -- what it stands for outside of the ledger: nothing is posted twice under one
    note          TEXT NOT NULL DEFAULT '',
    created_at_ms INTEGER NOT NULL,
    CHECK ((reference IS NULL) = (kind = 'usage'))  -- usage stands for the generations of its entries
) STRICT;

CREATE UNIQUE INDEX transactions_of_reference ON transactions (reference) WHERE reference IS NOT NULL;
CREATE INDEX transactions_of_credit ON transactions (created_at_ms) WHERE kind <> 'usage';

-- The entries of one transaction sum to zero. A book is an account's id, or one of the gateway's own ("gateway:...").
CREATE TABLE entries (
    number             INTEGER PRIMARY KEY,
    transaction_number INTEGER NOT NULL REFERENCES transactions (number),
    book               TEXT NOT NULL,
    amount_nanos       INTEGER NOT NULL      -- 0 only where all generations of an entry were free
) STRICT;

CREATE INDEX entries_of_transaction ON entries (transaction_number);
CREATE INDEX entries_of_book ON entries (book);

-- What the entries of each book add up to, kept beside them so that no reader has to sum.
CREATE TABLE balances (
    book  TEXT PRIMARY KEY,
    nanos INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TRIGGER entries_keep_values BEFORE UPDATE ON entries BEGIN
    SELECT RAISE(ABORT, 'entries are append-only');
END;
CREATE TRIGGER entries_keep_rows BEFORE DELETE ON entries BEGIN
    SELECT RAISE(ABORT, 'entries are append-only');
END;
CREATE TRIGGER transactions_keep_values BEFORE UPDATE ON transactions BEGIN
    SELECT RAISE(ABORT, 'transactions are append-only');
END;
CREATE TRIGGER transactions_keep_rows BEFORE DELETE ON transactions BEGIN
    SELECT RAISE(ABORT, 'transactions are append-only');
END;
