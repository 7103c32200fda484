"""Lines over a common axis as one SVG text, without any dependency. Own.

Figures that are NaN or infinite break a line in two. Many points are drawn as the means of neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from .chart import svg, text_at, ticks_within

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640.0, 340.0, 58.0, 20.0, 84.0, 286.0
_MOST_POINTS = 300
# the first line is drawn as the schedule's is; a second one in another colour
_KINDS = ("curve", "curve other")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One line: its name, its points (x, y) in the order of x, and whether each of them gets a dot."""

    name: str
    points: Points
    dots: bool = False


def line_chart(title: str, subtitle: str, lines: Sequence[Line], x_label: str) -> str:
    """The SVG of one or two lines.

    Raises ValueError when there is no finite point, or a third line.
    """
    if len(lines) > len(_KINDS):
        raise ValueError(f"a chart has {len(_KINDS)} colours, got {len(lines)} lines; draw two charts")
    finite = [(x, y) for line in lines for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        raise ValueError(f"the chart {title!r} has no finite point; leave it out")
    x_low, x_high = _widened(min(x for x, _ in finite), max(x for x, _ in finite), 0.0)
    y_low, y_high = _widened(min(y for _, y in finite), max(y for _, y in finite), 0.06)

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        return across, _BOTTOM - (y - y_low) / (y_high - y_low) * (_BOTTOM - _TOP)

    parts = [text_at(16, 22, title, "head"), text_at(16, 40, subtitle, "quiet")]
    for value in ticks_within(y_low, y_high):
        y = place(x_low, value)[1]
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(text_at(_LEFT - 8, y + 4, f"{value:g}", "quiet", "end"))
    for value in ticks_within(x_low, x_high, 8):
        parts.append(text_at(place(value, y_low)[0], _BOTTOM + 18, f"{value:g}", "quiet", "middle"))
    parts.append(text_at((_LEFT + _WIDTH - _RIGHT) / 2, _BOTTOM + 40, x_label, "quiet", "middle"))
    for i, (line, kind) in enumerate(zip(lines, _KINDS, strict=False)):
        parts += _legend(line.name, kind, 16.0 + 150.0 * i)
        parts += _drawn(line, kind, place)
    return svg(title, _WIDTH, _HEIGHT, parts)


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    """An interval of some width: that of the values, and a margin."""
    margin = share * (high - low) if high > low else max(abs(low), 1.0) * 0.05
    return low - margin, high + margin


def _legend(name: str, kind: str, x: float) -> list[str]:
    return [f'<polyline class="{kind}" points="{x:.0f},58 {x + 22:.0f},58"/>', text_at(x + 28, 62, name, "quiet")]


def _drawn(line: Line, kind: str, place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    parts = []
    for piece in _pieces(_thinned(line.points)):
        points = [place(x, y) for x, y in piece]
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="{kind}" points="{text}"><title>{escape(line.name)}</title></polyline>')
        if line.dots or len(points) == 1:
            for (x, y), (at, value) in zip(points, piece, strict=True):
                title = f"<title>{escape(line.name)}, {at:g}: {value:.4g}</title>"
                parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3">{title}</circle>')
    return parts


def _thinned(points: Points) -> Points:
    """At most so many points as can be told apart; neighbours become their mean."""
    size = -(-len(points) // _MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _pieces(points: Points) -> list[Points]:
    """The points without those that cannot be drawn, cut where these were."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]
