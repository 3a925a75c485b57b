-- Generations with their roll-ups, the leases that edges spend from, and how far each journal file was read.

-- A row's number is that of the entry that charged it times 4,096, plus its place. So rows are only ever appended, those of
-- one entry, which is one account's part of a batch, lie together, and the entries are the index that leads to them.
CREATE TABLE generations (
    number        INTEGER PRIMARY KEY,
    id            TEXT NOT NULL UNIQUE,      -- begins with its second, so that new ones lie together here, too
    charged_nanos INTEGER NOT NULL CHECK (charged_nanos BETWEEN 0 AND 4611686018427387904),
    record        BLOB NOT NULL              -- the whole Generation as MessagePack, in the bytes of the journal
) STRICT;

CREATE TABLE usage_daily (
    account_id        TEXT NOT NULL,
    day               TEXT NOT NULL,         -- UTC, YYYY-MM-DD
    key_digest        TEXT NOT NULL,
    model             TEXT NOT NULL,
    endpoint_id       TEXT NOT NULL,
    provider          TEXT NOT NULL,
    requests          INTEGER NOT NULL,
    served            INTEGER NOT NULL,      -- of these, the ones for which a provider made something
    prompt_tokens     INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    reasoning_tokens  INTEGER NOT NULL,      -- within completion_tokens
    cached_tokens     INTEGER NOT NULL,      -- within prompt_tokens
    nanos             INTEGER NOT NULL,
    PRIMARY KEY (account_id, day, key_digest, model, endpoint_id, provider)
) STRICT, WITHOUT ROWID;

CREATE INDEX usage_daily_of_key ON usage_daily (key_digest, day, nanos);

CREATE TABLE key_totals (
    key_digest TEXT PRIMARY KEY,
    requests   INTEGER NOT NULL,
    nanos      INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- What the entries of each account come to by kind, kept beside them so that no reader has to sum.
CREATE TABLE credits (
    account_id      TEXT PRIMARY KEY REFERENCES accounts (id),
    total_nanos     INTEGER NOT NULL,        -- all but usage
    purchased_nanos INTEGER NOT NULL,        -- top-ups less refunds
    used_nanos      INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

INSERT INTO credits
SELECT e.book,
       SUM(CASE WHEN t.kind = 'usage' THEN 0 ELSE e.amount_nanos END),
       SUM(CASE WHEN t.kind IN ('topup', 'refund') THEN e.amount_nanos ELSE 0 END),
       SUM(CASE WHEN t.kind = 'usage' THEN -e.amount_nanos ELSE 0 END)
FROM entries e JOIN transactions t ON t.number = e.transaction_number JOIN accounts a ON a.id = e.book GROUP BY e.book;

-- Totals since the edge started: what it was granted of a resource, and what of that its journal has settled.
CREATE TABLE leases (
    resource      TEXT NOT NULL,
    incarnation   TEXT NOT NULL,
    granted_nanos INTEGER NOT NULL CHECK (granted_nanos >= 0),
    settled_nanos INTEGER NOT NULL CHECK (settled_nanos >= 0),
    PRIMARY KEY (resource, incarnation)
) STRICT, WITHOUT ROWID;

CREATE INDEX leases_of_edge ON leases (incarnation);

-- Moved in the transaction that posts the records, so that each counts exactly once.
CREATE TABLE journal_offsets (
    file            TEXT PRIMARY KEY,
    committed_bytes INTEGER NOT NULL CHECK (committed_bytes >= 0)
) STRICT, WITHOUT ROWID;

-- Records that could not be posted: kept whole, for a person to look at.
CREATE TABLE refused_records (
    id            INTEGER PRIMARY KEY,
    file          TEXT NOT NULL,
    reason        TEXT NOT NULL,
    generation_id TEXT NOT NULL,             -- '' where it cannot be read
    record        BLOB NOT NULL,
    refused_at_ms INTEGER NOT NULL
) STRICT;
