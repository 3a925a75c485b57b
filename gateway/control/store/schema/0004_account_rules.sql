-- What accounts allow to be done with their requests. An account without a row has the defaults of the program.

CREATE TABLE account_rules (
    account_id TEXT PRIMARY KEY REFERENCES accounts (id),
    rules      TEXT NOT NULL CHECK (json_valid(rules))  -- every rule by its name, so that later defaults change nothing
) STRICT, WITHOUT ROWID;
