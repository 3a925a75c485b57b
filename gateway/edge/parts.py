"""What every exchange of an edge uses."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from gateway.domain.generation import GenerationIds
from gateway.edge.admission import Admission
from gateway.edge.intake import Intake
from gateway.edge.providers import Providers
from gateway.edge.site import Site
from gateway.edge.snapshots import Choice, Keys
from gateway.routing.budget import RetryBudget
from gateway.routing.router import Router
from gateway.settings import Timeouts, Upstream

if TYPE_CHECKING:
    from gateway.edge.content import Contents
    from gateway.edge.report import ExchangeReport
    from gateway.edge.settlement import Settlement


class Parts:
    """What every exchange of an edge uses."""

    __slots__ = (
        "admission", "attempts_max", "contents", "ids", "intake", "keys", "loop", "providers", "report", "retries", "router", "settlement",
        "site", "timeouts", "upstream",
    )  # fmt: skip

    def __init__(
        self,
        *,
        keys: Keys,
        admission: Admission,
        settlement: Settlement,
        site: Site,
        router: Router[Choice],
        retries: RetryBudget,
        attempts_max: int,
        providers: Providers,
        report: ExchangeReport,
        timeouts: Timeouts,
        upstream: Upstream,
        contents: Contents,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.ids = GenerationIds()
        self.intake = Intake(self.loop)
        self.keys = keys
        self.admission = admission
        self.settlement = settlement
        self.site = site
        self.router = router
        self.retries = retries
        self.attempts_max = attempts_max
        self.providers = providers
        self.report = report
        self.timeouts = timeouts
        self.upstream = upstream
        self.contents = contents
