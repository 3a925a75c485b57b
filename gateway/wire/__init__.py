"""Bytes in, structs out. Synchronous, no sockets."""
