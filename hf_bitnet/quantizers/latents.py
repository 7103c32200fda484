"""Float weights behind given codes, as near to given weights as the codes allow. Own.

A float weight w = s (level + r) keeps its code while r stays inside the code's cell. Where the scale is a parameter that is
all. Where a rule computes the scale from the weights, the weights must also be such that the rule finds s: the outermost cells
are open to the outside, so their weights are stretched until it does. Rows where that does not come out keep r = 0, for which
a plain multiplication is enough (`WeightQuantizer.latent`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantized import Quantized
from .weight import WEIGHT_SCHEMES, WeightQuantizer, WeightScheme

# half a cell is 0.5 levels; the rest keeps a first step, or a bfloat16 weight, from changing codes by rounding alone
_WITHIN = 0.45
_ROUNDS = 12
_CLOSE = 1e-4  # the cells' margin bears what is left


@torch.no_grad()
def latent_near(quantizer: WeightQuantizer, quantized: Quantized, near: Tensor) -> Tensor:
    """A float32 weight (N, K) near `near` that `quantizer.quantize` maps to these values.

    Codes that no weight can have under the scale rule (a group of zeros, whose rule would find a smaller scale) come out as the
    nearest that it can, so callers quantize the result again and use that.

    Args:
        quantized: wanted codes (N, K) and scale. near: float (N, K).
    """
    scheme = WEIGHT_SCHEMES.get(quantizer.scheme)
    scale = quantized.scale.float().reshape(-1, 1)
    codes = scheme.rows(quantized.codes, scale)
    x = scheme.rows(near, scale) / scale
    levels, rule = codes - scheme.grid.zero_point, None if quantizer.learned else quantizer.scale_rule

    def given(x: Tensor) -> Tensor:
        """Which rows of positions have the wanted codes, (R, 1)."""
        found = scale if rule is None else scheme.scale(x * scale, rule)
        return (scheme.codes(x * scale, found) == codes).all(dim=-1, keepdim=True)

    x = _stretched(scheme, x, codes, rule)
    x = torch.where(given(x), x, levels)
    if rule is not None:
        mended = given(x)  # a rule may find other codes for the same values, with another scale: those need no mending
        for _ in range(3):  # the second and third round only remove rounding of the first
            x = torch.where(mended, x / scheme.scale(x * scale, rule) * scale, x)
    return (x * scale).reshape(near.shape)


def representable(quantizer: WeightQuantizer, quantized: Quantized, near: Tensor) -> Quantized:
    """The codes, with those of single weights changed where no weights could have them under the scale rule.

    A computed scale sees the largest weights of its group: some code must not be 0, and under absmax one must be an
    outermost one. Of two levels around the mean both must occur, whatever the scale. The largest weight of such a group
    moves, which costs the least.

    Args:
        quantized: codes (N, K) and scale. near: float (N, K), the weights that the codes stand for.
    """
    scheme = WEIGHT_SCHEMES.get(quantizer.scheme)
    grid, scale = scheme.grid, quantized.scale.reshape(-1, 1)
    if quantizer.learned and grid.levels > 2:
        return quantized
    codes, rows = scheme.rows(quantized.codes, scale), scheme.rows(near, scale)
    if grid.levels == 2:
        low, high = ((codes == code).all(dim=-1, keepdim=True) for code in (grid.lowest, grid.highest))
        lacking = low | high
        place = torch.where(low, rows, -rows).argmax(dim=-1, keepdim=True)
        wanted = torch.where(low, float(grid.highest), float(grid.lowest))
    else:
        widest = quantizer.scale_rule == "absmax"
        seen = (codes == grid.lowest) | (codes == grid.highest) if widest else codes != grid.zero_point
        lacking = ~seen.any(dim=-1, keepdim=True)
        place = rows.abs().argmax(dim=-1, keepdim=True)
        low, high = (grid.values[0], grid.values[-1]) if widest else (-1.0, 1.0)
        wanted = torch.where(rows.gather(-1, place) < 0, low, high) + grid.zero_point
    lacking = lacking & (rows != 0).any(dim=-1, keepdim=True)  # a group of zeros stays one
    changed = codes.scatter(-1, place, torch.where(lacking, wanted, codes.gather(-1, place)))
    return quantized._replace(codes=changed.to(torch.int8).reshape(quantized.codes.shape))


def _stretched(scheme: type[WeightScheme], x: Tensor, codes: Tensor, rule: str | None) -> Tensor:
    """Positions (R, n) in units of the scale, inside their cells, for which the rule (if any) finds a scale of about 1."""
    grid = scheme.grid
    outer = (codes == grid.lowest) | (codes == grid.highest)
    if rule == "absmax":  # looks at nothing but the weights beyond the outermost level
        x = x.clamp(grid.values[0], grid.values[-1])
    for _ in range(_ROUNDS):
        x = _into_cells(scheme, x, codes)  # again without a rule, too: the cells of two levels move with the mean
        if rule is None:
            continue
        found = scheme.scale(x, rule)
        if bool(((found - 1).abs() < _CLOSE).all()):
            break
        x = torch.where(outer, x / found, x)
    return x


def _into_cells(scheme: type[WeightScheme], x: Tensor, codes: Tensor) -> Tensor:
    grid = scheme.grid
    index = (codes - grid.lowest) / grid.step
    low = torch.where(codes == grid.lowest, -torch.inf, index - _WITHIN)
    high = torch.where(codes == grid.highest, torch.inf, index + _WITHIN)
    position = scheme.position(x, torch.ones_like(x[:, :1]))
    return x + (torch.minimum(torch.maximum(position, low), high) - position) * grid.step
