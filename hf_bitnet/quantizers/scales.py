"""Rules that choose the scale of a group of weights.

A rule maps rows (R, n) of float32 weights that share one scale each, and the scheme's grid, to float32 scales (R, 1).
Every rule is homogeneous: scale(a * w) = a * scale(w).

absmean        BitNet b1.58 (arXiv 2402.17764), BitNet (2310.11453); on wider grids LSQ's 2 mean|w| / sqrt(Qp) (1902.08153)
absmax         nothing is clipped
threshold      TWN (arXiv 1605.04711): mean of the |w| above 0.7 mean|w|; near the optimum, without a sort
least_squares  the exact minimum of sum (w - value)^2, closed form over sorted |w|. Own.
learned        LSQ: a parameter of the module; this is only its start

Leaves out: rules that look at activations (they live with the calibration code).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .. import kernels
from ..registry import Registry

# below this a scale is noise; the same floor as transformers' bitnet layers, so that codes agree with theirs
SMALLEST_SCALE = 1e-5
_TWN_THRESHOLD = 0.7
# the least-squares sweep sorts every weight once for each level, which is absurd for 255 levels
_MOST_SWEPT_LEVELS = 16
# steps sorted at once: bounds the float64 working memory of one sweep to some hundreds of megabytes
_SWEPT_AT_ONCE = 2**22


@dataclass(frozen=True)
class Grid:
    """The legal codes of a scheme: lowest, lowest + step, ..., highest, and `value = (code - zero_point) * scale`."""

    lowest: int
    highest: int
    step: int = 1
    zero_point: float = 0.0

    @property
    def levels(self) -> int:
        return (self.highest - self.lowest) // self.step + 1

    @property
    def values(self) -> list[float]:
        """The representable values at scale 1, ascending."""
        return [code - self.zero_point for code in range(self.lowest, self.highest + 1, self.step)]


ScaleRule = Callable[[Tensor, Grid], Tensor]
SCALE_RULES: Registry[ScaleRule] = Registry("weight scale rule")


def _mean(rows: Tensor) -> Tensor:
    # a whole-tensor mean is reduced in another order than a mean over one long row; transformers uses the former
    return rows.mean().reshape(1, 1) if rows.shape[0] == 1 else rows.mean(dim=-1, keepdim=True)


@SCALE_RULES.register("absmean")
def absmean(rows: Tensor, grid: Grid) -> Tensor:
    """mean|w| for one- and two-magnitude grids, 2 mean|w| / sqrt(largest value) for wider ones."""
    mean = kernels.mean_magnitudes(rows)
    if grid.levels > 4:
        mean = mean * (2.0 / grid.values[-1] ** 0.5)
    return mean.clamp(min=SMALLEST_SCALE)


@SCALE_RULES.register("absmax")
def absmax(rows: Tensor, grid: Grid) -> Tensor:
    """The smallest scale at which no weight lies outside the grid."""
    lowest, highest = grid.values[0], grid.values[-1]
    if -lowest == highest:
        scale = rows.abs().amax(dim=-1, keepdim=True) / highest
    else:
        low, high = torch.aminmax(rows, dim=-1, keepdim=True)
        scale = torch.maximum(low / lowest, high / highest)
    return scale.clamp(min=SMALLEST_SCALE)


@SCALE_RULES.register("threshold")
def threshold(rows: Tensor, grid: Grid) -> Tensor:
    """Mean of the magnitudes above 0.7 mean|w|; for ternary grids."""
    if grid.values != [-1.0, 0.0, 1.0]:
        raise ValueError("the weight scale rule 'threshold' is for ternary weights; use weight_scale='least_squares'")
    magnitude = rows.abs()
    kept = magnitude > _TWN_THRESHOLD * kernels.mean_magnitudes(rows)
    total = (magnitude * kept).sum(dim=-1, keepdim=True)
    return (total / kept.sum(dim=-1, keepdim=True).clamp(min=1)).clamp(min=SMALLEST_SCALE)


@SCALE_RULES.register("least_squares")
def least_squares(rows: Tensor, grid: Grid) -> Tensor:
    """The scale (with its nearest codes) of least squared error, exactly."""
    return weighted_least_squares(rows, grid, None)


def weighted_least_squares(rows: Tensor, grid: Grid, importance: Tensor | None) -> Tensor:
    """The scale (R, 1) of least sum importance (w - value)^2, exactly; `importance` (R, n), 0 or more; None is 1 everywhere.

    As the scale falls from infinity, a weight steps up one level each time scale = |w| / threshold. Between two steps the
    codes are fixed, the best scale is `a / b` and the error `sum w^2 - a^2 / b` with `a = sum value * w`,
    `b = sum value^2`. Sorting all steps and two running sums give every candidate; the largest `a^2 / b` wins. An importance
    moves no step, because each weight's nearest code is still its best; it multiplies every term of the sums.
    """
    if grid.levels > _MOST_SWEPT_LEVELS:
        raise ValueError(
            f"weight_scale='least_squares' serves grids of at most {_MOST_SWEPT_LEVELS} levels, this one has {grid.levels}; "
            "use weight_scale='absmax'"
        )
    at_once = max(1, _SWEPT_AT_ONCE // (rows.shape[-1] * grid.levels))
    weighed = torch.ones_like(rows[:1, :1]).expand_as(rows) if importance is None else importance.expand_as(rows)
    parts = zip(rows.split(at_once), weighed.split(at_once), strict=True)
    return torch.cat([_least_squares_rows(*part, grid) for part in parts]).clamp(min=SMALLEST_SCALE)


def _least_squares_rows(rows: Tensor, importance: Tensor, grid: Grid) -> Tensor:
    """float32 (R, n) -> (R, 1). The sums run in float64: their differences decide between near-equal candidates."""
    rows, importance = rows.double(), importance.double()
    where, gain_a, gain_b = [], [], []
    a = b = rows.new_zeros(rows.shape[0], 1)
    for magnitude, belongs, values in _sides(rows, grid.values):
        # the level nearest to zero is where a weight starts; on a binary or SEQ grid that is not zero itself
        a = a + values[0] * (magnitude * importance).sum(dim=-1, keepdim=True)
        b = b + values[0] ** 2 * (belongs * importance).sum(dim=-1, keepdim=True)
        for lower, upper in pairwise(values):
            # a weight of the other side has magnitude 0: it steps up last of all, where it can only lose
            where.append(magnitude / ((lower + upper) / 2))
            gain_a.append((upper - lower) * magnitude * importance)
            gain_b.append((upper**2 - lower**2) * importance)
    if where:
        order = torch.cat(where, dim=-1).argsort(dim=-1, descending=True)
        a = torch.cat([a, a + torch.cat(gain_a, dim=-1).gather(-1, order).cumsum(-1)], dim=-1)
        b = torch.cat([b, b + torch.cat(gain_b, dim=-1).gather(-1, order).cumsum(-1)], dim=-1)
    best = torch.where(b > 0, a.square() / b, torch.zeros_like(a)).argmax(dim=-1, keepdim=True)
    return (a.gather(-1, best) / b.gather(-1, best).clamp(min=torch.finfo(torch.float64).tiny)).float()


def _sides(rows: Tensor, values: list[float]) -> list[tuple[Tensor, Tensor, list[float]]]:
    """(magnitudes, which weights they are of, levels they can reach, ascending) of the weights above and below zero."""
    above, below = [value for value in values if value >= 0], [-value for value in reversed(values) if value <= 0]
    if above == below:  # one sweep does for both
        return [(rows.abs(), torch.ones_like(rows, dtype=torch.bool), above)]
    return [(rows.clamp(min=0), rows >= 0, above), ((-rows).clamp(min=0), rows < 0, below)]


@SCALE_RULES.register("learned")
def learned_start(rows: Tensor, grid: Grid) -> Tensor:
    """Where a learned scale starts: least squares, or absmax on grids too wide for it."""
    return absmax(rows, grid) if grid.levels > _MOST_SWEPT_LEVELS else least_squares(rows, grid)
