"""Money in memory: synchronous, integer, exact."""
