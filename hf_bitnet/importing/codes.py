"""Codes and scales of other programs, put into a scheme of ours with not one value changed. Own.

A foreign layer is levels (whole numbers, `value = level * scale`) and scales. It becomes the narrowest scheme whose grid holds
all of its levels, with the fewest scales that say the same. Levels that no grid of the same width holds (-8 of a 4-bit range,
-128 of an 8-bit one) are refused, or go where the user says (`Outside`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..quantizers import WEIGHT_SCHEMES, Quantized, WeightQuantizer

Outside = Literal["refuse", "wider", "clip"]
# bounds the working memory of counting
_COUNTED_AT_ONCE = 2**20
OUTSIDE: tuple[str, ...] = get_args(Outside)


class Found(NamedTuple):
    """A layer of ours.

    Attributes:
        quantized: codes int8 (N, K) and scale. quantizer: the scheme and granularity that they are of.
        activation: scheme of the layer's input in the program it comes from.
    """

    quantized: Quantized
    quantizer: WeightQuantizer
    activation: str = "none"


class Misfit(NamedTuple):
    """Why a layer cannot be a layer of ours."""

    reason: str


@dataclass(frozen=True)
class Levels:
    """A foreign weight.

    Attributes:
        levels: whole numbers, int8 or int16 (N, K).
        scale: float32 (1, 1), (N, 1) or (N, G), any sign; where it is 0 the levels mean nothing.
        bits: that the foreign format keeps a level in.
        learned: whether the scale was a parameter, and should be one again.
    """

    levels: Tensor
    scale: Tensor
    bits: int
    learned: bool = False


def schemes() -> list[str]:
    """Names of the weight schemes, the narrowest first."""
    kinds = {name: WEIGHT_SCHEMES.get(name) for name in WEIGHT_SCHEMES}
    return sorted(kinds, key=lambda name: (kinds[name].storage_bits, kinds[name].grid.levels))


def with_half_levels() -> str:
    """Name of the narrowest scheme whose levels lie half way between whole numbers, -1.5 to 1.5."""
    return next(name for name in schemes() if WEIGHT_SCHEMES.get(name).grid.values == [-1.5, -0.5, 0.5, 1.5])


def fit(foreign: Levels, outside: str = "refuse") -> Found | Misfit:
    """The narrowest scheme that holds these levels.

    Args:
        outside: what becomes of levels that no scheme of as many bits has: "refuse", "wider" (the next wider scheme) or
            "clip" (the nearest level; the only one that changes values).

    Returns a `Misfit` where levels do not fit, or a scale is not a finite number.
    """
    if not bool(torch.isfinite(foreign.scale).all()):
        return Misfit(f"{int((~torch.isfinite(foreign.scale)).sum())} of its scales are NaN or infinite")
    levels, scale, present = _reduced(*_positive(foreign))
    width = max(foreign.bits, 1)
    fitting = [name for name in schemes() if _holds(name, present) or _holds(name, present, halved=True)]
    narrow = [name for name in fitting if WEIGHT_SCHEMES.get(name).storage_bits <= _stored(width)]
    if narrow or (fitting and outside == "wider"):
        name = (narrow or fitting)[0]
        if not _holds(name, present):  # odd levels are half ones at twice the scale
            levels, scale = levels / 2, scale * 2
        return found(levels, scale, name, learned=foreign.learned)
    if outside == "clip":
        name = _clipping(width)
        grid = WEIGHT_SCHEMES.get(name).grid
        return found(levels.clamp(grid.lowest, grid.highest), scale, name, learned=foreign.learned)
    return Misfit(_outside(present, width, bool(fitting)))


def found(levels: Tensor, scale: Tensor, scheme: str, *, learned: bool = False) -> Found:
    """Levels (whole or half numbers, (N, K)) that are on the grid of `scheme`, with the fewest scales that say the same."""
    kind = WEIGHT_SCHEMES.get(scheme)
    scale = _fewest(levels, scale.float())
    granularity, group_size = "tensor", None
    if scale.shape[1] > 1:
        granularity, group_size = "group", levels.shape[1] // scale.shape[1]
    elif scale.shape[0] > 1:
        granularity = "channel"
    quantizer = WeightQuantizer(scheme, "learned" if learned else kind.default_scale, granularity, group_size)
    # one row alone: (1, 1) is a tensor's scale and a channel's
    assert quantizer.scale_shape(*levels.shape) == tuple(scale.shape)
    codes = levels.to(torch.int8) if kind.grid.zero_point == 0 else (levels + kind.grid.zero_point).to(torch.int8)
    return Found(Quantized(codes, scale, kind.grid.zero_point), quantizer)


def same_value(one: Quantized, other: Tensor) -> bool:
    """Whether the codes stand for exactly these values, rounded to their dtype."""
    return torch.equal(one.dequantize(other.dtype), other)


def _holds(scheme: str, present: list[int], *, halved: bool = False) -> bool:
    """Whether all levels, or their halves, are on the scheme's grid."""
    values = WEIGHT_SCHEMES.get(scheme).grid.values
    return all((level / 2 if halved else level) in values for level in present)


def _stored(bits: int) -> int:
    """Bits of the narrowest scheme that is stored in at least so many."""
    return min(stored for name in schemes() if (stored := WEIGHT_SCHEMES.get(name).storage_bits) >= min(bits, 8))


def _clipping(bits: int) -> str:
    """Of the schemes of so many bits, the one that reaches furthest."""
    whole = [name for name in schemes() if float(WEIGHT_SCHEMES.get(name).grid.zero_point).is_integer()]
    same = [name for name in whole if WEIGHT_SCHEMES.get(name).storage_bits == _stored(bits)]
    return same[-1]


def _outside(present: list[int], bits: int, fits_wider: bool) -> str:
    low, high = present[0], present[-1]
    grid = WEIGHT_SCHEMES.get(_clipping(bits)).grid
    ours = f"{grid.lowest} to {grid.highest}"
    ways = "outside='clip' moves them to the nearest level, which changes these weights"
    if fits_wider:
        ways = f"outside='wider' stores the layer in more bits, value for value; {ways}"
    return f"its {bits}-bit levels go from {low} to {high}, those of {_stored(bits)}-bit schemes here from {ours}; {ways}"


def _positive(foreign: Levels) -> tuple[Tensor, Tensor]:
    """Levels and scales with no scale below 0; where a scale is 0 so are the levels."""
    scale = foreign.scale.float()
    if bool((scale > 0).all()):
        return foreign.levels, scale
    sign = scale.sign().to(torch.int16)
    columns = foreign.levels.shape[1] // sign.shape[1]
    # int8 holds no opposite of its lowest level
    return foreign.levels.to(torch.int16) * sign.repeat_interleave(columns, dim=1), scale.abs()


def _present(levels: Tensor) -> list[int]:
    """The different levels, ascending. Sorting them all would take longer than everything else."""
    lowest, highest = (int(each) for each in torch.aminmax(levels))
    counts = torch.zeros(highest - lowest + 1, dtype=torch.int64, device=levels.device)
    for rows in levels.split(max(1, _COUNTED_AT_ONCE // levels.shape[1])):
        # int16 does not hold the distance of all int16 levels
        counts += torch.bincount((rows.to(torch.int32) - lowest).flatten(), minlength=counts.numel())
        if bool(counts.all()):  # which is soon so, unless the levels are many
            break
    return [lowest + index for index in torch.nonzero(counts)[:, 0].tolist()]


def _reduced(levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Without a factor that all levels share, where the scales can take it over exactly: 0 and +-127 become 0 and +-1.

    Returns levels, scales and the different levels, ascending.
    """
    present = _present(levels)
    factor = math.gcd(*present)
    if factor <= 1:
        return levels, scale, present
    larger = scale * factor
    if not all(torch.equal((level // factor) * larger, level * scale) for level in present):
        return levels, scale, present
    # int8 holds no factor of 128
    return torch.div(levels.to(torch.int16), factor, rounding_mode="trunc"), larger, [level // factor for level in present]


def _fewest(levels: Tensor, scale: Tensor) -> Tensor:
    """The same scales with fewer of them: one for the tensor, one a row, or groups joined in pairs as often as it goes.

    A scale whose levels are all 0 may be any, so it takes the mean of the others.
    """
    used = _has_any(levels.reshape(scale.numel(), -1)).reshape(scale.shape)
    if not bool(used.any()):
        return scale.new_ones(1, 1)
    lowest, highest = torch.where(used, scale, torch.inf), torch.where(used, scale, -torch.inf)
    if bool(lowest.amin() == highest.amax()):
        return lowest.amin().reshape(1, 1)
    typical = scale[used].mean()
    groups = scale.shape[1]
    for count in (1, *(groups >> shift for shift in range(groups.bit_length() - 1, 0, -1) if groups % (1 << shift) == 0)):
        low, high = lowest.unflatten(1, (count, -1)).amin(dim=-1), highest.unflatten(1, (count, -1)).amax(dim=-1)
        if bool((low >= high).all()):
            return torch.where(low.isfinite(), low, typical)
    return torch.where(used, scale, typical)


def _has_any(rows: Tensor) -> Tensor:
    """Which rows of whole numbers (R, n) are not all 0: bool (R,). By words of eight bytes where they can be."""
    words = not rows.is_floating_point() and rows.is_contiguous() and rows.shape[1] * rows.itemsize % 8 == 0
    if words and rows.storage_offset() * rows.itemsize % 8 == 0:
        rows = rows.view(torch.int64)
    return rows.ne(0).any(dim=-1)
