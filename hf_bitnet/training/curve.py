"""The losses of a run as a picture, from what Trainer logged. Own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_text
from ..reports import Line, line_chart

CURVE = "training_curve.svg"
_LOSSES = {"loss": "training loss", "eval_loss": "evaluation loss"}


def training_curve(history: Sequence[Mapping[str, Any]]) -> str | None:
    """SVG text of the training loss and, where there was one, the evaluation loss by step; None before two steps were logged.

    Args:
        history: `trainer.state.log_history`, or "history" of a results.json.
    """
    lines = []
    for key, name in _LOSSES.items():
        points = [(float(log["step"]), float(log[key])) for log in history if key in log and "step" in log]
        if points:
            lines.append(Line(name, points, dots=key != "loss"))
    if not lines or lines[0].name != _LOSSES["loss"] or len(lines[0].points) < 2:
        return None
    last = ", ".join(f"{line.name} {line.points[-1][1]:.4g}" for line in lines)
    return line_chart("Losses by training step", f"step {lines[0].points[-1][0]:,.0f}: {last}", lines, "step")


def write_curve(folder: Path, history: Sequence[Mapping[str, Any]]) -> str | None:
    """Draws the curve into a folder and returns the file's name; None where there is nothing to draw."""
    try:
        drawn = training_curve(history)
    except ValueError:  # no loss was finite
        drawn = None
    if drawn is None:
        return None
    write_text(folder / CURVE, drawn)
    return CURVE
