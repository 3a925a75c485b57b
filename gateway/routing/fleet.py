"""The figures of all edges together: what control merges each second, pushes back, and shows in the endpoints API."""

from __future__ import annotations

import msgspec

from gateway.routing.figures import Figures, Merged, Observed, Percentiles, Tally
from gateway.routing.windows import CountHistory, EndpointWindows, SketchWindow

HALF_HOUR_S = 1800.0
DAY_S = 86_400.0
# An endpoint's status as the API shows it; the contract leaves the numbers below 0 open.
NORMAL = 0
HELD = -1  # a rate limit keeps some edge from trying it
EJECTED = -2  # errors put it out of service on some edges,
OUT = -5  # or on all of them
ATTEMPTS_MIN = 10  # with fewer an uptime says nothing


class Shown(msgspec.Struct, frozen=True):
    """What the endpoints API shows of one endpoint. Uptimes in percent; None: too little is known."""

    uptime_last_5m: float | None
    uptime_last_30m: float | None
    uptime_last_1d: float | None
    latency_last_30m: Percentiles | None  # milliseconds to the first token
    throughput_last_30m: Percentiles | None  # output tokens per second
    status: int = NORMAL


UNSEEN = Shown(None, None, None, None, None)


class _Endpoint:
    __slots__ = ("day", "first_s", "rate", "windows")

    def __init__(self) -> None:
        self.windows = EndpointWindows()
        self.day = CountHistory(step_s=120.0, span_s=DAY_S)
        self.first_s = SketchWindow(HALF_HOUR_S)
        self.rate = SketchWindow(HALF_HOUR_S)

    def add(self, tally: Tally, now_s: float) -> None:
        self.windows.add(tally, now_s)
        self.day.add(tally.counts, now_s)
        if tally.first_s:
            self.first_s.add(tally.first_s, now_s)
        if tally.rate:
            self.rate.add(tally.rate, now_s)


class Fleet:
    """Merges what edges observe. Endpoints that nobody called for a day are forgotten."""

    def __init__(self) -> None:
        self._endpoints: dict[str, _Endpoint] = {}
        self._seen: dict[str, int] = {}  # edge incarnation -> seq
        self._last: dict[str, Observed] = {}  # of each edge: what is under way, and what may not be tried

    def observe(self, edge: str, observed: Observed, now_s: float) -> None:
        """Count a report of this edge incarnation in; one that was counted before is skipped."""
        if observed.seq <= self._seen.get(edge, 0):
            return
        self._seen[edge] = observed.seq
        self._last[edge] = observed
        for endpoint_id, tally in observed.tallies.items():
            endpoint = self._endpoints.get(endpoint_id)
            if endpoint is None:
                endpoint = self._endpoints[endpoint_id] = _Endpoint()
            endpoint.add(tally, now_s)

    def lost(self, edge: str) -> None:
        """The edge is gone: its calls are not under way any more; what it saw stays true."""
        self._seen.pop(edge, None)
        self._last.pop(edge, None)

    def merged(self, now_s: float) -> Merged:
        """What to push to every edge."""
        inflight = self._total_inflight()
        figures: dict[str, Figures] = {}
        for endpoint_id, endpoint in list(self._endpoints.items()):
            if endpoint.windows.counts.is_idle(now_s):
                if endpoint.day.is_idle(now_s):
                    del self._endpoints[endpoint_id]
                continue
            figures[endpoint_id] = endpoint.windows.figures(now_s, inflight.get(endpoint_id, 0))
        return Merged(dict(self._seen), figures)

    def shown(self, endpoint_id: str, now_s: float) -> Shown:
        endpoint = self._endpoints.get(endpoint_id)
        if endpoint is None:
            return Shown(None, None, None, None, None, self._status(endpoint_id))
        latency = endpoint.first_s.percentiles(now_s)
        return Shown(
            _uptime(endpoint.windows.counts, 300.0, now_s),
            _uptime(endpoint.day, HALF_HOUR_S, now_s),
            _uptime(endpoint.day, DAY_S, now_s),
            Percentiles(latency.p50 * 1000, latency.p75 * 1000, latency.p90 * 1000, latency.p99 * 1000) if latency else None,
            endpoint.rate.percentiles(now_s),
            self._status(endpoint_id),
        )

    def _status(self, endpoint_id: str) -> int:
        ejected = sum(endpoint_id in observed.ejected for observed in self._last.values())
        if ejected:
            return OUT if ejected == len(self._last) else EJECTED
        return HELD if any(endpoint_id in observed.held for observed in self._last.values()) else NORMAL

    def _total_inflight(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for observed in self._last.values():
            for endpoint_id, count in observed.inflight.items():
                total[endpoint_id] = total.get(endpoint_id, 0) + count
        return total


def _uptime(history: CountHistory, window_s: float, now_s: float) -> float | None:
    """Successes of what was not rate-limited, in percent, as the contract says."""
    counts = history.last(window_s, now_s)
    judged = counts.ok + counts.failed
    return 100.0 * counts.ok / judged if judged >= ATTEMPTS_MIN else None
