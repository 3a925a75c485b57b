"""Horizontal bars on a logarithmic scale around 1, as an SVG written by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

WIDTH, LEFT, TOP, BAR, GAP = 900, 150, 50, 16, 12
COLORS = ("#1f8a5b", "#7fa7c9", "#d9a441")


def bars(title: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """A group a row, a bar an entry; a bar right of the line is above 1. Entries must be positive."""
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    values = [value for row in rows.values() for value in row.values()] or [1.0]
    low, high = math.floor(math.log10(min(0.5, *values))), math.ceil(math.log10(max(2.0, *values)))

    def x(value: float) -> float:
        return LEFT + (math.log10(value) - low) / (high - low) * (WIDTH - LEFT - 80)

    group = len(kinds) * BAR + GAP
    height = TOP + group * len(rows) + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/><text x="10" y="22" font-size="14">{escape(title)}</text>',
        f'<line x1="{x(1):.1f}" x2="{x(1):.1f}" y1="{TOP - 8}" y2="{height - 40}" stroke="#222"/>',
    ]
    for number, (name, row) in enumerate(rows.items()):
        top = TOP + number * group
        parts.append(f'<text x="{LEFT - 10}" y="{top + len(kinds) * BAR / 2 + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for k, kind in enumerate(kinds):
            if kind in row:
                parts.append(_bar(x(1), x(row[kind]), top + k * BAR, row[kind], COLORS[k % len(COLORS)]))
    for k, kind in enumerate(kinds):
        parts.append(f'<rect x="{LEFT + k * 220}" y="{height - 26}" width="12" height="12" fill="{COLORS[k % len(COLORS)]}"/>')
        parts.append(f'<text x="{LEFT + k * 220 + 18}" y="{height - 16}">{escape(kind)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _bar(one: float, end: float, top: float, value: float, color: str) -> str:
    left, width = min(one, end), abs(end - one)
    return (
        f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{BAR - 2}" fill="{color}"/>'
        f'<text x="{max(one, end) + 6:.1f}" y="{top + 11}">{value:.2f}</text>'
    )
