"""What accounts have kept of their exchanges: requests and answers, encrypted, in a file apart from the ledger's.

It is kept as well as can be, and never at the cost of anything else: what does not fit the queue or the file, and what comes
while the file fails, is dropped and counted. Its failures are `StoreUnavailable` like the ledger's, and stay here.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from gateway.domain.errors import OurFault, StoreUnavailable

# off: the account does not want it any more. deleted: it asked for everything until then to be deleted. queue: more came than
# could be written. full: the file is. no_key: there is no key to encrypt it with. failed: the file, or the store, did not answer.
DropReason = Literal["off", "deleted", "queue", "full", "no_key", "failed"]


class Exchange(msgspec.Struct, frozen=True):
    """What was said, as it is encrypted: all of it but whose it is and when."""

    request: bytes  # the caller's body as it came
    answer: bytes  # as the caller got it: a JSON body, or the events of a stream
    truncated: bool = False  # there was more than is kept of an exchange


class Added(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a batch. What is in neither number was there already."""

    stored: int
    deleted: int  # its account has asked meanwhile that everything until then be deleted


class Rotated(msgspec.Struct, frozen=True, kw_only=True):
    """A part of what there was to encrypt anew."""

    rotated: int  # records
    unreadable: int  # under a key that is not there, or damaged: they stay as they are
    after: tuple[str, int] | None  # where to go on; None: that was all


class ContentUnreadable(OurFault):
    """It is kept, and cannot be decrypted. The message says what is missing and tells nothing of what was said."""

    status = 500  # asking again would not help
    error_type = "server"
    code = "content_unreadable"


class ContentFull(StoreUnavailable):
    """There is no room for more."""

    code = "content_full"
