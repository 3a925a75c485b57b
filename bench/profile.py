"""A behaviour in use: answers to equal requests are rendered once and joined with a fresh id."""

from __future__ import annotations

import time

import msgspec

from bench.answers import ID_MARK, Ask
from bench.behaviour import Behaviour
from bench.inbound import Head
from bench.plan import Ending, plan_answer

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
        self._templates: dict[TemplateKey, Template] = {}

    def template(self, ask: Ask, head: Head) -> Template:
        """The ready answer; only for plain behaviours."""
        key = (ask, head.close, head.http10)
        found = self._templates.get(key)
        if found is None:
            if len(self._templates) >= TEMPLATES_MAX:
                self._templates.clear()
            found = self._templates[key] = self._render(ask, head)
        return found

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
