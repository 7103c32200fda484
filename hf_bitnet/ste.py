"""Straight-through estimators: what stands in for the derivative of rounding. Forward values never depend on them.

A weight at position v among the levels (0 the lowest, 1 the next, ...) is rounded to a level. An estimator replaces that
staircase by a surrogate curve and supplies, in closed form, the surrogate's slope by v and by the temperature T.

identity   slope 1 everywhere                                               arXiv 1308.3432
clipped    slope 1 up to `threshold` levels beyond the outermost, then 0    arXiv 1602.02830, LSQ (1902.08153): threshold 0;
           the default 0.5 is where rounding starts to clip
tanh       each step a scaled tanh of steepness T                           DSQ, arXiv 1908.05033
sigmoid    the same with the logistic curve: sigmoid at T is tanh at T / 2
learnable  tanh whose T is a trained parameter                              own, after DSQ
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .registry import Registry

# (position (N, K), number of levels, threshold, temperature 0-dim) -> same shape as position
Curve = Callable[[Tensor, int, float, Tensor], Tensor]


@dataclass(frozen=True)
class STE:
    """One estimator.

    Attributes:
        surrogate: the curve that is differentiated in place of rounding (for tests and plots).
        slope: its derivative by the position; None means 1 everywhere, so nothing need be computed.
        temperature_slope: its derivative by the temperature; None when the temperature is not learned.
    """

    surrogate: Curve
    slope: Curve | None
    temperature_slope: Curve | None = None


ESTIMATORS: Registry[STE] = Registry("STE")


def _within(position: Tensor, levels: int, threshold: float) -> Tensor:
    return (position >= -threshold) & (position <= levels - 1 + threshold)


def _identity(position: Tensor, levels: int, threshold: float, temperature: Tensor) -> Tensor:
    return position


def _clip(position: Tensor, levels: int, threshold: float, temperature: Tensor) -> Tensor:
    return position.clamp(-threshold, levels - 1 + threshold)


def _clip_slope(position: Tensor, levels: int, threshold: float, temperature: Tensor) -> Tensor:
    return _within(position, levels, threshold).to(position.dtype)


def _offset(position: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The step a position stands on (0 .. levels - 2) and the distance from that step's middle."""
    step = position.floor().clamp(0, levels - 2)
    return step, position - step - 0.5


def _soft(position: Tensor, levels: int, threshold: float, temperature: Tensor) -> Tensor:
    step, z = _offset(position, levels)
    return step + 0.5 + 0.5 * torch.tanh(temperature * z) / torch.tanh(temperature / 2)


def _soft_slope(position: Tensor, levels: int, threshold: float, temperature: Tensor) -> Tensor:
    _, z = _offset(position, levels)
    return 0.5 * temperature * (1 - torch.tanh(temperature * z).square()) / torch.tanh(temperature / 2)


def _soft_temperature_slope(position: Tensor, levels: int, threshold: float, temperature: Tensor) -> Tensor:
    _, z = _offset(position, levels)
    curve, end = torch.tanh(temperature * z), torch.tanh(temperature / 2)
    return 0.5 * (z * (1 - curve.square()) / end - 0.5 * curve * (1 - end.square()) / end.square())


def _sigmoid(position: Tensor, levels: int, threshold: float, temperature: Tensor) -> Tensor:
    return _soft(position, levels, threshold, temperature / 2)


def _sigmoid_slope(position: Tensor, levels: int, threshold: float, temperature: Tensor) -> Tensor:
    return _soft_slope(position, levels, threshold, temperature / 2)


ESTIMATORS.register("identity")(STE(_identity, slope=None))
ESTIMATORS.register("clipped")(STE(_clip, _clip_slope))
ESTIMATORS.register("tanh")(STE(_soft, _soft_slope))
ESTIMATORS.register("sigmoid")(STE(_sigmoid, _sigmoid_slope))
ESTIMATORS.register("learnable")(STE(_soft, _soft_slope, _soft_temperature_slope))
