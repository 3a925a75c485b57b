"""Words: structs and their own invariants. No I/O, no clock, no chance."""
