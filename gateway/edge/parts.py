"""What every exchange of an edge uses."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from gateway.domain.generation import GenerationIds
from gateway.edge.admission import Admission
from gateway.edge.providers import Providers
from gateway.edge.snapshots import Keys, Snapshots
from gateway.settings import Timeouts, Upstream

if TYPE_CHECKING:
    from gateway.edge.report import ExchangeReport
    from gateway.edge.settlement import Settlement


class Parts:
    """What every exchange of an edge uses."""

    __slots__ = ("admission", "ids", "keys", "loop", "providers", "report", "settlement", "snapshots", "timeouts", "upstream")

    def __init__(
        self,
        *,
        keys: Keys,
        admission: Admission,
        settlement: Settlement,
        snapshots: Snapshots,
        providers: Providers,
        report: ExchangeReport,
        timeouts: Timeouts,
        upstream: Upstream,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.ids = GenerationIds()
        self.keys = keys
        self.admission = admission
        self.settlement = settlement
        self.snapshots = snapshots
        self.providers = providers
        self.report = report
        self.timeouts = timeouts
        self.upstream = upstream
