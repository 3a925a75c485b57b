"""Answers of real servers, byte for byte as they came over the socket: head, chunked coding and all.

llama_cpp: llama.cpp's own server as built into xllamacpp 2026.10.11549, one thread, Gemma 3 270M (Q4_K_M), recorded on
2026-11-25. Tool calls and reasoning were had with chat templates for them (Hermes' and Qwen's forms).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent


class Recording(NamedTuple):
    """One answer. `chunks` are the pieces that the server wrote; a body of known length is one piece."""

    raw: bytes
    status: int
    headers: dict[str, str]
    chunks: list[bytes]

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)


def names(server: str, kind: str) -> list[str]:
    """The recordings of one kind: stream, whole or error."""
    found = sorted(path.stem for path in (FOLDER / server).glob(f"{kind}*.http"))
    assert found, f"no recording {server}/{kind}"
    return found


def recording(server: str, name: str) -> Recording:
    raw = (FOLDER / server / f"{name}.http").read_bytes()
    head, _, rest = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {field.lower(): value.strip() for field, _, value in (line.partition(":") for line in lines)}
    chunks = _chunks(rest) if headers.get("transfer-encoding") == "chunked" else [rest]
    return Recording(raw, int(first.split(" ")[1]), headers, chunks)


def _chunks(rest: bytes) -> list[bytes]:
    found: list[bytes] = []
    while True:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            assert rest == b"\r\n"
            return found
        found.append(rest[:length])
        assert rest[length : length + 2] == b"\r\n"
        rest = rest[length + 2 :]
