-- What accounts were given, apart from the millions of entries that say what they used: what expires is looked up by it.

CREATE INDEX entries_of_credit ON entries (book) WHERE amount_nanos > 0 AND book >= 'user_';
