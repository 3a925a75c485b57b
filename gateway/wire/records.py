"""The journal's framing: what an edge appends and control reads.

A record is 4 bytes of length, 4 bytes of CRC-32 (both big-endian), and that many bytes of MessagePack. A tail that was
torn by a crash ends before its length; a record that was damaged later fails its checksum and is told apart from it.
"""

from __future__ import annotations

import struct
import zlib

import msgspec

from gateway.domain.generation import Generation
from gateway.domain.generation import encode as encode_generation

HEADER = struct.Struct(">II")
RECORD_BYTES_MAX = 1 << 20


class Run(msgspec.Struct):
    """What a run of journal bytes holds. `consumed` bytes are done with; the rest is incomplete."""

    records: list[bytes]  # still encoded, since a store keeps them as they are
    corrupt: list[bytes]  # whole damaged records, frame included
    consumed: int
    unreadable: bool = False  # no record boundary can be found from `consumed` on


def running_name(slot: int, incarnation: str) -> str:
    """The file beside an edge's journal with the marks of its running streams: records as in the journal."""
    return f"running-{slot}-{incarnation}"


def encode(generation: Generation) -> bytes:
    payload = encode_generation(generation)
    assert len(payload) <= RECORD_BYTES_MAX
    return HEADER.pack(len(payload), zlib.crc32(payload)) + payload


def split(data: bytes, records_max: int) -> Run:
    """The whole records at the start of `data`, at most `records_max` of them. Never raises; what they say is not looked at."""
    whole: list[bytes] = []
    corrupt: list[bytes] = []
    header, header_bytes, crc32 = HEADER.unpack_from, HEADER.size, zlib.crc32
    at, last, unreadable = 0, len(data) - header_bytes, False
    while at <= last and len(whole) + len(corrupt) < records_max:
        length, checksum = header(data, at)
        if not 0 < length <= RECORD_BYTES_MAX:
            unreadable = True
            break
        begin = at + header_bytes
        end = begin + length
        if end > len(data):
            break
        payload = data[begin:end]
        if crc32(payload) == checksum:
            whole.append(payload)
        else:
            corrupt.append(data[at:end])
        at = end
    return Run(whole, corrupt, at, unreadable)
