"""The journal's framing: what an edge appends and control reads.

A record is 4 bytes of length, 4 bytes of CRC-32 (both big-endian), and that many bytes of MessagePack. A tail that was
torn by a crash ends before its length; a record that was damaged later fails its checksum and is told apart from it.
"""

from __future__ import annotations

import struct
import zlib

import msgspec

from gateway.domain.generation import Generation

HEADER = struct.Struct(">II")
RECORD_BYTES_MAX = 1 << 20

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Generation)


class Batch(msgspec.Struct):
    """What a run of journal bytes holds. `consumed` bytes are done with; the rest is incomplete."""

    generations: list[Generation]
    corrupt: list[bytes]  # whole damaged records, frame included
    consumed: int
    unreadable: bool = False  # no record boundary can be found from `consumed` on


def running_name(slot: int, incarnation: str) -> str:
    """The file beside an edge's journal with the marks of its running streams: records as in the journal."""
    return f"running-{slot}-{incarnation}"


def encode(generation: Generation) -> bytes:
    payload = _encoder.encode(generation)
    assert len(payload) <= RECORD_BYTES_MAX
    return HEADER.pack(len(payload), zlib.crc32(payload)) + payload


def decode(data: bytes, records_max: int = RECORD_BYTES_MAX) -> Batch:
    """The whole records at the start of `data`, at most `records_max` of them. Never raises."""
    batch = Batch(generations=[], corrupt=[], consumed=0)
    at = 0
    while len(data) - at >= HEADER.size and len(batch.generations) + len(batch.corrupt) < records_max:
        length, checksum = HEADER.unpack_from(data, at)
        if length == 0 or length > RECORD_BYTES_MAX:
            batch.unreadable = True
            break
        end = at + HEADER.size + length
        if end > len(data):
            break
        payload = data[at + HEADER.size : end]
        try:
            if zlib.crc32(payload) != checksum:
                raise msgspec.DecodeError("checksum")
            batch.generations.append(_decoder.decode(payload))
        except msgspec.DecodeError:
            batch.corrupt.append(data[at:end])
        at = end
    batch.consumed = at
    return batch
