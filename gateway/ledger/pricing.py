"""What tokens cost: exact integers, multiplied first, divided and rounded up once per generation.

A price is nanos per million units, so a sum of counts times prices is in millionths of a nano; a discount multiplies
by another million. The one division at the end rounds up to a whole nano. No float is anywhere near.
"""

from __future__ import annotations

import msgspec

from gateway.domain.catalog import Price, PriceOverride
from gateway.domain.usage import Usage

MILLION = 1_000_000
_MILLION_SQUARED = MILLION * MILLION


class Cost(msgspec.Struct, frozen=True):
    """Nanos. `prompt_nanos` is the prompt's share of `total_nanos`, for display."""

    total_nanos: int
    prompt_nanos: int = 0


class Moment(msgspec.Struct, frozen=True):
    """When a price holds, in UTC: `hhmm` as in 1830, `weekday` 0 for Sunday."""

    hhmm: int
    weekday: int


def cost(price: Price, usage: Usage, moment: Moment) -> Cost:
    """The cost of an answer at its price, overrides and discount applied."""
    if price.overrides:
        price = at(price, usage.prompt_tokens, moment)
    prompt = usage.prompt_tokens * price.prompt + usage.images * price.image
    if usage.cached_tokens and price.input_cache_read is not None:
        prompt += usage.cached_tokens * (price.input_cache_read - price.prompt)
    if usage.cache_write_tokens and price.input_cache_write is not None:
        prompt += usage.cache_write_tokens * (price.input_cache_write - price.prompt)
    other = (
        usage.completion_tokens * price.completion
        + usage.reasoning_tokens * price.internal_reasoning
        + usage.searches * price.web_search
        + price.request
    )
    total_nanos = _nanos(prompt + other, price.discount_millionths)
    return Cost(total_nanos, min(total_nanos, _nanos(prompt, price.discount_millionths)))


class Worst(msgspec.Struct, frozen=True):
    """The dearest that a price can get, kind by kind, whatever the hour and however a prompt is cached."""

    prompt: int
    completion: int
    fixed: int
    image: int
    discount_millionths: int

    def nanos(self, prompt_tokens: int, completion_tokens: int, images: int) -> int:
        """The most that an answer within these counts can cost."""
        millionths = prompt_tokens * self.prompt + completion_tokens * self.completion + images * self.image + self.fixed
        return -(-millionths * (MILLION - self.discount_millionths) // _MILLION_SQUARED)

    def affordable_tokens(self, *, prompt_tokens: int, images: int, nanos: int) -> int:
        """How many completion tokens `nanos` pay for, after the prompt; 0 when not even that."""
        share_millionths = MILLION - self.discount_millionths
        before = (prompt_tokens * self.prompt + images * self.image + self.fixed) * share_millionths
        return max(0, (nanos * _MILLION_SQUARED - before) // (self.completion * share_millionths or 1))


def worst(price: Price) -> Worst:
    """Worked out once per endpoint. Kind by kind, since overrides that hold together may each raise another one."""
    prices = [price, *(_overridden(price, override) for override in price.overrides)]
    return Worst(
        prompt=max(max(each.prompt, each.input_cache_read or 0, each.input_cache_write or 0) for each in prices),
        completion=max(each.completion for each in prices) + max(each.internal_reasoning for each in prices),
        fixed=max(each.request for each in prices) + max(each.web_search for each in prices),
        image=max(each.image for each in prices),
        discount_millionths=price.discount_millionths,
    )


def at(price: Price, prompt_tokens: int, moment: Moment) -> Price:
    """The price that holds for a prompt of this size at this time; later overrides win, kind by kind."""
    for override in price.overrides:
        if _applies(override, prompt_tokens, moment):
            price = _overridden(price, override)
    return price


def _nanos(millionths: int, discount_millionths: int) -> int:
    return -(-millionths * (MILLION - discount_millionths) // _MILLION_SQUARED)


def _overridden(price: Price, override: PriceOverride) -> Price:
    return msgspec.structs.replace(price, **override.prices) if override.prices else price


def _applies(override: PriceOverride, prompt_tokens: int, moment: Moment) -> bool:
    if override.min_prompt_tokens is not None and prompt_tokens <= override.min_prompt_tokens:
        return False
    if override.utc_days is not None and moment.weekday not in override.utc_days:
        return False
    start, end = override.utc_start, override.utc_end
    if start is None or end is None:
        return True
    if start <= end:
        return start <= moment.hhmm < end
    return moment.hhmm >= start or moment.hhmm < end
