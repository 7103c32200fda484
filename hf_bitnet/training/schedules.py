"""How the quantization strength rises from 0 (full precision) to 1 (quantized) during a run.

A schedule maps progress x (0..1) to a strength. Contract: 0 at 0, 1 at 1, never falling. The strength is a pure function of
the step, so a resumed run continues exactly. linear: the warm-up of 1.58-bit fine-tuning (Hugging Face blog, 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..registry import Registry

# (progress 0..1, number of stairs) -> strength 0..1
Schedule = Callable[[float, int], float]
SCHEDULES: Registry[Schedule] = Registry("strength schedule")


@SCHEDULES.register("none")
def none(progress: float, steps: int) -> float:
    """Quantized from the first step."""
    return 1.0


@SCHEDULES.register("linear")
def linear(progress: float, steps: int) -> float:
    return progress


@SCHEDULES.register("cosine")
def cosine(progress: float, steps: int) -> float:
    """Slow at both ends."""
    return 0.5 - 0.5 * math.cos(math.pi * progress)


@SCHEDULES.register("step")
def step(progress: float, steps: int) -> float:
    """`steps` equal stairs: the first at 0, the one after the last is 1."""
    return math.floor(progress * steps) / steps


def strength_at(name: str, global_step: int, max_steps: int, start: float, end: float, steps: int) -> float:
    """The strength during the step after `global_step` finished ones.

    Args:
        name: in `SCHEDULES`.
        max_steps: of the whole run.
        start, end: where the rise begins and where 1 is reached, as fractions of `max_steps`.
        steps: number of stairs of "step".
    """
    schedule = SCHEDULES.get(name)
    done = global_step / max(max_steps, 1)
    if done >= end:
        return 1.0
    if done <= start:
        return schedule(0.0, steps)
    return min(max(schedule((done - start) / (end - start), steps), 0.0), 1.0)
