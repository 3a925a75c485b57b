"""Prices are exact (LED-10): every cost is that of rational arithmetic, rounded up to a nano once; and no float is near."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.domain.catalog import Price, PriceOverride
from gateway.domain.money import NANOS_PER_USD, format_price, format_usd, parse_price, parse_usd
from gateway.domain.usage import Usage
from gateway.ledger.pricing import Cost, cost, worst
from gateway.settings import Billing

GATEWAY = Path(__file__).parent.parent.parent / "gateway"
MILLION = 1_000_000


class Moment(NamedTuple):
    """A time of the week in UTC: `hhmm` as in 1830, `weekday` 0 for Sunday."""

    hhmm: int
    weekday: int

    @property
    def unix_s(self) -> int:
        days = (self.weekday - 4) % 7  # the first day of 1970 was a Thursday
        return days * 86400 + self.hhmm // 100 * 3600 + self.hhmm % 100 * 60


NOON = Moment(hhmm=1200, weekday=3)

# 1e-12 .. 1e-2 USD per token, and whatever lies between two decimal places.
prices = st.one_of(
    st.just(0),
    st.builds(lambda digits, power: digits * 10**power, st.integers(1, 9999), st.integers(3, 9)),
    st.integers(1_000, 10**13),
)
maybe_prices = st.none() | prices
hhmm = st.builds(lambda hour, minute: hour * 100 + minute, st.integers(0, 23), st.integers(0, 59))
moments = st.builds(Moment, hhmm=hhmm, weekday=st.integers(0, 6))
KINDS = ("prompt", "completion", "request", "image", "internal_reasoning", "input_cache_read", "input_cache_write", "web_search")


@st.composite
def overrides(draw: st.DrawFn) -> PriceOverride:
    start = draw(st.none() | hhmm)
    return PriceOverride(
        min_prompt_tokens=draw(st.none() | st.sampled_from([0, 199_999, 200_000, 200_001]) | st.integers(0, 10**7)),
        utc_start=start,
        utc_end=None if start is None else draw(hhmm.filter(lambda end: end != start)),
        utc_days=draw(st.none() | st.lists(st.integers(0, 6), min_size=1, max_size=7).map(tuple)),
        prices=draw(st.dictionaries(st.sampled_from(KINDS), prices, min_size=1)),
    )


shares = st.sampled_from([0, 1, 10_000, 333_333, 990_000, 999_999, MILLION]) | st.integers(0, MILLION)  # in millionths
any_price = st.builds(
    Price,
    prompt=prices,
    completion=prices,
    request=prices.map(lambda price: price * 1000),
    image=prices.map(lambda price: price * 100),
    web_search=prices,
    internal_reasoning=prices,
    input_cache_read=maybe_prices,
    input_cache_write=maybe_prices,
    discount_millionths=shares,
    overrides=st.lists(overrides(), max_size=4).map(tuple),
)
counts = st.one_of(st.integers(0, 3), st.sampled_from([199_999, 200_000, 200_001]), st.integers(0, 10**7))


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    prompt, completion = draw(counts), draw(counts)
    cached = draw(st.integers(0, prompt))
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=cached,
        cache_write_tokens=draw(st.integers(0, prompt - cached)),
        reasoning_tokens=draw(st.integers(0, completion)),
        images=draw(st.integers(0, 20)),
        searches=draw(st.integers(0, 1)),
    )


# A second opinion, written from the contract: USD per unit, rational numbers, one rounding.


def minutes(clock: int) -> int:
    return clock // 100 * 60 + clock % 100


def holds(override: PriceOverride, prompt_tokens: int, moment: Moment) -> bool:
    size = override.min_prompt_tokens is None or prompt_tokens > override.min_prompt_tokens
    day = override.utc_days is None or moment.weekday in override.utc_days
    hour = True
    if override.utc_start is not None and override.utc_end is not None:
        length = (minutes(override.utc_end) - minutes(override.utc_start)) % 1440
        hour = (minutes(moment.hhmm) - minutes(override.utc_start)) % 1440 < length
    return size and day and hour


def usd_per_unit(price: Price, usage: Usage, moment: Moment) -> dict[str, Fraction]:
    found: dict[str, int | None] = {kind: getattr(price, kind) for kind in KINDS}
    for override in price.overrides:
        if holds(override, usage.prompt_tokens, moment):
            found |= override.prices
    for kind in ("input_cache_read", "input_cache_write"):
        found[kind] = found["prompt"] if found[kind] is None else found[kind]
    return {kind: Fraction(nanos or 0, NANOS_PER_USD * MILLION) for kind, nanos in found.items()}


def expected(price: Price, usage: Usage, moment: Moment, paid_millionths: int = MILLION) -> Cost:
    unit = usd_per_unit(price, usage, moment)
    prompt = (
        (usage.prompt_tokens - usage.cached_tokens - usage.cache_write_tokens) * unit["prompt"]
        + usage.cached_tokens * unit["input_cache_read"]
        + usage.cache_write_tokens * unit["input_cache_write"]
        + usage.images * unit["image"]
    )
    rest = (
        usage.completion_tokens * unit["completion"]
        + usage.reasoning_tokens * unit["internal_reasoning"]
        + usage.searches * unit["web_search"]
        + unit["request"]
    )
    share = (1 - Fraction(price.discount_millionths, MILLION)) * Fraction(paid_millionths, MILLION)
    return Cost(math.ceil((prompt + rest) * share * NANOS_PER_USD), math.ceil(prompt * share * NANOS_PER_USD))


@settings(max_examples=600, deadline=None)
@given(any_price, usages(), moments)
def test_led_10_a_cost_is_the_rational_one_rounded_up_once(price: Price, usage: Usage, moment: Moment) -> None:
    assert cost(price, usage, moment.unix_s) == expected(price, usage, moment)


@settings(max_examples=600, deadline=None)
@given(any_price, usages(), moments, shares)
@example(Price(prompt=1, completion=0, discount_millionths=1), Usage(prompt_tokens=1, completion_tokens=0), NOON, 999_999)
def test_a_discount_of_the_account_is_in_the_one_rounding_and_never_raises_a_cost(
    price: Price, usage: Usage, moment: Moment, paid_millionths: int
) -> None:
    found, full = cost(price, usage, moment.unix_s, paid_millionths), cost(price, usage, moment.unix_s)
    assert found == expected(price, usage, moment, paid_millionths)
    assert 0 <= found.prompt_nanos <= found.total_nanos <= full.total_nanos


@pytest.mark.parametrize(("percent", "nanos"), [("0", 1000), ("1", 990), ("0.1", 999), ("0.0001", 1000), ("12.34", 877), ("100", 0)])
def test_the_discount_for_logging_is_a_percentage_of_every_cost(percent: str, nanos: int) -> None:
    paid = MILLION - Billing(logging_discount_percent=percent).logging_discount_millionths
    thousand = Price(prompt=1000 * MILLION, completion=0)
    assert cost(thousand, Usage(prompt_tokens=1, completion_tokens=0), NOON.unix_s, paid).total_nanos == nanos


# Two overrides that hold at once are dearer together than either: each raises a kind of its own.
TWO = Price(
    prompt=1,
    completion=MILLION,
    overrides=(
        PriceOverride(min_prompt_tokens=0, prices={"completion": 10 * MILLION, "request": 7 * MILLION}),
        PriceOverride(utc_start=0, utc_end=2359, prices={"internal_reasoning": 10 * MILLION, "web_search": 5 * MILLION}),
    ),
)


@settings(max_examples=600, deadline=None)
@given(any_price, usages(), moments, st.integers(0, 100), st.integers(0, 100))
@example(TWO, Usage(prompt_tokens=1, completion_tokens=9, reasoning_tokens=9, searches=1), NOON, 0, 0)
def test_a_hold_for_the_worst_case_covers_every_cost(price: Price, usage: Usage, moment: Moment, prompt: int, completion: int) -> None:
    held = worst(price).nanos(usage.prompt_tokens + prompt, usage.completion_tokens + completion, usage.images)
    assert held >= cost(price, usage, moment.unix_s).total_nanos


@settings(max_examples=300, deadline=None)
@given(any_price.filter(lambda price: price.completion > 0), counts, st.integers(0, 3), st.integers(0, 10**12))
def test_affordable_tokens_are_the_most_that_the_money_holds(price: Price, prompt_tokens: int, images: int, nanos: int) -> None:
    most = worst(price)
    tokens = most.affordable_tokens(prompt_tokens=prompt_tokens, images=images, nanos=nanos)
    if most.nanos(prompt_tokens, 0, images) > nanos:
        assert tokens == 0
    elif price.discount_millionths < MILLION:
        assert most.nanos(prompt_tokens, tokens, images) <= nanos < most.nanos(prompt_tokens, tokens + 1, images)


@given(usages(), moments)
def test_led_10_what_is_free_costs_exactly_nothing(usage: Usage, moment: Moment) -> None:
    free = Price(prompt=0, completion=0)
    wholly_discounted = Price(prompt=7, completion=10**13, request=1, discount_millionths=MILLION)
    for price in (free, wholly_discounted):
        assert cost(price, usage, moment.unix_s) == Cost(0, 0)
        assert worst(price).nanos(10**7, 10**7, 20) == 0


def test_led_10_a_million_tiny_calls_lose_nothing_but_their_own_rounding() -> None:
    """A fifth of a nano a call: each is charged one whole nano, by the documented rule, and their sum is exact."""
    price = Price(prompt=parse_price("0.0000000000001"), completion=0)
    each = cost(price, Usage(prompt_tokens=2, completion_tokens=5), NOON.unix_s).total_nanos
    assert each == 1 and each * MILLION == parse_usd("0.001")
    whole = cost(price, Usage(prompt_tokens=2 * MILLION, completion_tokens=5), NOON.unix_s).total_nanos
    assert whole == 200


@pytest.mark.parametrize(("tokens", "usd"), [(199_999, "0.199999"), (200_000, "0.2"), (200_001, "0.400002")])
def test_a_prompt_is_dearer_above_the_border_and_not_on_it(tokens: int, usd: str) -> None:
    dear = PriceOverride(min_prompt_tokens=200_000, prices={"prompt": parse_price("0.000002")})
    price = Price(prompt=parse_price("0.000001"), completion=0, overrides=(dear,))
    assert format_usd(cost(price, Usage(prompt_tokens=tokens, completion_tokens=0), NOON.unix_s).total_nanos) == usd


@pytest.mark.parametrize(
    ("hhmm", "weekday", "nanos"),
    [(1629, 1, 2), (1630, 1, 1), (2359, 1, 1), (0, 1, 1), (29, 1, 1), (30, 1, 2), (1200, 1, 2), (1700, 0, 2)],
)
def test_hours_are_half_open_and_wrap_over_midnight(hhmm: int, weekday: int, nanos: int) -> None:
    night = PriceOverride(utc_start=1630, utc_end=30, utc_days=(1, 2, 3, 4, 5, 6), prices={"prompt": MILLION})
    price = Price(prompt=2 * MILLION, completion=0, overrides=(night,))
    assert cost(price, Usage(prompt_tokens=1, completion_tokens=0), Moment(hhmm=hhmm, weekday=weekday).unix_s).total_nanos == nanos


@given(st.integers(0, 2**62))
def test_text_and_nanos_are_inverse(nanos: int) -> None:
    assert parse_usd(format_usd(nanos)) == nanos == parse_price(format_price(nanos))


# The static rule.


def functions(path: Path, *names: str) -> list[ast.AST]:
    """Whole modules, or what bears one of these names in them."""
    tree = ast.parse(path.read_text())
    if not names:
        return [tree]
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names]
    assert {node.name for node in found} == set(names)
    return list(found)


def money_code() -> Iterator[tuple[str, ast.AST]]:
    for path in (GATEWAY / "ledger").glob("*.py"):
        for tree in functions(path):
            yield path.name, tree
    money = ast.parse((GATEWAY / "domain" / "money.py").read_text())
    money.body = [node for node in money.body if not (isinstance(node, ast.FunctionDef) and node.name == "usd_number")]
    yield "money.py", money
    for tree in functions(GATEWAY / "edge" / "settlement.py", "Bill", "Settlement"):
        yield "settlement.py", tree
    for tree in functions(GATEWAY / "edge" / "quotes.py", "Quote", "quote", "worst_nanos", "prompt_most", "completion_max"):
        yield "quotes.py", tree
    for tree in functions(GATEWAY / "edge" / "admission.py", "hold_at_once", "_try", "_hold", "_refusal"):
        yield "admission.py", tree


def floats(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        line = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Constant) and isinstance(node.value, float):
            yield f"{line}: the literal {node.value}"
        elif isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Div):
            yield f"{line}: a true division"
        elif isinstance(node, ast.Name) and node.id in ("float", "round") and isinstance(node.ctx, ast.Load):
            yield f"{line}: {node.id}"


# A lease's clock, not its money.
CLOCK = {"self.used_at = 0.0", "self.used_at: float = 0.0"}


def test_led_10_no_float_is_in_money_code() -> None:
    found = [f"{name}, {what}" for name, tree in money_code() for what in floats(without_clocks(tree))]
    assert found == []


def without_clocks(tree: ast.AST) -> ast.AST:
    class Clocks(ast.NodeTransformer):
        def visit_Assign(self, node: ast.Assign) -> Any:
            return ast.Pass() if ast.unparse(node) in CLOCK else node

        def visit_arg(self, node: ast.arg) -> Any:
            return ast.arg(node.arg) if node.arg in ("now", "now_s", "before") else node

    cleaned: ast.AST = Clocks().visit(tree)
    return cleaned


def test_the_static_rule_sees_what_it_forbids() -> None:
    assert len(list(floats(ast.parse("a = 1.5\nb = a / 2\nb /= 2\nc = float(b)\nd = round(c)\ne = 3 // 2\nf = 'x/y'")))) == 5


def test_the_worst_case_of_overrides_that_hold_together_is_their_sum() -> None:
    assert (worst(TWO).completion, worst(TWO).fixed) == (20 * MILLION * MILLION, 12 * MILLION * MILLION)
