"""Bars of regret by scenario and policy, as an SVG written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 1180, 420, 60, 50, 60
TOP_PERCENT = 110.0
COLORS = ("#c9ced6", "#b0b7c3", "#d9a441", "#7fa7c9", "#8d7fc9", "#1f8a5b")

Series = Mapping[str, Mapping[str, tuple[float, float]]]  # scenario -> policy -> (mean, half width of its interval), shares


def plot(regret: Series) -> str:
    """A bar a policy, grouped by scenario, with 95 % intervals; a line at 5 %."""
    policies = list(next(iter(regret.values())))
    group = (WIDTH - LEFT - 20) / len(regret)
    bar = group * 0.8 / len(policies)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">Regret against an oracle, %; lower is better; with 95 % intervals over seeds</text>',
    ]
    for percent in range(0, int(TOP_PERCENT) + 1, 20):
        parts.append(_line(percent, "#e5e7eb"))
        parts.append(f'<text x="{LEFT - 8}" y="{_y(percent) + 4:.1f}" text-anchor="end">{percent}</text>')
    parts.append(_line(5, "#d33", dashed=True))
    for i, (scenario, row) in enumerate(regret.items()):
        x = LEFT + i * group + group * 0.1
        for k, policy in enumerate(policies):
            parts.append(_bar(x + k * bar, bar, *row[policy], COLORS[k % len(COLORS)]))
        parts.append(f'<text x="{x + group * 0.4:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(scenario)}</text>')
    for k, policy in enumerate(policies):
        x = LEFT + k * 150
        parts.append(f'<rect x="{x}" y="{HEIGHT - 26}" width="12" height="12" fill="{COLORS[k % len(COLORS)]}"/>')
        parts.append(f'<text x="{x + 18}" y="{HEIGHT - 16}">{escape(policy)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _y(percent: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * min(max(percent, 0.0), TOP_PERCENT) / TOP_PERCENT


def _line(percent: float, color: str, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{_y(percent):.1f}" y2="{_y(percent):.1f}" stroke="{color}"{dash}/>'


def _bar(x: float, width: float, mean: float, half_width: float, color: str) -> str:
    top, middle = _y(100 * mean), x + width / 2
    low, high = _y(100 * (mean - half_width)), _y(100 * (mean + half_width))
    return (
        f'<rect x="{x:.1f}" y="{top:.1f}" width="{width * 0.9:.1f}" height="{_y(0) - top:.1f}" fill="{color}"/>'
        f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="#222"/>'
    )
