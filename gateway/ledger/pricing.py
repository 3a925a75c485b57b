"""What tokens cost: exact integers, multiplied first, divided and rounded up once per generation.

A price is nanos per million units, so a sum of counts times prices is in millionths of a nano; a discount of the endpoint
multiplies by another million, and one of the account by a third. The one division at the end rounds up to a whole nano. No
float is anywhere near.
"""

from __future__ import annotations

import msgspec

from gateway.domain.catalog import Price, PriceOverride
from gateway.domain.usage import Usage

MILLION = 1_000_000
_MILLION_SQUARED = MILLION * MILLION
_MILLION_CUBED = MILLION * MILLION * MILLION


class Cost(msgspec.Struct, frozen=True):
    """Nanos. `prompt_nanos` is the prompt's share of `total_nanos`, for display."""

    total_nanos: int
    prompt_nanos: int


def cost(price: Price, usage: Usage, unix_s: int, paid_millionths: int = MILLION) -> Cost:
    """The cost of an answer at the price of that time, overrides and discount applied; of that, an account pays `paid_millionths`."""
    if price.overrides:
        price = at(price, usage.prompt_tokens, unix_s)
    prompt = usage.prompt_tokens * price.prompt + usage.images * price.image
    if usage.cached_tokens and price.input_cache_read is not None:
        prompt += usage.cached_tokens * (price.input_cache_read - price.prompt)
    if usage.cache_write_tokens and price.input_cache_write is not None:
        prompt += usage.cache_write_tokens * (price.input_cache_write - price.prompt)
    other = usage.completion_tokens * price.completion + price.request
    if usage.reasoning_tokens or usage.searches:
        other += usage.reasoning_tokens * price.internal_reasoning + usage.searches * price.web_search
    if paid_millionths == MILLION and not price.discount_millionths:  # the same in numbers of half the length
        return Cost(-(-(prompt + other) // MILLION), -(-prompt // MILLION))
    share = paid_millionths * (MILLION - price.discount_millionths)
    return Cost(-(-(prompt + other) * share // _MILLION_CUBED), -(-prompt * share // _MILLION_CUBED))


class Worst(msgspec.Struct, frozen=True):
    """The dearest that a price can get, kind by kind, whatever the hour and however a prompt is cached.

    In nanos per 1e12 units, the discount applied.
    """

    prompt: int
    completion: int
    fixed: int
    image: int

    def nanos(self, prompt_tokens: int, completion_tokens: int, images: int) -> int:
        """The most that an answer within these counts can cost."""
        return -(
            -(prompt_tokens * self.prompt + completion_tokens * self.completion + images * self.image + self.fixed) // _MILLION_SQUARED
        )

    def affordable_tokens(self, *, prompt_tokens: int, images: int, nanos: int) -> int:
        """How many completion tokens `nanos` pay for, after the prompt; 0 when not even that."""
        before = prompt_tokens * self.prompt + images * self.image + self.fixed
        return max(0, (nanos * _MILLION_SQUARED - before) // (self.completion or 1))


def worst(price: Price) -> Worst:
    """Worked out once per endpoint. Kind by kind, since overrides that hold together may each raise another one."""
    prices = [price, *(_overridden(price, override) for override in price.overrides)]
    share_millionths = MILLION - price.discount_millionths
    return Worst(
        prompt=share_millionths * max(max(each.prompt, each.input_cache_read or 0, each.input_cache_write or 0) for each in prices),
        completion=share_millionths * (max(each.completion for each in prices) + max(each.internal_reasoning for each in prices)),
        fixed=share_millionths * (max(each.request for each in prices) + max(each.web_search for each in prices)),
        image=share_millionths * max(each.image for each in prices),
    )


def at(price: Price, prompt_tokens: int, unix_s: int) -> Price:
    """The price that holds for a prompt of this size at this time; later overrides win, kind by kind."""
    minutes = unix_s // 60 % 1440
    hhmm, weekday = minutes // 60 * 100 + minutes % 60, (unix_s // 86400 + 4) % 7  # in UTC: as in 1830, and 0 for Sunday
    for override in price.overrides:
        if _applies(override, prompt_tokens, hhmm, weekday):
            price = _overridden(price, override)
    return price


def _overridden(price: Price, override: PriceOverride) -> Price:
    return msgspec.structs.replace(price, **override.prices) if override.prices else price


def _applies(override: PriceOverride, prompt_tokens: int, hhmm: int, weekday: int) -> bool:
    if override.min_prompt_tokens is not None and prompt_tokens <= override.min_prompt_tokens:
        return False
    if override.utc_days is not None and weekday not in override.utc_days:
        return False
    start, end = override.utc_start, override.utc_end
    if start is None or end is None:
        return True
    if start <= end:
        return start <= hhmm < end
    return hhmm >= start or hhmm < end
