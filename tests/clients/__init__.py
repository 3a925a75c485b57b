"""Clients that people use, driven against a running gateway."""
