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

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fits import check_counts, check_experts, check_places
from ..kept import KeptFor
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


class _Map(NamedTuple):
    """What both kernels are told of the weights of one map, beside the weights themselves.

    Attributes:
        made_of: what must not have changed for it to describe these weights.
        n: outputs. width: bytes of a packed row.
        distances: of the experts' weights, scales and biases from the first one's, in bytes; int64 (3, experts).
        strides: of the scales: between rows, between groups. groups: of inputs with a scale of their own.
        whole: whether every weight begins where a word may.
        copies: of biases with gaps.
        flags: constants of the kernels.
    """

    made_of: tuple[Any, ...]
    n: int
    width: int
    distances: Tensor
    strides: tuple[int, int]
    groups: int
    whole: bool
    copies: list[Tensor]
    flags: dict[str, Any]

    def bias(self, weight: PackedWeight) -> Tensor:
        """Of the first expert; something else where there are none."""
        if self.copies:
            return self.copies[0]
        return weight[1] if weight[2] is None else weight[2]


# for the first expert's packed tensor. A captured CUDA graph holds the address of the distances, which live as long as that
# tensor does, unless it is then called with other experts beside it
_KEPT: KeptFor[_Map] = KeptFor()
_nbytes = attrgetter("nbytes")


def _addresses(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(map(Tensor.data_ptr, tensors))


def _map_of(weights: Sequence[PackedWeight], k: int, layout: Layout) -> _Map:
    """What there is to know of weights; looked at when they are first seen. Raises ValueError where they are not alike."""
    packed, scales, biases = zip(*weights, strict=True)
    given = tuple(0 if bias is None else bias.data_ptr() for bias in biases)
    dtype = None if biases[0] is None else biases[0].dtype
    # of the first one all that the others are told, of every one where it lies and how long it is
    first = packed[0].shape, packed[0].stride(), scales[0].shape, scales[0].stride(), dtype
    sizes = *map(_nbytes, packed), *map(_nbytes, scales)
    made_of = k, layout, _addresses(packed), _addresses(scales), given, sizes, first
    found = _KEPT.get(packed[0])
    if found is None or found.made_of != made_of:
        check_experts(weights, k, -(-k // CODES_PER_BYTE[layout.bits]))
        found = _describe(weights, layout, made_of)
        if not found.copies:  # which are for one call
            _KEPT.put(packed[0], found)
    return found


def _describe(weights: Sequence[PackedWeight], layout: Layout, made_of: tuple[Any, ...]) -> _Map:
    packed, scale, bias = weights[0]
    given = [each for _, _, each in weights if each is not None]
    gaps = any(not each.is_contiguous() for each in given)
    if packed.is_cuda and torch.cuda.is_current_stream_capturing():
        first = "packed experts are called for the first time inside a CUDA graph; call the model once before"
        copied = "biases of packed experts have gaps and are copied at each call, which no CUDA graph can; make them contiguous"
        raise RuntimeError(copied if gaps else first)
    biases = [each.contiguous() for each in given] or [scale] * len(weights)
    rows = [_addresses(each) for each in ([each for each, _, _ in weights], [each for _, each, _ in weights], biases)]
    flags = {"STEP": layout.step, "BITS": layout.bits, "PER": CODES_PER_BYTE[layout.bits], "BIAS": bias is not None}
    flags |= {"GROUPED": scale.shape[1] > 1, "ONE_SCALE": scale.numel() == 1, **EXACT}
    # loads may be wide where every address is a multiple of their width
    flags |= {"ALIGNED": _WIDEST if all(each % _WIDEST == 0 for each in rows[0]) else 1}
    return _Map(
        made_of,
        *packed.shape,
        distances=torch.tensor([[each - row[0] for each in row] for row in rows], device=packed.device),
        strides=(0 if scale.shape[0] == 1 else scale.stride(0), scale.stride(1)),
        groups=scale.shape[1],
        whole=all(each % WORD == 0 for each in rows[0]),
        copies=biases if gaps else [],
        flags=flags,
    )


def _by_place(
    x: Planes, index: Tensor, words: Tensor, of: _Map, weights: Sequence[PackedWeight], layout: Layout, out: Tensor
) -> None:
    """Products of each place by itself; `words`: the first packed weight as int32."""
    count = words.shape[1]
    _places_kernel[lambda picked: (triton.cdiv(of.n, picked["BLOCK_N"]), index.numel())](
        *(x.codes.view(torch.int32), x.scale, x.sums, words, weights[0][1], of.bias(weights[0]), out, index),
        *(of.distances, index.shape[1], len(weights), of.n, count, words.stride(0)),
        *(*of.strides, count // of.groups, layout.lowest, layout.zero_point),
        LANES=lanes_of(layout.bits),
        **of.flags,
    )


def _by_expert(
    x: Planes,
    index: Tensor,
    order: Tensor,
    bounds: Tensor,
    of: _Map,
    weights: Sequence[PackedWeight],
    layout: Layout,
    out: Tensor,
) -> None:
    """Products of all places of an expert together; `order` and `bounds`: see `_sorted`."""
    packed, scale, _ = weights[0]
    rows, experts = order.numel(), len(weights)

    def grid(picked: dict[str, int]) -> tuple[int]:
        # every expert may have one tile that is not full
        tiles = min(rows // picked["BLOCK_M"] + experts, rows)
        return (tiles * triton.cdiv(of.n, picked["BLOCK_N"]),)

    _experts_kernel[grid](
        *(x.codes, x.scale, x.sums, packed, scale, of.bias(weights[0]), out, order, bounds, of.distances),
        *(index.shape[1], experts, of.n, of.width, x.codes.shape[2], *packed.stride(), *of.strides, of.width // of.groups),
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
    check_counts(maps)
    k, per = x.shape[1], CODES_PER_BYTE[layout.bits]
    described = [_map_of(experts, k, layout) for experts in maps]
    index, places = index.contiguous(), index.numel()
    outs = [torch.zeros(places, of.n, dtype=dtype, device=x.device) for of in described]
    if not k or not all(fits_tiles(experts[0][1], k, per) for experts in maps):
        _one_by_one(x, index, maps, layout, rows, outs)
        return outs
    used = [each for each in zip(described, maps, outs, strict=True) if each[2].numel()]
    if not used:
        return outs
    quantized = quantize_planes(x, -(-described[0].width // WORD) * WORD, per, *rows)
    few = places <= _MOST_PLACES and has_dp4a(x)
    words = [found for of, experts, _ in used if (found := _words_of(of, experts)) is not None] if few else []
    with on_device_of(x):
        if len(words) == len(used):
            for (of, experts, out), first in zip(used, words, strict=True):
                _by_place(quantized, index, first, of, experts, layout, out)
            return outs
        order, bounds = _sorted(index, len(maps[0]))
        for of, experts, out in used:
            _by_expert(quantized, index, order, bounds, of, experts, layout, out)
    return outs


def _words_of(of: _Map, experts: Sequence[PackedWeight]) -> Tensor | None:
    """The first packed weight as int32, where all of them can be."""
    return as_words(experts[0][0], of.groups) if of.whole else None


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
