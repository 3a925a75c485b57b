-- How far generations were removed, oldest first. Their entries and daily sums stay, so what they came to is still in the books.

CREATE TABLE retention (
    only_row    INTEGER PRIMARY KEY CHECK (only_row = 1),
    number      INTEGER NOT NULL,            -- generations up to this number are gone
    entry_nanos INTEGER NOT NULL,            -- what those of them charged that are of its entry, which may have others left
    generations INTEGER NOT NULL,            -- gone, ever
    nanos       INTEGER NOT NULL,            -- what they charged
    horizon_ms  INTEGER NOT NULL             -- whether an exchange that ended before this was posted, nobody can tell any more
) STRICT;

INSERT INTO retention VALUES (1, -1, 0, 0, 0, 0);
