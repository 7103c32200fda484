"""Ramps: how the quantization strength rises from 0 (full precision) to 1 (quantized).

A ramp maps progress x (0..1) to a strength. Contract: 0 at 0, 1 at 1, never falling ("none" is 1 throughout). linear: the
warm-up of 1.58-bit fine-tuning (Hugging Face blog, 2024); sigmoid: as PARQ anneals (arXiv 2503.15748); the others are own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..registry import Registry

# (progress 0..1, number of stairs) -> strength 0..1
Ramp = Callable[[float, int], float]
RAMPS: Registry[Ramp] = Registry("ramp")

_STEEPNESS = 10.0
_GROWTH = 5.0


@RAMPS.register("none")
def none(progress: float, stairs: int) -> float:
    """Quantized from the first step."""
    return 1.0


@RAMPS.register("linear")
def linear(progress: float, stairs: int) -> float:
    return progress


@RAMPS.register("cosine")
def cosine(progress: float, stairs: int) -> float:
    """Slow at both ends."""
    return 0.5 - 0.5 * math.cos(math.pi * progress)


@RAMPS.register("sigmoid")
def sigmoid(progress: float, stairs: int) -> float:
    """Slower at both ends than the cosine: the logistic curve over -5..5, stretched so that it starts at 0 and ends at 1."""

    def logistic(x: float) -> float:
        return 1 / (1 + math.exp(-_STEEPNESS * (x - 0.5)))

    return (logistic(progress) - logistic(0.0)) / (logistic(1.0) - logistic(0.0))


@RAMPS.register("exponential")
def exponential(progress: float, stairs: int) -> float:
    """Slow at the start, fast at the end: (e^(5 x) - 1) / (e^5 - 1)."""
    return math.expm1(_GROWTH * progress) / math.expm1(_GROWTH)


@RAMPS.register("step")
def step(progress: float, stairs: int) -> float:
    """`stairs` equal stairs: the first at 0, the one after the last is 1."""
    return math.floor(progress * stairs) / stairs
