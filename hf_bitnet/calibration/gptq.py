"""Codes and scales of least output error, from the second moments of a layer's inputs. Pure functions of tensors.

    error(Q) = trace((W - Q) H (W - Q)^T),   H = E[x x^T]

gptq     columns are rounded in turn, the rest makes up for each one's error (arXiv 2210.17323), largest E[x^2] first
descend  every code again, given all others: never a larger error (coordinate descent, as in arXiv 2309.01885)
refit    the best scales of given codes, all scales of a row together, in closed form: s = A^-1 b with
         A_gh = t_g^T H t_h,  b_g = t_g^T H w   (t_g: the levels of group g, 0 elsewhere). Own.

All matrices are float32. Leaves out: where H comes from (`moments.py`), latent weights (`quantizers/latents.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..quantizers import Grid, Quantized

# columns that are worked on before their effect reaches the rest of the matrix, in one product
_BLOCK = 128
# further damping where a Hessian of few tokens still cannot be factored
_HARDER = 10.0
_ATTEMPTS = 6
# a scale that falls below this share of its start, or changes its sign, is held; the others are then found anew
_LEAST = 0.05
_REFITS = 8


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + damping mean(diag H) I; the identity where no input was ever different from 0."""
    mean = hessian.diagonal().mean()
    share = torch.where(mean > 0, mean * damping, torch.ones_like(mean))
    return hessian + share * torch.eye(len(hessian), device=hessian.device)


def gptq(weight: Tensor, scale: Tensor, grid: Grid, hessian: Tensor) -> Quantized:
    """Codes for fixed scales.

    Args:
        weight: (N, K). scale: as in `Quantized`. hessian: (K, K), damped.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order])
    rest, scales = weight[:, order].clone(), wide(scale, weight)[:, order]
    levels = torch.empty_like(rest)
    for block in _blocks(rest.shape[1]):
        errors = torch.empty_like(rest[:, block])
        for i, j in enumerate(range(block.start, block.stop)):
            levels[:, j] = _nearest(rest[:, j] / scales[:, j], grid)
            errors[:, i] = (rest[:, j] - levels[:, j] * scales[:, j]) / factor[j, j]
            rest[:, j + 1 : block.stop] -= errors[:, i, None] * factor[j, j + 1 : block.stop]
        rest[:, block.stop :] -= errors @ factor[block, block.stop :]
    return _quantized(levels[:, order.argsort()], scale, grid)


def descend(weight: Tensor, start: Quantized, grid: Grid, hessian: Tensor) -> Quantized:
    """One sweep over all columns; each code becomes the best one given all others. Arguments as of `gptq`."""
    levels, scales = start.levels(torch.float32), wide(start.scale, weight)
    pull = (weight - levels * scales) @ hessian  # minus half the gradient of the error
    for block in _blocks(weight.shape[1]):
        local, moved = pull[:, block], torch.empty_like(pull[:, block])
        inside = hessian[block, block]
        for i, j in enumerate(range(block.start, block.stop)):
            best = levels[:, j] + local[:, i] / (inside[i, i] * scales[:, j])
            best = _nearest(best, grid)
            moved[:, i] = (best - levels[:, j]) * scales[:, j]
            levels[:, j] = best
            local -= moved[:, i, None] * inside[i]
        pull -= moved @ hessian[block]
    return _quantized(levels, start.scale, grid)


def refit(weight: Tensor, start: Quantized, hessian: Tensor) -> Quantized:
    """The best scales for these codes; one that would not be positive stays, as where all codes are 0. Arguments of `gptq`."""
    levels = start.levels(torch.float32)
    groups = start.scale.shape[-1]
    t = levels.unflatten(-1, (groups, -1))  # (N, G, K / G)
    b = (t * (weight @ hessian).unflatten(-1, (groups, -1))).sum(dim=-1)
    columns = hessian.unflatten(0, (groups, -1))  # (G, K / G, K)
    a = torch.stack([((t[:, g] @ columns[g]).unflatten(-1, (groups, -1)) * t).sum(dim=-1) for g in range(groups)], dim=1)
    if start.scale.numel() == 1:
        a, b = a.sum(dim=(0, 1, 2)).reshape(1, 1, 1), b.sum().reshape(1, 1)
    return start._replace(scale=_solved(a, b, start.scale))


def _solved(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """A s = b for every row, (N, G, G) and (N, G); scales that would not be positive keep their start (N, G)."""
    held = a.diagonal(dim1=1, dim2=2) <= 0  # a group whose codes are all 0
    found = start
    for _ in range(_REFITS):
        equations = torch.where(held.unsqueeze(-1), torch.eye(a.shape[-1], device=a.device), a)
        found = torch.linalg.solve_ex(equations, torch.where(held, start, b).unsqueeze(-1))[0].squeeze(-1)
        bad = ~(torch.isfinite(found) & (found > _LEAST * start))
        held = held | bad
        found = torch.where(held, start, found)
    return found


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper U with U^T U = H^-1. Damps harder where rounding leaves H without a factor."""
    for _ in range(_ATTEMPTS):
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not bool(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed):
                return upper
        hessian = hessian + _HARDER * 1e-3 * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)
    raise AssertionError("a matrix of squares plus a multiple of the identity has a factor")


def _nearest(positions: Tensor, grid: Grid) -> Tensor:
    """Values in units of the scale -> the nearest levels."""
    first = grid.values[0]
    return ((positions - first) / grid.step).round_().clamp_(0, grid.levels - 1).mul_(grid.step).add_(first)


def _quantized(levels: Tensor, scale: Tensor, grid: Grid) -> Quantized:
    return Quantized((levels + grid.zero_point).to(torch.int8), scale, grid.zero_point)


def wide(scale: Tensor, weight: Tensor) -> Tensor:
    """(1, 1), (N, 1) or (N, G) -> (N, K)."""
    n, k = weight.shape
    return scale.repeat_interleave(k // scale.shape[-1], dim=-1).expand(n, k)


def _blocks(columns: int) -> Iterator[slice]:
    for start in range(0, columns, _BLOCK):
        yield slice(start, min(start + _BLOCK, columns))
