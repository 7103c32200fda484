"""Finds the grid that float weights lie on: codes and scales that give exactly these numbers in float32. Own.

Of the weights that share a scale the largest magnitude is a level of the grid times that scale. Each level is tried; the
quotient is rounded, so its neighbours are tried too. Schemes are tried from the narrowest on, in each one scale for the
tensor, then one a channel, then groups, the largest first. Weights that were rounded after they were quantized (bfloat16
values of more than three levels) lie on no grid.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..quantizers import WEIGHT_SCHEMES, Grid
from .codes import Found, Misfit, found, schemes

# sizes of groups that formats use
GROUPS = (256, 128, 64, 32, 16)
# a wrong grid is seen in a few rows, and a wrong scale in a few columns
_FEW_ROWS, _FEW_COLUMNS, _MANY_COLUMNS = 64, 64, 4096


@torch.no_grad()
def recognise(weight: Tensor) -> Found | Misfit:
    """The codes, scales and scheme of a float weight (N, K) that was quantized before it was stored.

    Returns a `Misfit` with the reason where its numbers lie on no grid.
    """
    if weight.numel() == 0:
        return Misfit(f"it has shape {tuple(weight.shape)}, which holds no weights")
    values = weight.detach().float().contiguous()
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        return Misfit(f"it holds {bad} NaN or infinite values")
    # levels of every grid are levels of the widest one (at another scale), so what is not even on that is on none
    widest = WEIGHT_SCHEMES.get(schemes()[-1]).grid
    if _may_be(values.reshape(-1, _shapes(values)[-1][1]), widest):
        for name in schemes():
            placed = _placed(values, WEIGHT_SCHEMES.get(name).grid)
            if placed is not None:
                return found(*placed, name)
    distinct = torch.unique(values[0]).numel()
    return Misfit(f"its weights lie on no grid of a scheme here; its first row holds {distinct} different values")


def _placed(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor] | None:
    """Levels (N, K) and scales of the weight on a grid, or None."""
    for shape, size in _shapes(values):
        rows = values.reshape(-1, size)
        placed = _on_grid(rows, grid) if _may_be(rows, grid) else None
        if placed is not None:
            return placed[0].reshape(values.shape), placed[1].reshape(shape)
    return None


def _shapes(values: Tensor) -> list[tuple[tuple[int, int], int]]:
    """Shapes that the scales of a weight (N, K) may have, and how many weights then share one; the fewest scales first."""
    channels, inputs = values.shape
    groups = [size for size in GROUPS if inputs > size and inputs % size == 0]
    return [((1, 1), values.numel()), ((channels, 1), inputs), *(((channels, inputs // size), size) for size in groups)]


def _on_grid(rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor] | None:
    """float32 (R, n) that share a scale each -> levels (R, n) and scales (R, 1), or None when some row is not on the grid."""
    extreme = _extreme(rows)
    levels, scale = torch.zeros_like(rows), torch.zeros_like(extreme)
    left = torch.nonzero(extreme[:, 0])[:, 0]  # rows of zeros are on the grid already, if it has a zero
    if 0.0 not in grid.values and left.numel() < rows.shape[0]:
        return None
    for value, nudge in _attempts(grid):
        mine = left[(extreme[left, 0] > 0) == (value > 0)]
        for columns in (_FEW_COLUMNS, rows.shape[1]):
            candidate = _nudged(extreme[mine] / value, nudge)
            placed, fits = _levels(rows[:, :columns][mine], candidate, grid)
            mine, candidate, placed = mine[fits], candidate[fits], placed[fits]
        levels[mine], scale[mine] = placed, candidate
        left = left[scale[left, 0] == 0]
        if left.numel() == 0:
            break
    return (levels, scale) if left.numel() == 0 else None


def _attempts(grid: Grid) -> Iterator[tuple[float, int]]:
    """Which level the largest magnitude may be, and how many numbers next to the quotient the scale is."""
    for value in sorted(filter(None, grid.values), key=abs, reverse=True):
        yield from ((value, nudge) for nudge in ((0,) if abs(value) == 1 else (0, 1, -1, 2, -2)))


def _nudged(x: Tensor, steps: int) -> Tensor:
    towards = torch.full_like(x, torch.inf if steps > 0 else 0.0)
    for _ in range(abs(steps)):
        x = torch.nextafter(x, towards)
    return x


def _levels(rows: Tensor, scale: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The nearest levels (R, n), and which rows (R) they give exactly."""
    codes = torch.round(rows / scale + grid.zero_point)
    levels = codes - grid.zero_point
    fits = (levels * scale == rows) & (codes >= grid.lowest) & (codes <= grid.highest)
    if grid.step > 1:
        fits &= (codes - grid.lowest) % grid.step == 0
    return levels, fits.all(dim=-1)


def _may_be(rows: Tensor, grid: Grid) -> bool:
    """False where a look at a few rows shows that they are not on the grid."""
    few = rows[torch.linspace(0, rows.shape[0] - 1, min(rows.shape[0], _FEW_ROWS), device=rows.device).long()]
    ordered = few[:, :_MANY_COLUMNS].sort(dim=-1).values
    if bool(((ordered[:, 1:] != ordered[:, :-1]).sum(dim=-1) >= grid.levels).any()):
        return False
    # all attempts at once, for one row
    row = few[few.abs().amax(dim=-1).argmax()].unsqueeze(0)
    extreme = _extreme(row)
    candidates = torch.cat(
        [_nudged(extreme / value, nudge) for value, nudge in _attempts(grid) if (value > 0) == (extreme > 0)]
    )
    return not bool(extreme.any()) or bool(_levels(row[:, :_MANY_COLUMNS], candidates, grid)[1].any())


def _extreme(rows: Tensor) -> Tensor:
    """The number of the largest magnitude of each row, (R, 1)."""
    return rows.gather(-1, rows.abs().argmax(dim=-1, keepdim=True))
