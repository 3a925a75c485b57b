"""One endpoint as one edge lives with it: what is under way, what happened, whether it may be tried.

The edge tells each attempt's begin, first content and end; every call is O(1). `figures` is what the scorer reads: what the
fleet saw, as control pushed it, and what this edge saw since; without control, what this edge saw alone.
"""

from __future__ import annotations

from collections import deque
from math import floor

from gateway.routing.breaker import Breaker, BreakerRules
from gateway.routing.budget import first_token_limit_s, hedge_after_s
from gateway.routing.figures import NOTHING, WINDOWS_S, Counts, Figures, Percentiles, Tally
from gateway.routing.pace import Pace
from gateway.routing.sketch import bucket
from gateway.routing.windows import AnswerTimes, EndpointWindows

MERGED_S_MAX = 5.0  # older than this, control is taken to be away
OVERDUE_TIMES = 2.0  # a stream that waits so many times as long as usual for its first token is news before the token comes
OVERDUE_S_COLD = 5.0  # the same where nothing is usual yet
LOOKS_MAX = 64
PERCENTILES_S = 5.0  # they move slowly, and sorting a histogram costs 20 us
PERCENTILES_S_UNKNOWN = 0.5  # of an empty one it costs nothing
SURPRISE_TIMES = 0.6  # a first token in so small a part of what was expected asks for another look
PROBE_GAP_S, PROBE_GAP_S_FAILED, PROBE_GAP_S_MAX = 0.5, 2.0, 16.0
SKETCHES_S = 1.0  # histograms are counted in no more often, but for whoever reads them
LIMIT_SPAN_S, LIMIT_CALLS = 2.0, 5  # over which a rate that was accepted is taken
STARTS_MAX = 20  # half seconds


class Changes:
    """Counts what must be reconsidered at once; shared by all that depends on it."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Live:
    """The state of an endpoint on this edge. Lives as long as the process, whatever the catalog does."""

    __slots__ = (
        "_answers",
        "_begun",
        "_changes",
        "_failed",
        "_first_sketch",
        "_first_us",
        "_firsts",
        "_gen_us",
        "_merged",
        "_merged_at_s",
        "_ok",
        "_outage_s",
        "_percentiles",
        "_percentiles_until_s",
        "_prompt_tokens",
        "_rate_sketch",
        "_serial",
        "_sketches_at_s",
        "_starts",
        "_throttled",
        "_throttled_total",
        "_tokens",
        "_unseen",
        "_unsent",
        "_waiting",
        "_windows",
        "answer_times",
        "breaker",
        "endpoint_id",
        "expected_s",
        "inflight",
        "introduced",
        "pace",
        "probe_at_s",
        "probe_gap_s",
        "ramp_from_s",
    )

    def __init__(self, endpoint_id: str, rules: BreakerRules, *, outage_s: float, changes: Changes) -> None:
        self.endpoint_id = endpoint_id
        self.breaker = Breaker(rules)
        self.pace = Pace()
        self.answer_times = AnswerTimes()  # kept only where somebody asks for them
        self.inflight = 0
        self.introduced = False  # whether it ever had a share by its figures
        self.expected_s = 0.0  # to the first token, as last estimated; 0: unknown
        self.probe_at_s = 0.0
        self.probe_gap_s = PROBE_GAP_S
        self.ramp_from_s = float("-inf")
        self._outage_s = outage_s
        self._changes = changes
        self._serial = 0
        self._waiting: dict[int, float] = {}  # streams without a first token: attempt -> begun, the oldest first
        self._begun = self._throttled_total = 0
        self._starts: deque[tuple[float, int]] = deque(maxlen=STARTS_MAX)
        self._windows = EndpointWindows()
        self._unsent = Tally()
        self._unseen: deque[tuple[int, Counts]] = deque(maxlen=8)  # reported, and not in the merged figures yet
        self._merged: Figures | None = None
        self._merged_at_s = float("-inf")
        self._percentiles: tuple[Percentiles | None, Percentiles | None] = (None, None)
        self._percentiles_until_s = float("-inf")
        self._ok = self._failed = self._throttled = 0
        self._firsts = self._first_us = self._prompt_tokens = 0
        self._answers = self._tokens = self._gen_us = 0
        self._first_sketch: dict[int, int] = {}
        self._rate_sketch: dict[int, int] = {}
        self._sketches_at_s = float("-inf")  # when they are due to be counted in

    def __repr__(self) -> str:
        return f"<Live {self.endpoint_id} {self.breaker!r} first {self.expected_s * 1000:.0f}ms inflight {self.inflight}>"

    @property
    def was_called(self) -> bool:
        """Since this process started."""
        return self._begun > 0

    # Told by attempts.

    def admits(self, now_s: float) -> bool:
        """To be asked before a fallback is tried: much may have changed since its order was made. Where nothing is left that
        is admitted, any may be tried that is not held.
        """
        return self.breaker.admits(now_s) or self.breaker.admits_probe(now_s)

    def is_held(self, now_s: float) -> bool:
        """Whether its provider said not to come back yet: then nothing is sent, whatever else fails."""
        return now_s < self.breaker.held_until_s

    def begin(self, now_s: float, *, stream: bool) -> int:
        """An attempt goes out. Returns its number, to be given back with each of the calls below."""
        self._serial = attempt = self._serial + 1
        self._begun += 1
        self.inflight += 1
        if stream:
            self._waiting[attempt] = now_s
        if self.breaker.ejected:
            self.breaker.began(attempt)
        return attempt

    def first_content(self, attempt: int, now_s: float, prompt_tokens: int = 0) -> None:
        """A stream's first content byte."""
        begun = self._waiting.pop(attempt, None)
        if begun is None:
            return
        took_s = now_s - begun
        self._firsts += 1
        self._first_us += floor(took_s * 1e6)
        self._prompt_tokens += prompt_tokens
        index = bucket(took_s)
        self._first_sketch[index] = self._first_sketch.get(index, 0) + 1
        if took_s < self.expected_s * SURPRISE_TIMES and self.probe_gap_s > PROBE_GAP_S:
            self._look_again(now_s)
        if self.breaker.ejected and self.breaker.succeeded(attempt, now_s):
            self._healed(now_s)

    def succeeded(self, attempt: int, now_s: float, *, tokens: int = 0, gen_s: float = 0.0) -> None:
        """The answer is whole. `gen_s`: a stream's time since its first content, a whole answer's since it was asked for."""
        self._end(attempt)
        self._ok += 1
        if tokens > 0 and gen_s > 0:
            self._answers += 1
            self._tokens += tokens
            self._gen_us += floor(gen_s * 1e6)
            index = bucket(tokens / gen_s)
            self._rate_sketch[index] = self._rate_sketch.get(index, 0) + 1
        breaker = self.breaker
        failures = breaker.failures_in_a_row
        if breaker.succeeded(attempt, now_s) or failures > 1:
            self._healed(now_s)
        elif failures:
            self._look_again(now_s)

    def failed(self, attempt: int, now_s: float, retry_after_s: float | None = None) -> None:
        """The provider's fault, before or after the first content."""
        self._end(attempt)
        self._failed += 1
        self._roll(now_s)
        lately = self._windows.counts.last(self._outage_s, now_s)
        self.breaker.failed(attempt, now_s, attempts=lately.ok + lately.failed, failed=lately.failed)
        if retry_after_s is not None:
            self.breaker.hold(now_s, retry_after_s)
        self.probe_gap_s = max(self.probe_gap_s, PROBE_GAP_S_FAILED)
        self.probe_at_s = now_s + self.probe_gap_s
        self._changes.count += 1

    def throttled(self, attempt: int, now_s: float, retry_after_s: float | None = None) -> None:
        """A 429."""
        self._end(attempt)
        self._throttled += 1
        self._throttled_total += 1
        self.breaker.throttled(attempt, now_s, retry_after_s)
        if (accepted_per_s := self._accepted_per_s(now_s)) > 0:
            self.pace.met_limit(now_s, accepted_per_s)
        self._changes.count += 1

    def told_nothing(self, attempt: int) -> None:
        """The caller's own fault, the caller left, or it never went out: no word on the endpoint."""
        self._end(attempt)
        self.breaker.told_nothing(attempt)

    def outrun(self, attempt: int, now_s: float, waited_s: float, *, prompt_tokens: int = 0, tokens: int = 0) -> None:
        """Cancelled after `waited_s`, because another endpoint was quicker: neither success nor failure.

        That it was slow is counted as far as it showed: a stream's first token as one that came now, a whole answer as one
        whose `tokens` (the other's) are made now. What had not waited longer than usual says nothing, least of all that it is quick.
        """
        self._roll(now_s)
        usual = self.figures(now_s).windows[-1]
        tally = None
        if attempt in self._waiting:
            if usual.firsts and waited_s * 1e6 * usual.firsts > usual.first_us:
                tally = Tally(Counts(firsts=1, first_us=int(waited_s * 1e6), prompt_tokens=prompt_tokens), {bucket(waited_s): 1}, {})
        elif tokens and waited_s * 1e6 * usual.tokens > usual.gen_us * tokens:
            tally = Tally(Counts(answers=1, tokens=tokens, gen_us=int(waited_s * 1e6)), {}, {bucket(tokens / waited_s): 1})
            self.answer_times.add(waited_s, now_s)
        if tally is not None:
            self._windows.add(tally, now_s)
            self._unsent.add(tally)
        self.told_nothing(attempt)

    # Asked each second, and whenever traffic is shared out anew.

    def figures(self, now_s: float) -> Figures:
        """The counts to judge by, calls that are overdue included. Percentiles are in `percentiles`."""
        self._roll(now_s)
        counts = NOTHING
        if (merged := self._believed(now_s)) is not None:
            windows, counts = merged.windows, self._unsent.counts
            for _, unseen in self._unseen:
                counts = counts.plus(unseen)
        else:
            windows = self._windows.counts.windows(now_s)
        if self._waiting and (overdue := self._overdue(windows[-1], now_s)) is not NOTHING:
            counts = counts.plus(overdue)
        if counts != NOTHING:
            now, short, minute, long = windows
            windows = (now.plus(counts), short.plus(counts), minute.plus(counts), long.plus(counts))
        breaker = self.breaker
        return Figures(windows, None, None, self.inflight, breaker.failures_in_a_row, breaker.successes_in_a_row)

    def percentiles(self, now_s: float) -> tuple[Percentiles | None, Percentiles | None]:
        """Of 5 minutes: seconds to the first token, tokens per second. Worked out every few seconds at most."""
        if now_s >= self._percentiles_until_s:
            self._percentiles_until_s = now_s + PERCENTILES_S
            self._roll(now_s)
            self._roll_sketches(now_s)
            windows = self._windows
            merged = self._believed(now_s)
            if merged is not None:
                self._percentiles = merged.first_s, merged.rate
            else:
                self._percentiles = windows.first_s.percentiles(now_s), windows.rate.percentiles(now_s)
        return self._percentiles

    def first_token_limit_s(self, now_s: float, *, prompt_tokens: int, reasoning: bool) -> float:
        """Seconds after which a silent stream is given up for the next endpoint."""
        counts = self._windows.counts.total
        usual = counts.prompt_tokens / counts.firsts if counts.firsts else 0.0
        return first_token_limit_s(self.percentiles(now_s)[0], usual, prompt_tokens=prompt_tokens, reasoning=reasoning)

    def hedge_after_s(self, now_s: float, *, prompt_tokens: int) -> float:
        """Seconds after which a stream is slow that has no content yet; 0.0: nobody knows."""
        counts = self._windows.counts.total
        usual = counts.prompt_tokens / counts.firsts if counts.firsts else 0.0
        first_s = self.percentiles(now_s)[0]
        if first_s is None:
            self._percentiles_until_s = min(self._percentiles_until_s, now_s + PERCENTILES_S_UNKNOWN)
        return hedge_after_s(first_s, usual, prompt_tokens=prompt_tokens)

    def report(self, seq: int, now_s: float) -> Tally | None:
        """What happened since the last report, for control; None: nothing."""
        self._roll(now_s)
        if self._first_sketch or self._rate_sketch:
            self._roll_sketches(now_s)
        tally = self._unsent
        if tally.counts == NOTHING:
            return None
        self._unsent = Tally(first_s={}, rate={})
        self._unseen.append((seq, tally.counts))
        return tally

    def take_merged(self, figures: Figures | None, seen: int, now_s: float) -> None:
        """Control's push; `seen` is the last report of this edge that is in it."""
        self._merged = figures
        self._merged_at_s = now_s
        while self._unseen and self._unseen[0][0] <= seen:
            self._unseen.popleft()

    # Within.

    def _believed(self, now_s: float) -> Figures | None:
        """Control's figures, if it is there and knows no less: one that has just started knows less than this edge."""
        merged = self._merged
        if merged is None or now_s - self._merged_at_s > MERGED_S_MAX:
            return None
        own_attempts = self._windows.counts.attempts(WINDOWS_S[-1], now_s)
        return merged if merged.windows[-1].attempts >= own_attempts - self._fresh() else None

    def _fresh(self) -> int:
        """Attempts that control's figures cannot have yet."""
        return self._unsent.counts.attempts + sum(counts.attempts for _, counts in self._unseen)

    def _roll(self, now_s: float) -> None:
        """Move what was counted lately into the windows and the next report."""
        if not self._starts or now_s - self._starts[-1][0] >= 0.5:
            self._starts.append((now_s, self._begun - self._throttled_total))
        if now_s >= self._sketches_at_s and (self._first_sketch or self._rate_sketch):
            self._roll_sketches(now_s)
        if not (self._ok or self._firsts or self._failed or self._throttled):
            return
        counts = Counts(
            self._ok,
            self._failed,
            self._throttled,
            self._firsts,
            self._first_us,
            self._prompt_tokens,
            self._answers,
            self._tokens,
            self._gen_us,
        )
        self._ok = self._failed = self._throttled = 0
        self._firsts = self._first_us = self._prompt_tokens = 0
        self._answers = self._tokens = self._gen_us = 0
        self._windows.counts.add(counts, now_s)
        self._unsent.counts = self._unsent.counts.plus(counts)

    def _roll_sketches(self, now_s: float) -> None:
        """The same of histograms: seldom, for it takes longer, and percentiles move slowly."""
        tally = Tally(NOTHING, self._first_sketch, self._rate_sketch)
        self._first_sketch, self._rate_sketch = {}, {}
        self._sketches_at_s = now_s + SKETCHES_S
        self._windows.add_sketches(tally, now_s)
        self._unsent.add_sketches(tally)

    def _end(self, attempt: int) -> None:
        self.inflight -= 1
        assert self.inflight >= 0
        self._waiting.pop(attempt, None)

    def _healed(self, now_s: float) -> None:
        self.ramp_from_s = now_s
        self._look_again(now_s)

    def _look_again(self, now_s: float) -> None:
        """It did better than it was thought to: find out soon whether that holds."""
        self.probe_gap_s = PROBE_GAP_S
        self.probe_at_s = now_s
        self._changes.count += 1

    def _overdue(self, usual: Counts, now_s: float) -> Counts:
        """Streams that wait for their first token longer than usual, counted with their waiting so far."""
        patience_s = OVERDUE_TIMES * usual.first_us / usual.firsts / 1e6 if usual.firsts else OVERDUE_S_COLD
        firsts = first_us = 0
        for begun in self._waiting.values():
            waited_s = now_s - begun
            if waited_s < patience_s or firsts == LOOKS_MAX:
                break
            firsts += 1
            first_us += int(waited_s * 1e6)
        return Counts(firsts=firsts, first_us=first_us) if firsts else NOTHING

    def _accepted_per_s(self, now_s: float) -> float:
        """Calls per second that were not throttled, lately: over two seconds, or over as many as hold five calls; 0: unknown."""
        rate = 0.0
        for since_s, before in reversed(self._starts):
            span_s, accepted = now_s - since_s, self._begun - self._throttled_total - before
            if span_s > 0.1:
                rate = accepted / span_s
            if span_s >= LIMIT_SPAN_S and accepted >= LIMIT_CALLS:
                break
        return rate
