"""A second call beside a slow one, where the operator pays for that: `[routing] hedge_percent`. Without it nothing of this runs.

The request's endpoint is left as it is and the next one asked as well; whoever has its first content sooner (or its whole
answer) serves, and the other is cancelled. The caller pays for the one that served. What the other cost is the operator's,
and is kept within a share of what callers were charged. At most once per request.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from gateway.domain.errors import GatewayError, Overloaded
from gateway.domain.generation import HEDGE_LOST
from gateway.domain.money import NANOS_PER_USD, parse_usd
from gateway.edge.attempts import AnswerAttempt, Attempt
from gateway.edge.caller import CallerConnection
from gateway.edge.exchange import InferenceExchange
from gateway.edge.heads import RequestHead
from gateway.edge.parts import Parts
from gateway.edge.quotes import completion_max, prompt_most
from gateway.edge.relay import StreamAttempt
from gateway.edge.selection import remaining
from gateway.edge.settlement import usage_of
from gateway.edge.snapshots import Choice
from gateway.edge.telemetry import Telemetry
from gateway.ledger.pricing import cost
from gateway.routing.budget import HedgeBudget
from gateway.routing.router import Router
from gateway.wire.envelope import Envelope, Kind
from gateway.wire.usage import BYTES_PER_TOKEN

FIRSTS_MIN = 20  # first tokens of 5 minutes, under which nobody knows what is slow
REQUEST = NANOS_PER_USD  # what a request counts for where nothing costs anything


class Hedging:
    """What all exchanges of an edge may spend, and what they did."""

    def __init__(self, percent: str, telemetry: Telemetry) -> None:
        self.money = HedgeBudget(percent)  # nanos
        self.requests = HedgeBudget(percent)  # of models that cost nothing, in REQUEST
        self.spent_usd = telemetry.counter("gateway_hedge_spend_usd_total")
        self.outcomes = {outcome: telemetry.counter("gateway_hedges_total", outcome) for outcome in ("won", "lost", "failed")}


def hedging_of(percent: str, telemetry: Telemetry) -> Hedging | None:
    """None where nothing may be spent; the figures are there all the same."""
    hedging = Hedging(percent, telemetry)
    return hedging if parse_usd(percent) else None


class _Race(NamedTuple):
    """Two attempts of which neither has content yet, and what was taken from a budget for the one that will not serve."""

    first: Attempt
    second: Attempt
    budget: HedgeBudget
    taken: int


class HedgedExchange(InferenceExchange):
    """An exchange that may ask a second endpoint. `attempt` is the first one until one of the two has content, or fails."""

    __slots__ = ("_caller_is_slow", "_has_hedged", "_hedge", "_hedging", "_is_timed", "_race", "hedge_at")

    def __init__(self, hedging: Hedging, parts: Parts, caller: CallerConnection, head: RequestHead, kind: Kind) -> None:
        super().__init__(parts, caller, head, kind)
        self._hedging = hedging
        self.hedge_at = 0.0  # when the attempt under way is slow; 0: never, or not any more
        self._hedge: Attempt | None = None  # the second one, until it is counted
        self._race: _Race | None = None  # while both run
        self._has_hedged = False
        self._is_timed = False
        self._caller_is_slow = False

    # When an attempt is slow.

    def _next_attempt(self) -> bool:
        is_under_way = super()._next_attempt()
        if is_under_way and self._choices and self.continuation is None and not self._has_hedged:
            self._watch()
        return is_under_way

    def _watch(self) -> None:
        attempt, envelope = self.attempt, self.envelope
        assert attempt is not None and envelope is not None
        if attempt.model.reasoning is not None or envelope.reasoning:
            return  # it thinks for as long as it likes, and what one costs that was cancelled while it thought nobody can tell
        live, now = attempt.choice.live, attempt.started_at
        if self.streaming:
            after_s = live.hedge_after_s(now, prompt_tokens=self._prompt_tokens())
        else:
            self._is_timed = True
            after_s = live.answer_times.slow_s(now)
        if after_s:
            self.hedge_at = at = now + after_s
            if at < self.total_at and at < self.keepalive_at and not 0 < attempt.phase_at < at:
                self._deadline.set(at, self._expired)  # as nearly always: nothing else is due sooner
            else:
                self.rearm()

    def rearm(self) -> None:
        if not self.hedge_at and self._race is None:
            super().rearm()
            return
        self._decide()
        race, attempt = self._race, self.attempt
        if attempt is not None and attempt.committed:
            self.hedge_at = 0.0
        phases = (race.first.phase_at, race.second.phase_at) if race is not None else (attempt.phase_at,) if attempt is not None else ()
        times = (self.total_at, self.keepalive_at if self.streaming else 0.0, self.hedge_at, *phases)
        self._deadline.set(min([at for at in times if at]), self._expired)

    def _expired(self) -> None:
        now, race = self.parts.loop.time() + 0.001, self._race
        if self.finished:
            return
        if self.hedge_at and now >= self.hedge_at:
            self.hedge_at = 0.0
            self._ask_another(now)
        elif race is not None and race.second.phase_at and now >= race.second.phase_at:
            race.second.phase_expired()
        super()._expired()

    # The second attempt.

    def _ask_another(self, now: float) -> None:
        """If the caller still waits, one is there that may be asked, and the node's budgets have something left."""
        parts, first, envelope = self.parts, self.attempt, self.envelope
        assert first is not None and envelope is not None
        if first.ended or first.committed or self._caller is None or self._caller_is_slow:
            return
        if self.streaming and first.choice.live.figures(now).windows[-1].firsts < FIRSTS_MIN:
            return
        choice = self._next_best(first, envelope, now)
        if choice is None or sum([each.was_sent for each in self.attempts]) >= parts.attempts_max:
            return
        most = max(self._most_nanos(first.choice, envelope), self._most_nanos(choice, envelope))
        budget, taken = (self._hedging.money, most) if most else (self._hedging.requests, REQUEST)
        if not budget.take(taken):
            return
        if not parts.retries.take(now) or (second := self._started(choice, envelope)) is None:
            budget.give_back(taken)
            return
        self._hedge = second
        self._race = _Race(first, second, budget, taken)

    def _next_best(self, first: Attempt, envelope: Envelope, now: float) -> Choice | None:
        """Of the same model, and healthy; nobody, where the caller's wishes say who comes first."""
        parts = self.parts
        if names_an_order(envelope, parts.router):
            return None
        for each in self._choices:
            if each.model is first.model and each.live.breaker.admits(now) and parts.providers.of(each.endpoint) is not None:
                return each
        return None

    def _started(self, choice: Choice, envelope: Envelope) -> Attempt | None:
        """Under way; None: its provider has its fill of calls."""
        upstream = self.parts.providers.of(choice.endpoint)
        assert upstream is not None
        self._choices.remove(choice)
        self._has_hedged = True
        total_at = self.total_at
        attempt = (StreamAttempt if self.streaming else AnswerAttempt)(self, choice, upstream)
        self.attempts.append(attempt)
        try:
            attempt.start(envelope.body_for(choice.endpoint.upstream_model, choice.limit_name, stream_options=upstream.stream_options))
        except Overloaded as full:
            attempt.not_sent(full)
            return None
        self.total_at = max(total_at, self.total_at)
        return attempt

    # One of the two serves, or fails.

    def _decide(self) -> None:
        """Attempts tell of a phase, or of the end, right after their first content: here the other one is stopped."""
        race = self._race
        if race is None or not (race.first.committed or race.second.committed):
            return
        self._race = None
        won, lost = (race.first, race.second) if race.first.committed else (race.second, race.first)
        self.attempt = won
        tokens = 0 if self.streaming else won.made_tokens()
        lost.outrun(self._prompt_tokens(), tokens)
        self._spend(race, lost, tokens)

    def attempt_failed(self, error: GatewayError) -> None:
        """Where another one is under way nothing is lost: it goes on as the only one."""
        self.hedge_at = 0.0
        race, self._race = self._race, None
        if race is None:
            super().attempt_failed(error)
            return
        failed, self.attempt = (race.first, race.second) if race.first.ended else (race.second, race.first)
        race.budget.give_back(race.taken)
        self._last_error = error
        self._choices = remaining(self._choices, failed.choice, error)
        self.rearm()

    def on_caller_slow(self) -> None:
        self._caller_is_slow = True
        self._decide()
        super().on_caller_slow()
        if self._race is not None:
            self._race.second.pause()

    def on_caller_ready(self) -> None:
        self._caller_is_slow = False
        super().on_caller_ready()
        if self._race is not None:
            self._race.second.resume()

    # The end.

    def _finish(self, status: int, error: GatewayError | None) -> None:
        if self._hedge is not None:
            self._count(self._hedge, error)
        super()._finish(status, error)

    def _count(self, hedge: Attempt, error: GatewayError | None) -> None:
        self._decide()
        race, self._race, self._hedge = self._race, None, None
        if race is not None:  # neither has content, and nobody waits for it any more
            race.second.leave(error)
            self._spend(race, race.second, 0)
        self._hedging.outcomes["won" if hedge.committed else "lost" if hedge.outcome == HEDGE_LOST else "failed"].add()

    def send_last(self) -> None:
        bill, hold, attempt = self.bill, self.hold, self.attempt
        if bill is not None and hold is not None:
            if hold.nanos:
                self._hedging.money.earn(bill.nanos, hold.nanos)
            elif bill.usage is not None:
                self._hedging.requests.earn(REQUEST, REQUEST)
            if self._is_timed and self.error is None and attempt is not None:
                attempt.choice.live.answer_times.add(attempt.first_content_at - attempt.started_at, attempt.first_content_at)
        super().send_last()

    # What it costs.

    def _prompt_tokens(self) -> int:
        assert self.envelope is not None
        return self.envelope.prompt_text_bytes // BYTES_PER_TOKEN

    def _most_nanos(self, choice: Choice, envelope: Envelope) -> int:
        """What this one can cost without serving: of a stream its prompt, for the first token ends the race."""
        return choice.worst.nanos(prompt_most(envelope), 0 if self.streaming else completion_max(envelope, choice), envelope.images)

    def _spend(self, race: _Race, lost: Attempt, tokens: int) -> None:
        """What the one that did not serve is taken to have cost: the prompt, and as many tokens as the answer that came before its own."""
        assert self.envelope is not None
        if race.budget is self._hedging.requests:
            return
        usage = usage_of(self.envelope, lost, was_cut=True)
        usage = msgspec.structs.replace(usage, completion_tokens=min(tokens, completion_max(self.envelope, lost.choice)))
        nanos = cost(lost.endpoint.price, usage, self.created_s).total_nanos
        race.budget.give_back(race.taken - nanos)
        self._hedging.spent_usd.add(nanos / NANOS_PER_USD)


def names_an_order(envelope: Envelope, router: Router[Choice]) -> bool:
    """Whether the caller wishes endpoints to be tried in an order of its own, or one alone."""
    wished = router.wishes.find(envelope.provider, envelope.route)
    if wished.order or wished.wishes.sort is not None or wished.alone:
        return True
    try:
        return router.resolve(envelope.model).sort is not None
    except GatewayError:  # a catalog has come meanwhile that has no such model
        return True
