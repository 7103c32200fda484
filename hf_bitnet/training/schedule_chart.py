"""A QuantizationSchedule as an SVG drawing. Own."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from ..reports.chart import svg, text_at, ticks

if TYPE_CHECKING:
    from .quantization_schedule import Plan

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640.0, 300.0, 52.0, 20.0, 76.0, 250.0
# more than these, evenly chosen, only fill the image
_MOST_CURVES = 40
_POINTS = 400


def draw(plan: Plan) -> str:
    """SVG text: the mean strength by step, each layer's own below it where they differ, and the ends of the stages."""
    steps = sorted({round(plan.max_steps * i / _POINTS) for i in range(_POINTS + 1)} | {plan.start, plan.end, *plan.stage_ends})
    found = [plan.strengths(step) for step in steps]
    parts = [text_at(16, 22, "Quantization schedule", "head"), text_at(16, 40, _summary(plan), "quiet")]
    parts += _grid(plan.max_steps)
    if plan.layerwise:
        chosen = range(0, len(plan.names), -(-len(plan.names) // _MOST_CURVES))
        parts += [_curve(plan, steps, [each[i] for each in found], plan.names[i], "curve faint") for i in chosen]
    parts.append(_curve(plan, steps, [sum(each) / len(each) for each in found], "strength (mean)", "curve"))
    parts += _stages(plan)
    return svg("Quantization schedule", _WIDTH, _HEIGHT, parts)


def _x(step: float, max_steps: int) -> float:
    return _LEFT + step / max(max_steps, 1) * (_WIDTH - _LEFT - _RIGHT)


def _y(strength: float) -> float:
    return _BOTTOM - strength * (_BOTTOM - _TOP)


def _summary(plan: Plan) -> str:
    schedule = plan.schedule
    order = f"{len(plan.names)} layers, {schedule.layers}" if isinstance(schedule.layers, str) else "layers in a given order"
    rise = "full strength throughout" if plan.end == 0 else f"{schedule.ramp} from step {plan.start:,} to {plan.end:,}"
    return f"{rise} of {plan.max_steps:,}; {order if plan.layerwise else 'all layers together'}"


def _grid(max_steps: int) -> list[str]:
    parts = []
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        kind = ' class="zero"' if strength == 0 else ""
        parts.append(f'<line{kind} x1="{_LEFT}" y1="{_y(strength):.1f}" x2="{_WIDTH - _RIGHT}" y2="{_y(strength):.1f}"/>')
        parts.append(text_at(_LEFT - 8, _y(strength) + 4, f"{strength:g}", "quiet", "end"))
    for step in ticks(0.0, float(max_steps)):
        if step <= max_steps:
            parts.append(text_at(_x(step, max_steps), _BOTTOM + 18, f"{step:g}", "quiet", "middle"))
    parts.append(text_at((_LEFT + _WIDTH - _RIGHT) / 2, _BOTTOM + 38, "step", "quiet", "middle"))
    return parts


def _curve(plan: Plan, steps: list[int], strengths: list[float], name: str, kind: str) -> str:
    points: list[str] = []
    before = None
    for step, strength in zip(steps, strengths, strict=True):
        # a strength holds for the whole step: jumps are drawn upright
        if before is not None and strength - before > 0.05:
            points.append(f"{_x(step, plan.max_steps):.1f},{_y(before):.1f}")
        points.append(f"{_x(step, plan.max_steps):.1f},{_y(strength):.1f}")
        before = strength
    return f'<polyline class="{kind}" points="{" ".join(points)}"><title>{escape(name)}</title></polyline>'


def _stages(plan: Plan) -> list[str]:
    if not plan.stage_ends:
        return []
    parts, begin = [], 0
    names = [scheme for scheme, _ in plan.schedule.stages] + ["the config's own"]
    for name, end in zip(names, (*plan.stage_ends, plan.max_steps), strict=True):
        parts.append(text_at((_x(begin, plan.max_steps) + _x(end, plan.max_steps)) / 2, _TOP - 10, name, "quiet", "middle"))
        if end < plan.max_steps:
            x = _x(end, plan.max_steps)
            parts.append(f'<line class="divider" x1="{x:.1f}" y1="{_TOP - 22}" x2="{x:.1f}" y2="{_BOTTOM}"/>')
        begin = end
    return parts
