"""Whole processes: how a gateway starts, is watched, drains and dies."""
