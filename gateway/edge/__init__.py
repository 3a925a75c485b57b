"""The data plane: callers on one side, providers on the other. Read `exchange.py` first."""
