"""What the whole fleet saw of endpoints lately, read back from a Prometheus server when a node starts, so that it starts warm.

Best effort: a server that does not answer, or says what cannot be used, leaves the node to learn by itself. Prometheus knows
endpoints by provider and model only, so those that share both (tags such as `north/fp8`) start cold.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping

import aiohttp
import msgspec

from gateway.domain import errors
from gateway.domain.catalog import Catalog
from gateway.log import Log
from gateway.routing.figures import WINDOWS_S, Counts, Observed, Tally
from gateway.routing.sketch import Sketch, bucket

WINDOW = f"{WINDOWS_S[-1]}s"
ANSWER_S = 5.0
ANSWER_BYTES_MAX = 16 * 1024 * 1024
PARTS = 8  # places within a histogram's bucket over which its count is spread

FIRST = "gen_ai_server_time_to_first_token_seconds"
PER_TOKEN = "gen_ai_server_time_per_output_token_seconds"  # noqa: S105 (no secret)
TOKENS = "gen_ai_client_token_usage"
ATTEMPTS = "gateway_attempts_total"

Served = tuple[str, str]  # provider, model
Labelled = dict[Served, dict[str, float]]  # by one further label


class PrometheusFailed(Exception):
    """The server could not be asked, or its answer cannot be used."""


class _Series(msgspec.Struct, frozen=True):
    metric: dict[str, str]
    value: tuple[float, str]  # unix time, figure


class _Data(msgspec.Struct, frozen=True):
    result: list[_Series]


class _Answer(msgspec.Struct, frozen=True):
    data: _Data


_decode = msgspec.json.Decoder(_Answer).decode


async def read_back(url: str, catalog: Catalog, log: Log) -> Observed | None:
    """The last five minutes as one observation, of the endpoints in this catalog; None: nothing could be had."""
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_S)) as session:
            tallies = await _tallies(session, url.rstrip("/"), catalog)
    except PrometheusFailed as failed:
        log.warning("prometheus_not_read", reason=str(failed)[:200])
        return None
    log.info("prometheus_read", endpoints=len(tallies))
    return Observed(1, tallies, {}) if tallies else None


async def _tallies(session: aiohttp.ClientSession, url: str, catalog: Catalog) -> dict[str, Tally]:
    attempts, tokens, firsts, first_s, per_token, per_token_s = await asyncio.gather(
        _increase(session, url, ATTEMPTS, "outcome"),
        _increase(session, url, TOKENS, "token_type"),
        _increase(session, url, FIRST + "_bucket", "le"),
        _increase(session, url, FIRST + "_sum"),
        _increase(session, url, PER_TOKEN + "_bucket", "le"),
        _increase(session, url, PER_TOKEN + "_sum"),
    )
    endpoints: dict[Served, list[str]] = {}
    for model in catalog.models.values():
        for endpoint in model.endpoints:
            endpoints.setdefault((endpoint.provider, model.id), []).append(endpoint.id)
    found: dict[str, Tally] = {}
    for served, outcomes in attempts.items():
        ids = endpoints.get(served, [])
        if len(ids) != 1:
            continue
        counts = _outcomes(outcomes)
        first_sketch = _sketch(firsts.get(served, {}), rates=False)
        rate_sketch = _sketch(per_token.get(served, {}), rates=True)
        used = tokens.get(served, {})
        began, timed = sum(first_sketch.values()), sum(rate_sketch.values())
        output = round(used.get("output", 0.0))
        counts = counts._replace(
            firsts=began,
            first_us=round(first_s.get(served, {}).get("", 0.0) * 1e6),
            prompt_tokens=round(used.get("input", 0.0) * began / counts.ok) if counts.ok else 0,
            answers=timed,
            tokens=output,
            gen_us=round(output * per_token_s.get(served, {}).get("", 0.0) / timed * 1e6) if timed else 0,
        )
        if counts.attempts:
            found[ids[0]] = Tally(counts, first_sketch, rate_sketch)
    return found


async def _increase(session: aiohttp.ClientSession, url: str, name: str, label: str = "") -> Labelled:
    """By how much a metric grew in the window, over all nodes. Raises PrometheusFailed."""
    by = ",".join(filter(None, ("provider", "model", label)))
    query = f"sum by ({by}) (increase({name}[{WINDOW}]))"
    try:
        async with session.get(f"{url}/api/v1/query", params={"query": query}) as answer:
            body = await answer.content.read(ANSWER_BYTES_MAX + 1)
            while len(body) <= ANSWER_BYTES_MAX and (more := await answer.content.read(ANSWER_BYTES_MAX + 1 - len(body))):
                body += more
            if answer.status != 200:
                raise PrometheusFailed(f"{answer.status} for {query}")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise PrometheusFailed(f"{type(error).__name__}: {error}") from None
    if len(body) > ANSWER_BYTES_MAX:
        raise PrometheusFailed(f"more than {ANSWER_BYTES_MAX} bytes for {query}")
    try:
        series = _decode(body).data.result
        found: Labelled = {}
        for each in series:
            served = (each.metric.get("provider", ""), each.metric.get("model", ""))
            figure = float(each.value[1])
            if math.isfinite(figure) and figure >= 0:
                found.setdefault(served, {})[each.metric.get(label, "")] = figure
    except (msgspec.MsgspecError, ValueError) as error:
        raise PrometheusFailed(f"not an answer to {query}: {error}") from None
    return found


def _outcomes(outcomes: Mapping[str, float]) -> Counts:
    """By whose fault an attempt ended: what was the caller's, or ours, says nothing of the endpoint."""
    ok = round(outcomes.get("ok", 0.0))
    throttled = round(outcomes.get(errors.Throttled.code, 0.0))
    failed = round(sum(figure for code, figure in outcomes.items() if code in _FAILURES))
    return Counts(ok=ok, failed=failed, throttled=throttled)


def _classes(kind: type[errors.GatewayError]) -> Iterator[type[errors.GatewayError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _classes(each)


_FAILURES = frozenset(
    kind.code for kind in _classes(errors.UpstreamFault) if kind.fault == "upstream" and kind.code != errors.Throttled.code
)


def _sketch(buckets: Mapping[str, float], *, rates: bool) -> Sketch:
    """A histogram of seconds, given as cumulative counts by upper bound; `rates`: of its values' inverses."""
    sketch: Sketch = {}
    below, counted = 0.0, 0.0
    for bound, count in sorted((float(bound), count) for bound, count in buckets.items()):
        upper = bound if math.isfinite(bound) else below * 2
        number = round(count) - round(counted)
        parts = min(number, PARTS)
        for part in range(parts):
            value = below + (upper - below) * (part + 0.5) / parts
            index = bucket(1 / value if rates else value)
            sketch[index] = sketch.get(index, 0) + number * (part + 1) // parts - number * part // parts
        below, counted = upper, max(counted, count)
    return sketch
