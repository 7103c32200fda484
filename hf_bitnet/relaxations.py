"""Soft to hard: what a layer uses while the quantization strength is below 1.

W is the weight, Q its quantized value, s the strength, v the position of a weight among the levels (0.0 the lowest, 1.0 the
next, ...). Every relaxation is exactly W at s = 0, exactly Q at s = 1, differentiable between, and leaves nothing behind.

linear     (1 - s) W + s Q                                                                      Hugging Face blog, 2024
residual   W + 10 s Q up to s = 0.1, then Q + e(s) W, where e falls from 1 to 0 by a cosine     Arenas: Sherry, arXiv 2601.07892
softmax    (1 - p) W + p S, where p = 5 s reaches 1 at s = 0.2, and S is the mean of the        Hestia, arXiv 2601.20745
           levels q under softmax(-(v - q)^2 / T); T falls by a cosine from s = 0.2 on
relay      a sum of one tanh for each threshold t:                                              CAT-Q, arXiv 2606.26650
           sum tanh(k (v - t)) / (2 tanh(k (levels - 1) / 2)), k = 37.5 s

Where these differ from the papers: Arenas starts from Q and raises the residual in the first tenth of the run; here s = 0 has
to be W, so Q is raised instead (between the ends the output is up to twice as large, as in the paper: it is meant for training
from scratch). Hestia's temperatures by Hessian traces are left out; T stops at 0.02, below which the slope is a needle at a few
weights. CAT-Q has ternary weights; the factor (levels - 1) / 2, which is 1 there, makes every number of levels start from W.
CAT-Q's learned thresholds, low-rank update and training by blocks are not part of the relaxation.

softmax and relay serve up to 16 levels. Weights with more (int8), which rounding moves by at most 0.4 % of the largest, take
the straight mix instead. Activations always take the straight mix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .registry import Registry

MOST_SOFT_LEVELS = 16

_RAMP = 0.2  # Hestia's share of the run in which S replaces W
# argmin over T of E[(S(z) - z)^2], z normal with E|z| = 1, levels -1, 0, 1: Hestia's start, recomputed in the tests
_HOTTEST = 0.351
_COLDEST = 0.02
_STEEPEST = 30 / 0.8  # CAT-Q: s0 / gamma
_RISE = 0.1  # Arenas


class Softened(NamedTuple):
    """Soft positions and their derivative by the position, both float (N, K)."""

    position: Tensor
    slope: Tensor


# (value, target, strength 0-dim) -> what serves; target is Q, or the soft value
Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
# (position (N, K), number of levels, strength 0-dim) -> the same positions, drawn towards the levels
Soften = Callable[[Tensor, int, Tensor], Softened]


@dataclass(frozen=True)
class Relaxation:
    """One way from soft to hard. What serves is `mix(W, target, s)`.

    Attributes:
        mix: exactly W at s = 0, exactly the target at s = 1, differentiable in both.
        soften: makes the soft value that is the target below s = 1; at s = 1 (and always, where this is None) it is Q.
    """

    mix: Mix
    soften: Soften | None = None

    def on(self, levels: int) -> Relaxation:
        """The relaxation of a weight with so many levels: this one, or the straight mix where they are too many."""
        return LINEAR if self.soften is not None and levels > MOST_SOFT_LEVELS else self


RELAXATIONS: Registry[Relaxation] = Registry("relaxation")


def straight(value: Tensor, target: Tensor, strength: Tensor) -> Tensor:
    """`torch.lerp` is exact at both ends; `value + strength * (target - value)` is not."""
    return torch.lerp(value, target, strength.to(value.dtype))


def _residual(value: Tensor, target: Tensor, strength: Tensor) -> Tensor:
    own, other = _falling(strength, _RISE), (strength / _RISE).clamp(max=1.0)
    return value * own.to(value.dtype) + target * other.to(value.dtype)


def _early(value: Tensor, target: Tensor, strength: Tensor) -> Tensor:
    return straight(value, target, (strength / _RAMP).clamp(max=1.0))


def _at_once(value: Tensor, target: Tensor, strength: Tensor) -> Tensor:
    return torch.where(strength > 0, target, value)


def _falling(strength: Tensor, start: float) -> Tensor:
    """1 up to `start`, exactly 0 at strength 1, by a cosine between."""
    progress = ((strength - start) / (1 - start)).clamp(0.0, 1.0)
    return torch.where(strength >= 1, 0.0, 0.5 + 0.5 * torch.cos(math.pi * progress))


def _softmax(position: Tensor, levels: int, strength: Tensor) -> Softened:
    temperature = _COLDEST + (_HOTTEST - _COLDEST) * _falling(strength, _RAMP).to(position.dtype)
    nearest = position.round().clamp(0, levels - 1)
    total, mean, square = torch.zeros_like(position), torch.zeros_like(position), torch.zeros_like(position)
    for level in range(levels):
        away = level - nearest
        # (v - q)^2 less its smallest value, in a form that keeps its digits where v lies far out
        weight = torch.exp(away * (2 * (position - nearest) - away) / temperature)
        total, mean, square = total + weight, mean + weight * away, square + weight * away * away
    mean = mean / total
    return Softened(nearest + mean, (square / total - mean * mean).clamp(min=0) * (2 / temperature))


def _relay(position: Tensor, levels: int, strength: Tensor) -> Softened:
    middle = (levels - 1) / 2
    # at strength 0 any steepness will do (W serves); below 1e-3 a quotient of two tanh loses digits
    steepness = (strength.to(position.dtype) * _STEEPEST).clamp(min=1e-3)
    curve, slope = torch.zeros_like(position), torch.zeros_like(position)
    for step in range(levels - 1):
        rising = torch.tanh(steepness * (position - (step + 0.5)))
        curve, slope = curve + rising, slope + (1 - rising * rising)
    whole = 2 * torch.tanh(steepness * middle)
    return Softened(middle + curve / whole, slope * (steepness / whole))


LINEAR = Relaxation(straight)

RELAXATIONS.register("linear")(LINEAR)
RELAXATIONS.register("residual")(Relaxation(_residual))
RELAXATIONS.register("softmax")(Relaxation(_early, _softmax))
RELAXATIONS.register("relay")(Relaxation(_at_once, _relay))
