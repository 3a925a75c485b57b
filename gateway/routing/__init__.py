"""Choosing an endpoint. Synchronous: same arguments, same answer."""
