"""A behaviour in use: answers to equal requests are rendered once and joined with a fresh id."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator

import msgspec

from bench.answers import ID_MARK, Ask
from bench.behaviour import Behaviour
from bench.inbound import Head
from bench.plan import Ending, Plan, Step, plan_answer

TEMPLATES_MAX = 256


class Template(msgspec.Struct, frozen=True, gc=False):
    """A whole answer, kept ready; `parts` are joined by its id."""

    parts: list[bytes]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    status: int
    close: bool


TemplateKey = tuple[Ask, bool, bool]


class Profile:
    """One behaviour in use, with the answers that it keeps ready."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.is_plain = behaviour.is_plain()
        self._is_kept = behaviour.is_kept()
        self._templates: dict[TemplateKey, Template] = {}
        self._plans: dict[TemplateKey, tuple[Plan, list[Step]]] = {}

    def template(self, ask: Ask, head: Head) -> Template:
        """The ready answer; only for plain behaviours."""
        key = (ask, head.close, head.http10)
        found = self._templates.get(key)
        if found is None:
            if len(self._templates) >= TEMPLATES_MAX:
                self._templates.clear()
            found = self._templates[key] = self._render(ask, head)
        return found

    def plan(self, ask: Ask, head: Head) -> Plan:
        """The plan of one answer; of equal ones the bytes are made once, a step for each moment at which some are due."""
        if not self._is_kept:
            return plan_answer(self.behaviour, ask, created=int(time.time()), close=head.close, http10=head.http10)
        key = (ask, head.close, head.http10)
        found = self._plans.get(key)
        if found is None:
            if len(self._plans) >= TEMPLATES_MAX:
                self._plans.clear()
            plan = plan_answer(self.behaviour, ask, created=int(time.time()), close=head.close, http10=head.http10)
            found = self._plans[key] = plan, list(merged(plan.steps))
        plan, steps = found
        return msgspec.structs.replace(plan, steps=iter(steps))

    def _render(self, ask: Ask, head: Head) -> Template:
        plan = plan_answer(self.behaviour, ask, created=int(time.time()), close=head.close, http10=head.http10)
        steps = list(plan.steps)
        return Template(
            parts=b"".join(step.data for step in steps).split(ID_MARK),
            prompt_tokens=plan.prompt_tokens,
            completion_tokens=max(step.made for step in steps),
            cached_tokens=plan.cached_tokens,
            reasoning_tokens=plan.reasoning_tokens,
            status=plan.status,
            close=plan.ending is Ending.CLOSE,
        )


def merged(steps: Iterable[Step]) -> Iterator[Step]:
    """Steps of one moment as one. A step that was due before the one ahead of it leaves with that."""
    due = itertools.accumulate(steps, lambda before, step: step._replace(at_s=max(before.at_s, step.at_s)))
    for at_s, group in itertools.groupby(due, key=lambda step: step.at_s):
        together = list(group)
        yield Step(at_s, b"".join(step.data for step in together), max(step.made for step in together))
