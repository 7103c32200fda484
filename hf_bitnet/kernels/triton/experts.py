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
from typing import Any, NamedTuple

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
# bytes of the widest load
_WIDEST = 16


@triton.jit
def _moved(pointer, distances_ptr, expert, ALIGNED: tl.constexpr):
    """`pointer` for another expert; distances are in bytes, and multiples of ALIGNED."""
    size: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
    return pointer + tl.multiple_of(tl.load(distances_ptr + expert) // size, ALIGNED // size if size < ALIGNED else 1)


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
    distances_ptr,
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
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    place = tl.program_id(1).to(tl.int64)
    row, expert = place // chosen, tl.load(index_ptr + place)
    exists = (expert >= 0) & (expert < experts)
    expert = tl.where(exists, expert, 0)
    row_products(
        *(x_ptr + row * words * PER, x_scale_ptr + row, x_sum_ptr + row),
        *(_moved(w_ptr, distances_ptr, expert, ALIGNED), _moved(w_scale_ptr, distances_ptr + experts, expert, 1)),
        *(_moved(bias_ptr, distances_ptr + 2 * experts, expert, 1), out_ptr + place * n, exists.to(tl.int32), n, words),
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
    distances_ptr,
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
    ALIGNED: tl.constexpr,
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
            *(_moved(w_ptr, distances_ptr, expert, ALIGNED), _moved(w_scale_ptr, distances_ptr + experts, expert, 1)),
            *(_moved(bias_ptr, distances_ptr + 2 * experts, expert, 1), out_ptr, row // chosen, row, exists, column, n),
            *(width, plane, w_row, w_step, w_scale_row, w_scale_step, group, lowest, zero),
            *(STEP, BITS, PER, GROUPED, ONE_SCALE, BIAS, BLOCK_M, BLOCK_N, BLOCK_K),
        )


# a captured CUDA graph holds the address of what is kept here: more than any model has layers, so that nothing is dropped
@lru_cache(maxsize=1 << 14)
def _distances(addresses: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """How far each address of a row is from the row's first, in bytes; int64 (rows, experts), on `device`."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("packed experts are called for the first time inside a CUDA graph; call the model once before")
    return torch.tensor([[each - row[0] for each in row] for row in addresses], device=device)


class _Map(NamedTuple):
    """What both kernels are told of the weights of one map, beside the weights themselves.

    Attributes:
        n: outputs. scale: of the first expert. biases: of all; one of something else where there are none.
        distances: see `_distances`, of weights, scales and biases.
        strides: of the scales: between rows, between groups. groups: of inputs with a scale of their own.
        flags: constants of the kernels.
    """

    n: int
    scale: Tensor
    biases: list[Tensor]
    distances: Tensor
    strides: tuple[int, int]
    groups: int
    flags: dict[str, Any]


def _map_of(weights: Sequence[PackedWeight], layout: Layout) -> _Map:
    packed, scale, bias = weights[0]
    biases = [each.contiguous() for _, _, each in weights if each is not None] or [scale] * len(weights)
    tensors = [each for each, _, _ in weights], [each for _, each, _ in weights], biases
    addresses = tuple(tuple(map(Tensor.data_ptr, each)) for each in tensors)
    strides = 0 if scale.shape[0] == 1 else scale.stride(0), scale.stride(1)
    flags = {"STEP": layout.step, "BITS": layout.bits, "PER": CODES_PER_BYTE[layout.bits], "BIAS": bias is not None}
    flags |= {"GROUPED": scale.shape[1] > 1, "ONE_SCALE": scale.numel() == 1, **EXACT}
    # loads may be wide where every address is a multiple of their width
    flags |= {"ALIGNED": _WIDEST if all(each % _WIDEST == 0 for each in addresses[0]) else 1}
    return _Map(packed.shape[0], scale, biases, _distances(addresses, packed.device), strides, scale.shape[1], flags)


def _by_place(
    x: Planes, index: Tensor, words: Sequence[Tensor], weights: Sequence[PackedWeight], layout: Layout, out: Tensor
) -> None:
    """Products of each place by itself; `words`: the packed weights as int32."""
    of, (_, count) = _map_of(weights, layout), words[0].shape
    _places_kernel[lambda picked: (triton.cdiv(of.n, picked["BLOCK_N"]), index.numel())](
        *(x.codes.view(torch.int32), x.scale, x.sums, words[0], of.scale, of.biases[0], out, index),
        *(of.distances, index.shape[1], len(weights), of.n, count, words[0].stride(0)),
        *(*of.strides, count // of.groups, layout.lowest, layout.zero_point),
        LANES=lanes_of(layout.bits),
        **of.flags,
    )


def _by_expert(
    x: Planes, index: Tensor, order: Tensor, bounds: Tensor, weights: Sequence[PackedWeight], layout: Layout, out: Tensor
) -> None:
    """Products of all places of an expert together; `order` and `bounds`: see `_sorted`."""
    of, packed = _map_of(weights, layout), weights[0][0]
    rows, experts, width = order.numel(), len(weights), packed.shape[1]

    def grid(picked: dict[str, int]) -> tuple[int]:
        # every expert may have one tile that is not full
        tiles = min(rows // picked["BLOCK_M"] + experts, rows)
        return (tiles * triton.cdiv(of.n, picked["BLOCK_N"]),)

    _experts_kernel[grid](
        *(x.codes, x.scale, x.sums, packed, of.scale, of.biases[0], out, order, bounds, of.distances),
        *(index.shape[1], experts, of.n, width, x.codes.shape[2], *packed.stride(), *of.strides, width // of.groups),
        *(lowest_level(layout), layout.zero_point, bucket(rows)),
        EXPERTS=power_of_two(experts),
        **of.flags,
    )


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
    index, places = index.contiguous(), index.numel()
    outs = [torch.zeros(places, experts[0][0].shape[0], dtype=dtype, device=x.device) for experts in maps]
    if not k or not all(fits_tiles(experts[0][1], k, per) for experts in maps):
        _one_by_one(x, index, maps, layout, rows, outs)
        return outs
    used = [(experts, out) for experts, out in zip(maps, outs, strict=True) if out.numel()]
    if not used:
        return outs
    quantized = quantize_planes(x, -(-width // WORD) * WORD, per, *rows)
    words = [_words_of(experts) for experts, _ in used] if places <= _MOST_PLACES and has_dp4a(x) else []
    with on_device_of(x):
        if words and all(each is not None for each in words):
            for (experts, out), of_map in zip(used, words, strict=True):
                _by_place(quantized, index, of_map or (), experts, layout, out)
            return outs
        order, bounds = _sorted(index, len(maps[0]))
        for experts, out in used:
            _by_expert(quantized, index, order, bounds, experts, layout, out)
    return outs


def _words_of(experts: Sequence[PackedWeight]) -> list[Tensor] | None:
    """The packed weights as int32, where all of them can be."""
    found = [as_words(packed, scale.shape[1]) for packed, scale, _ in experts]
    whole = [each for each in found if each is not None]
    return whole if len(whole) == len(found) else None


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
    outs: Sequence[Tensor],
) -> None:
    """For scales whose groups begin within a byte."""
    places = index.reshape(-1)
    for number in range(len(maps[0])):
        at = (places == number).nonzero().squeeze(1)
        weights = [experts[number] for experts in maps]
        found = packed_linears(x[at // max(index.shape[1], 1)], weights, layout, rows, outs[0].dtype)
        for out, part in zip(outs, found, strict=True):
            out[at] = part
