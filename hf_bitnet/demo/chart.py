"""A line chart as SVG text, for the demo's page. Colours come from the page's style sheet, by class name."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..reports.chart import ticks_within as ticks

WIDTH, HEIGHT = 880, 400
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 34, 52

Curve = list[tuple[float, float]]
"""Points (training step, mean cross entropy per token in nats)."""


@dataclass(frozen=True)
class Series:
    """One line of a chart. `style` is the CSS class; `points` has (x, y); `marks` draws a dot on each point."""

    name: str
    style: str
    points: Curve
    marks: bool = False


def line_chart(
    series: Sequence[Series], *, x_label: str, y_label: str, rule: tuple[float, str], divider: tuple[float, str, str]
) -> str:
    """An SVG line chart. `rule` is a horizontal dashed line (y, text); `divider` a vertical one (x, text left, right)."""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points] + [rule[0]]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    margin = 0.05 * (max(ys) - min(ys)) or 0.5
    y_low, y_high = min(ys) - margin, max(ys) + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(y_label)} by {html.escape(x_label)}">']
    for value in ticks(y_low, y_high):
        _, y = place(x_low, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 9}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    floor = HEIGHT - BOTTOM
    for value in ticks(x_low, x_high, 8):
        x, _ = place(value, y_low)
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{floor}" y2="{floor + 5}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{floor + 20}" text-anchor="middle">{value:,g}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    parts.append(_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "middle", "label"))
    parts.append(_label(4, 16, y_label, "start", "label"))
    parts += _divider(place(divider[0], y_low)[0], floor, divider[1], divider[2])
    y = place(x_low, rule[0])[1]
    parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
    parts.append(_label(LEFT + 8, y + 18, rule[1], "start", "note"))
    for line in series:
        parts += _polyline(line, [place(x, y) for x, y in line.points])
    return "\n".join([*parts, "</svg>"])


def _label(x: float, y: float, text: str, anchor: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _divider(x: float, floor: float, before: str, after: str) -> list[str]:
    return [
        f'<line class="divider" x1="{x}" x2="{x}" y1="{TOP - 6}" y2="{floor}"/>',
        _label(x - 9, TOP + 6, before, "end", "note"),
        _label(x + 9, TOP + 6, after, "start", "note"),
    ]


def _polyline(line: Series, placed: list[tuple[float, float]]) -> list[str]:
    path = " ".join(f"{x},{y}" for x, y in placed)
    parts = [f'<polyline class="line {line.style}" points="{path}"/>']
    if line.marks:
        for (x, y), (step, value) in zip(placed, line.points, strict=True):
            title = f"{html.escape(line.name)}, step {step:,g}: {value:.3f} (perplexity {math.exp(value):,.1f})"
            parts.append(f'<circle class="dot {line.style}" cx="{x}" cy="{y}" r="4"><title>{title}</title></circle>')
    return parts


def legend(series: Sequence[Series]) -> str:
    """The names of the lines beside their colours, as an HTML list."""
    items = "".join(f'<li><span class="key {line.style}"></span>{html.escape(line.name)}</li>' for line in series)
    return f'<ul class="legend">{items}</ul>'
