-- usage_daily over all keys of an account: an account of 100 busy keys has 30,000 daily sums a month, and whoever looks at its
-- activity would wait for all of them to be added up.

CREATE TABLE activity_daily (
    account_id        TEXT NOT NULL,
    day               TEXT NOT NULL,         -- UTC, YYYY-MM-DD
    model             TEXT NOT NULL,
    endpoint_id       TEXT NOT NULL,
    provider          TEXT NOT NULL,
    requests          INTEGER NOT NULL,
    prompt_tokens     INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    reasoning_tokens  INTEGER NOT NULL,      -- within completion_tokens
    cached_tokens     INTEGER NOT NULL,      -- within prompt_tokens
    nanos             INTEGER NOT NULL,
    PRIMARY KEY (account_id, day, model, endpoint_id, provider)
) STRICT, WITHOUT ROWID;

INSERT INTO activity_daily
SELECT account_id, day, model, endpoint_id, provider, SUM(requests), SUM(prompt_tokens), SUM(completion_tokens), SUM(reasoning_tokens),
       SUM(cached_tokens), SUM(nanos)
FROM usage_daily GROUP BY account_id, day, model, endpoint_id, provider;
