"""Products of rows with the packed weights of the experts that they chose: one launch a map, and no wait for the device. Own.

The weights of E experts are E tensors: a kernel is given the first one's address, and how far from it the others are. A few
places (a row and one expert of it): each is a row-vector product by itself. More: places are sorted by expert on the device,
and a program finds out from the numbers of places which expert's tile is its own; the grid has as many programs as there could
be tiles, and those that find none are done.

Not done: unpacking weights first where experts have hundreds of rows, as `packed.py` does.
"""

# kernels are another language in Python's clothes: launches take options, and constants are of a type of their own
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fits import check_experts, check_places
from ..reference import CODES_PER_BYTE, Layout, PackedWeight, RowQuantization
from .language import EXACT
from .packed import (
    INTERPRETED_ROWS,
    INTERPRETED_TILES,
    ROW_CONFIGS,
    TILE_CONFIGS,
    WORD,
    as_words,
    fits_tiles,
    has_dp4a,
    lanes_of,
    lowest_level,
    packed_linears,
    row_products,
    tile_products,
)
from .rows import Planes, quantize_planes
from .support import bucket, on_device_of, power_of_two
from .tuning import tuned

# places up to which each is a product by itself: few experts are then chosen twice. Not measured on a GPU
_MOST_PLACES = 16
# bytes that addresses are multiples of where loads may be wide
_ALIGNED = 16


@triton.jit
def _moved(pointer, distances_ptr, expert, UNIT: tl.constexpr):
    """`pointer` for another expert; distances are in elements, and multiples of UNIT."""
    return pointer + tl.multiple_of(tl.load(distances_ptr + expert), UNIT)


@tuned(INTERPRETED_ROWS, ROW_CONFIGS, ("n", "words", "BITS", "GROUPED"))
@triton.jit
def _places_kernel(
    x_ptr,
    x_scale_ptr,
    x_sum_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    out_ptr,
    index_ptr,
    w_distances_ptr,
    scale_distances_ptr,
    bias_distances_ptr,
    chosen,
    experts,
    n,
    words,
    w_row,
    w_scale_row,
    w_scale_step,
    group,
    lowest,
    zero,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    PER: tl.constexpr,
    LANES: tl.constexpr,
    GROUPED: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    place = tl.program_id(1).to(tl.int64)
    row, expert = place // chosen, tl.load(index_ptr + place)
    exists = (expert >= 0) & (expert < experts)
    expert = tl.where(exists, expert, 0)
    row_products(
        *(x_ptr + row * words * PER, x_scale_ptr + row, x_sum_ptr + row),
        *(_moved(w_ptr, w_distances_ptr, expert, UNIT), _moved(w_scale_ptr, scale_distances_ptr, expert, 1)),
        *(_moved(bias_ptr, bias_distances_ptr, expert, 1), out_ptr + place * n, exists.to(tl.int32), n, words),
        *(w_row, w_scale_row, w_scale_step, group, lowest, zero),
        *(STEP, BITS, PER, LANES, GROUPED, ONE_SCALE, BIAS, 1, BLOCK_N, BLOCK_J),
    )


@tuned(INTERPRETED_TILES, TILE_CONFIGS, ("bucket", "n", "width", "BITS", "GROUPED", "experts"))
@triton.jit
def _experts_kernel(
    x_ptr,
    x_scale_ptr,
    x_sum_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    out_ptr,
    order_ptr,
    bounds_ptr,
    w_distances_ptr,
    scale_distances_ptr,
    bias_distances_ptr,
    chosen,
    experts,
    n,
    width,
    plane,
    w_row,
    w_step,
    w_scale_row,
    w_scale_step,
    group,
    lowest,
    zero,
    bucket,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    PER: tl.constexpr,
    GROUPED: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    UNIT: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    across = tl.cdiv(n, BLOCK_N)
    tile, each = tl.program_id(0) // across, tl.arange(0, EXPERTS)
    first = tl.load(bounds_ptr + each, mask=each < experts, other=0)
    last = tl.load(bounds_ptr + each + 1, mask=each < experts, other=0)
    tiles = (last - first + BLOCK_M - 1) // BLOCK_M
    behind = tl.cumsum(tiles, axis=0)
    expert = tl.sum((behind <= tile).to(tl.int32), axis=0)
    if expert < experts:
        before = tl.sum(tl.where(each < expert, tiles, 0), axis=0)
        place = tl.load(bounds_ptr + expert) + (tile - before) * BLOCK_M + tl.arange(0, BLOCK_M)
        exists = place < tl.load(bounds_ptr + expert + 1)
        row = tl.load(order_ptr + place, mask=exists, other=0)
        column = (tl.program_id(0) % across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        tile_products(
            *(x_ptr, x_scale_ptr, x_sum_ptr),
            *(_moved(w_ptr, w_distances_ptr, expert, UNIT), _moved(w_scale_ptr, scale_distances_ptr, expert, 1)),
            *(_moved(bias_ptr, bias_distances_ptr, expert, 1), out_ptr, row // chosen, row, exists, column, n),
            *(width, plane, w_row, w_step, w_scale_row, w_scale_step, group, lowest, zero),
            *(STEP, BITS, PER, GROUPED, ONE_SCALE, BIAS, BLOCK_M, BLOCK_N, BLOCK_K),
        )


@lru_cache(maxsize=4096)
def _distances(addresses: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """How far each address is from the first, in elements of `size` bytes; int64, on `device`."""
    return torch.tensor([(each - addresses[0]) // size for each in addresses], device=device)


def _distances_of(tensors: Sequence[Tensor]) -> tuple[Tensor, int]:
    """`_distances`, and the elements that they are multiples of: 16 bytes of them, or 1."""
    addresses, size = tuple(map(Tensor.data_ptr, tensors)), tensors[0].element_size()
    wide = all(each % _ALIGNED == 0 for each in addresses)
    return _distances(addresses, size, tensors[0].device), _ALIGNED // size if wide else 1


def _multiply(
    x: Planes, index: Tensor, sorted_places: tuple[Tensor, Tensor] | None, weights: Sequence[PackedWeight], layout: Layout,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Quantized rows times the weights of one map; `sorted_places`: places by expert, and where each expert's begin."""
    packed, scale, bias = weights[0]
    (_, per, plane), (n, width), groups = x.codes.shape, packed.shape, scale.shape[1]
    out = torch.zeros(index.numel(), n, dtype=dtype, device=packed.device)
    if not out.numel():
        return out
    step = 0 if scale.shape[0] == 1 else scale.stride(0)
    biases = [out if each is None else each for _, _, each in weights]
    flags = {"STEP": layout.step, "BITS": layout.bits, "PER": per, "BIAS": bias is not None}
    flags |= {"GROUPED": groups > 1, "ONE_SCALE": scale.numel() == 1, **EXACT}
    chosen, experts = index.shape[1], len(weights)
    scales_at, biases_at = _distances_of([each for _, each, _ in weights])[0], _distances_of(biases)[0]
    with on_device_of(packed):
        words = [as_words(each, groups) for each, _, _ in weights] if sorted_places is None else []
        if sorted_places is None:
            assert all(each is not None for each in words)
            found = [each for each in words if each is not None]
            words_at, unit = _distances_of(found)
            count = found[0].shape[1]
            _places_kernel[lambda picked: (triton.cdiv(n, picked["BLOCK_N"]), index.numel())](
                *(x.codes.view(torch.int32), x.scale, x.sums, found[0], scale, biases[0], out, index),
                *(words_at, scales_at, biases_at, chosen, experts, n, count, found[0].stride(0)),
                *(step, scale.stride(1), count // groups, layout.lowest, layout.zero_point),
                LANES=lanes_of(layout.bits),
                UNIT=unit,
                **flags,
            )
            return out
        order, bounds = sorted_places
        packed_at, unit = _distances_of([each for each, _, _ in weights])
        rows = order.numel()

        def grid(picked: dict[str, int]) -> tuple[int]:
            # every expert may have one tile that is not full
            tiles = min(rows // picked["BLOCK_M"] + experts, rows)
            return (tiles * triton.cdiv(n, picked["BLOCK_N"]),)

        _experts_kernel[grid](
            *(x.codes, x.scale, x.sums, packed, scale, biases[0], out, order, bounds, packed_at, scales_at, biases_at),
            *(chosen, experts, n, width, plane, *packed.stride(), step, scale.stride(1), width // groups),
            *(lowest_level(layout), layout.zero_point, bucket(rows)),
            UNIT=unit,
            EXPERTS=power_of_two(experts),
            **flags,
        )
    return out


def packed_experts(
    x: Tensor,
    index: Tensor,
    maps: Sequence[Sequence[PackedWeight]],
    layout: Layout,
    rows: RowQuantization,
    dtype: torch.dtype,
) -> list[Tensor]:
    """`reference.packed_experts`: x is quantized once."""
    check_places(x, index)
    k, per = x.shape[1], CODES_PER_BYTE[layout.bits]
    width = -(-k // per)
    check_experts(maps, k, width)
    index = index.contiguous()
    firsts = [experts[0] for experts in maps]
    if not k or not all(fits_tiles(scale, k, per) for _, scale, _ in firsts):
        return _one_by_one(x, index, maps, layout, rows, dtype)
    quantized = quantize_planes(x, -(-width // WORD) * WORD, per, *rows)
    by_place = (
        index.numel() <= _MOST_PLACES
        and has_dp4a(x)
        and all(
            as_words(packed, firsts[i][1].shape[1]) is not None for i, experts in enumerate(maps) for packed, _, _ in experts
        )
    )
    sorted_places = None if by_place else _sorted(index, len(maps[0]))
    return [_multiply(quantized, index, sorted_places, experts, layout, dtype) for experts in maps]


def _sorted(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Places by expert, and where each expert's begin, the end of the last one's included; both int64."""
    numbers, order = index.reshape(-1).sort(stable=True)
    return order, torch.searchsorted(numbers, torch.arange(experts + 1, device=index.device))


def _one_by_one(
    x: Tensor,
    index: Tensor,
    maps: Sequence[Sequence[PackedWeight]],
    layout: Layout,
    rows: RowQuantization,
    dtype: torch.dtype,
) -> list[Tensor]:
    """For scales whose groups begin within a byte."""
    places = index.reshape(-1)
    results = [torch.zeros(places.numel(), experts[0][0].shape[0], dtype=dtype, device=x.device) for experts in maps]
    for number in range(len(maps[0])):
        at = (places == number).nonzero().squeeze(1)
        found = packed_linears(x[at // max(index.shape[1], 1)], [experts[number] for experts in maps], layout, rows, dtype)
        for y, part in zip(results, found, strict=True):
            y[at] = part
    return results
