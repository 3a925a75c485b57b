"""Messages of the link, and their framing: 4 bytes of big-endian length, then MessagePack.

Both sides are started by one supervisor, yet a rolling restart lets old and new code meet: `VERSION` is said first,
unknown fields are skipped, and a peer of another version is refused with a reason instead of misread.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec

from gateway.domain.catalog import Catalog
from gateway.domain.keys import KeyRecord
from gateway.domain.metrics import Samples
from gateway.routing.figures import Merged, Observed

VERSION = 1
FRAME_BYTES_MAX = 64 * 1024 * 1024  # a catalog of 10,000 endpoints is 6 MB


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Edge -> control, first."""

    version: int
    slot: int
    incarnation: str  # unique per process start
    pid: int
    takes_figures: bool = False  # whether it knows FleetFigures; an edge of an earlier version does not


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """Control -> edge, the answer: all snapshots an edge needs before it may admit."""

    version: int
    catalog: Catalog
    control: str  # control's own incarnation
    takes_observations: bool = False  # whether it knows Observation; a control of an earlier version does not
    takes_content: bool = False  # the same for Content
    takes_changes: bool = False  # whether a Report may hold only what changed since the last one


class Unwelcome(msgspec.Struct, frozen=True, tag="unwelcome"):
    """Control -> edge: the link cannot be used; control closes it."""

    reason: str


class FindKey(msgspec.Struct, frozen=True, tag="find_key"):
    """Edge -> control: who is this digest? Answered once by KeyFound with the same id."""

    id: int
    digest: str


class KeyFound(msgspec.Struct, frozen=True, tag="key_found"):
    id: int
    key: KeyRecord | None  # None: no such key
    unavailable: bool = False  # the store did not answer; never to be taken for "no such key"


class KeyChanged(msgspec.Struct, frozen=True, tag="key_changed"):
    """Control -> every edge: forget what you know of this digest; `key` is the new truth (None: revoked)."""

    digest: str
    key: KeyRecord | None


class CatalogChanged(msgspec.Struct, frozen=True, tag="catalog_changed"):
    """Control -> every edge: the new catalog, whole."""

    catalog: Catalog


class Report(msgspec.Struct, frozen=True, tag="report"):
    """Edge -> control, each second and once before it leaves: all its figures since it started, or what changed of them
    since the last report on this connection.
    """

    samples: Samples


class Observation(msgspec.Struct, frozen=True, tag="observation"):
    """Edge -> control, each second while there is news: what became of its attempts since the last one, by endpoint."""

    observed: Observed


class FleetFigures(msgspec.Struct, frozen=True, tag="fleet_figures"):
    """Control -> every edge, each second while endpoints are called: the figures of all edges together."""

    merged: Merged


class Standing(msgspec.Struct, frozen=True, tag="standing"):
    """Edge -> control, right after each welcome: what the edge believes to have been granted, by resource, in nanos.

    The edge can only spend what it knows of, so its numbers win over control's.
    """

    granted: dict[str, int]


class Want(msgspec.Struct, frozen=True, tag="want"):
    """Edge -> control: lease me more of this resource. Answered once by Grant. Amounts in nanos, or in requests."""

    resource: str
    at_least: int  # what waits for it; 0: a renewal ahead of need, or a look whether what is free may be served
    demand: int  # what this edge would spend of it in 10 s


class Back(msgspec.Struct, frozen=True, tag="back"):
    """Edge -> control: this much of what was granted is unused and may be granted elsewhere. The answer to Recall, too."""

    resource: str
    nanos: int


class Journaled(msgspec.Struct, frozen=True, tag="journaled"):
    """Edge -> control: records wait in the journal. Not repeated before control has answered with Committed."""


class Content(msgspec.Struct, frozen=True, tag="content"):
    """Edge -> control: what one exchange of an account that logs its prompts said. Sent once, after its end; never kept by the edge."""

    generation_id: str
    account_id: str
    created_at_ms: int
    request: bytes  # the caller's body as it came
    answer: bytes  # as the caller got it: a JSON body, or the events of a stream
    truncated: bool = False  # there was more than is kept of an exchange

    def __repr__(self) -> str:
        return f"<Content {self.generation_id} {len(self.request)} + {len(self.answer)} bytes>"


class Grant(msgspec.Struct, frozen=True, tag="grant"):
    """Control -> edge: the answer to Want. `nanos` is on top of all that was granted before."""

    resource: str
    nanos: int
    refused: bool = False  # there is less than `at_least`, also after everything unused was recalled
    unavailable: bool = False  # the store did not answer
    free_nanos: int = 0  # with a refusal: what is left of the resource, all leases returned; may be negative
    limit: int = 0  # with a refusal: what there was before any lease; of a quota or a rate its limit, in requests


class Recall(msgspec.Struct, frozen=True, tag="recall"):
    """Control -> edge: another edge runs short; give back what is unused, with Back, also when it is nothing."""

    resource: str


class Funded(msgspec.Struct, frozen=True, tag="funded"):
    """Control -> every edge: a refusal of this resource is to be forgotten; there may be more now."""

    resource: str


class Committed(msgspec.Struct, frozen=True, tag="committed"):
    """Control -> edge: its journal is in the store up to here."""

    file: str  # name within the journal's folder
    offset: int  # bytes


Telling = Standing | Want | Back | Journaled
EdgeMessage = Hello | FindKey | Report | Observation | Standing | Want | Back | Journaled | Content
ControlMessage = Welcome | Unwelcome | KeyFound | KeyChanged | CatalogChanged | Grant | Recall | Funded | Committed | FleetFigures

_encoder = msgspec.msgpack.Encoder()
_edge_decoder = msgspec.msgpack.Decoder(EdgeMessage)
_control_decoder = msgspec.msgpack.Decoder(ControlMessage)


class LinkError(Exception):
    """The peer broke the framing or sent what is not a message."""


def frame(message: EdgeMessage | ControlMessage) -> bytes:
    payload = _encoder.encode(message)
    return struct.pack(">I", len(payload)) + payload


def decode_from_edge(payload: bytes) -> EdgeMessage:
    try:
        message: EdgeMessage = _edge_decoder.decode(payload)
    except msgspec.DecodeError as error:
        raise LinkError(str(error)) from None
    return message


def decode_from_control(payload: bytes) -> ControlMessage:
    try:
        message: ControlMessage = _control_decoder.decode(payload)
    except msgspec.DecodeError as error:
        raise LinkError(str(error)) from None
    return message


class Frames:
    """Incremental unframing: feed bytes of any size, iterate whole payloads."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Payloads completed by `data`. Raises LinkError on a frame over `FRAME_BYTES_MAX`."""
        self._buffer += data
        while len(self._buffer) >= 4:
            (size,) = struct.unpack_from(">I", self._buffer)
            if size > FRAME_BYTES_MAX:
                raise LinkError(f"frame of {size} bytes")
            if len(self._buffer) < 4 + size:
                return
            payload = bytes(self._buffer[4 : 4 + size])
            del self._buffer[: 4 + size]
            yield payload
