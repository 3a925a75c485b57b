"""What an edge promises its callers, tested through a running gateway."""
