-- What people do around the tokens: sessions, consent codes, repeated creations, deleted accounts.

ALTER TABLE keys ADD COLUMN include_byok_in_limit INTEGER NOT NULL DEFAULT 0 CHECK (include_byok_in_limit IN (0, 1));

ALTER TABLE accounts ADD COLUMN deleted_at_ms INTEGER;  -- its row stays, for the ledger's sake, with nothing personal in it

CREATE TABLE sessions (
    digest       TEXT PRIMARY KEY,           -- SHA-256 of what the cookie holds
    account_id   TEXT NOT NULL REFERENCES accounts (id),
    created_at_s INTEGER NOT NULL,
    used_at_s    INTEGER NOT NULL            -- to the minute or so
) STRICT, WITHOUT ROWID;

CREATE INDEX sessions_of_account ON sessions (account_id);
CREATE INDEX sessions_by_age ON sessions (created_at_s);

-- One row a consent, gone once it was taken.
CREATE TABLE auth_codes (
    digest       TEXT PRIMARY KEY,           -- SHA-256 of the code
    account_id   TEXT NOT NULL REFERENCES accounts (id),
    expires_at_s INTEGER NOT NULL,
    wish         BLOB NOT NULL               -- the key to be made and the challenge, as MessagePack
) STRICT, WITHOUT ROWID;

CREATE INDEX auth_codes_of_account ON auth_codes (account_id);
CREATE INDEX auth_codes_by_age ON auth_codes (expires_at_s);

-- What a creation with an Idempotency-Key came to, so that a repeat can be told the same.
CREATE TABLE creations (
    digest       TEXT PRIMARY KEY,           -- SHA-256 of who asked and the Idempotency-Key
    account_id   TEXT NOT NULL REFERENCES accounts (id),
    body_digest  TEXT NOT NULL,
    key_digest   TEXT NOT NULL,
    salt         BLOB NOT NULL,              -- with the secret of who asked, and not without, it makes the key's secret again
    created_at_s INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX creations_of_account ON creations (account_id);
CREATE INDEX creations_by_age ON creations (created_at_s);

-- Deleted accounts whose generations may still name somebody.
CREATE TABLE erasures (
    account_id TEXT PRIMARY KEY REFERENCES accounts (id),
    until_s    INTEGER NOT NULL              -- journals may bring further generations until then
) STRICT, WITHOUT ROWID;
