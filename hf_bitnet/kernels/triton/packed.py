"""Products with packed weights: the row-vector form that decoding needs, and the matrix form. Own.

A byte holds `per` codes of neighbouring inputs. The activations are quantized into planes (`rows.Planes`), so that the codes
at one place of the bytes are multiplied with neighbours in memory and nothing has to be shuffled:

    sum_k x w = step * sum_i sum_b plane_i[b] * ((byte[b] >> bits * i) & mask) + lowest * sum_k x

At most `_MOST_ROWS` rows: a shift and a mask take one code out of each byte of a 32-bit word, and one instruction (dp4a)
multiplies and adds the four; that leaves time for nothing but reading the weights. More rows, and GPUs of other makers: tiles
of levels for the matrix units.
Many rows: a weight that is unpacked once costs less than one that each tile unpacks anew. Sums of scaled groups are float32 and
added in the order of the tiles that tuning chose: two machines may differ in the last bits, as they do in any float product.
"""

# kernels are another language in Python's clothes: launches take options, and constants are of a type of their own
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportOperatorIssue=false
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fits import check_device, check_matrix, check_weight
from ..reference import CODES_PER_BYTE, Layout, PackedWeight, RowQuantization
from . import products
from .language import EXACT, INTERPRETED, narrowed
from .products import place, scaled, store
from .rows import Planes, quantize_planes, quantize_rows
from .support import bucket, on_device_of, power_of_two
from .tuning import sizes, tuned
from .weights import unpack

# rows of the row-vector form; rows from which the weight is unpacked first
_MOST_ROWS, _MANY_ROWS = 4, 256
WORD = 4


def _rows_config(rows: int, warps: int) -> triton.Config:
    # 128 words a warp: so the inputs and the weights come in one layout, four words a thread, and need no exchange
    return triton.Config({"BLOCK_N": rows, "BLOCK_J": 128 * warps}, num_warps=warps)


ROW_CONFIGS = [_rows_config(rows, warps) for warps in (2, 1, 4, 8) for rows in (4, 8, 2, 16)]
INTERPRETED_ROWS = triton.Config({"BLOCK_N": 8, "BLOCK_J": 16})


@triton.jit
def _multiply_add(levels, x, sums):
    """sums + the four products of the unsigned bytes of `levels` with the signed bytes of `x`, int32."""
    if not INTERPRETED:
        sums = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [levels, x, sums], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for byte in tl.static_range(4):
            sums += ((levels >> (8 * byte)) & 255) * ((x << (24 - 8 * byte)) >> 24)
    return sums


@triton.jit
def row_products(
    x_ptr,
    x_scale_ptr,
    x_sum_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    out_ptr,
    m,
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
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """At most ROWS rows in planes times the words of packed rows; column block `tl.program_id(0)`."""
    row, column = tl.arange(0, ROWS), tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_x, in_w = (row < m)[:, None, None], (column < n)[:, None]
    x_at, w_at = x_ptr + row[:, None, None].to(tl.int64) * words * PER, w_ptr + column[:, None] * w_row
    sums = tl.zeros((ROWS, BLOCK_N, BLOCK_J), dtype=tl.float32 if GROUPED else tl.int32)
    for start in range(0, words, BLOCK_J):
        word = start + tl.arange(0, BLOCK_J)
        exists = word < words
        packed = tl.load(w_at + word[None, :], mask=in_w & exists[None, :], other=0)
        if GROUPED:
            part, x_sum = tl.zeros((ROWS, BLOCK_N, BLOCK_J), dtype=tl.int32), tl.zeros((ROWS, 1, BLOCK_J), dtype=tl.int32)
        for i in tl.static_range(PER):
            x = tl.load(x_at + i * words + word[None, None, :], mask=in_x & exists[None, None, :], other=0)
            levels = ((packed >> (BITS * i)) & LANES)[None, :, :]
            if GROUPED:
                part = _multiply_add(levels, x, part)
                x_sum = _multiply_add(tl.full((1, 1, BLOCK_J), 0x01010101, dtype=tl.int32), x, x_sum)
            else:
                sums = _multiply_add(levels, x, sums)
        if GROUPED:
            scale_at = w_scale_ptr + column[:, None] * w_scale_row + (word // group)[None, :] * w_scale_step
            scale = tl.load(scale_at, mask=in_w & exists[None, :], other=0.0)[None, :, :]
            sums += ((part * STEP + lowest * x_sum).to(tl.float32) - zero * x_sum.to(tl.float32)) * scale
    x_scale = tl.load(x_scale_ptr + row, mask=row < m, other=0.0)
    if GROUPED:
        y = tl.sum(sums, axis=2) * x_scale[:, None]
    else:
        x_sum = tl.load(x_sum_ptr + row, mask=row < m, other=0)[:, None]
        total = (tl.sum(sums, axis=2) * STEP + lowest * x_sum).to(tl.float32) - zero * x_sum.to(tl.float32)
        w_scale = tl.load(w_scale_ptr + column * w_scale_row, mask=column < n, other=0.0)
        y = scaled(total, x_scale, w_scale, ONE_SCALE)
    if BIAS:
        y += tl.load(bias_ptr + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + row[:, None] * n + column[None, :]
    tl.store(out_at, narrowed(y, out_ptr.dtype.element_ty), mask=(row < m)[:, None] & (column < n)[None, :])


@tuned(INTERPRETED_ROWS, ROW_CONFIGS, ("m", "n", "words", "BITS", "GROUPED"))
@triton.jit
def _rows_kernel(
    x_ptr,
    x_scale_ptr,
    x_sum_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    out_ptr,
    m,
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
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    row_products(
        *(x_ptr, x_scale_ptr, x_sum_ptr, w_ptr, w_scale_ptr, bias_ptr, out_ptr, m, n, words),
        *(w_row, w_scale_row, w_scale_step, group, lowest, zero),
        *(STEP, BITS, PER, LANES, GROUPED, ONE_SCALE, BIAS, ROWS, BLOCK_N, BLOCK_J),
    )


TILE_CONFIGS = [
    sizes(16, 64, 128, 4, 4),
    sizes(16, 32, 256, 4, 3),
    sizes(16, 128, 64, 4, 4),
    sizes(32, 64, 128, 4, 4),
    sizes(64, 64, 64, 4, 4),
    sizes(64, 128, 64, 4, 3),
    sizes(128, 128, 64, 8, 3),
]


INTERPRETED_TILES = sizes(16, 32, 32, 4, 1)


@triton.jit
def tile_products(
    x_ptr,
    x_scale_ptr,
    x_sum_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    out_ptr,
    x_row,
    row,
    exists,
    column,
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
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    PER: tl.constexpr,
    GROUPED: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows `x_row` (BLOCK_M,) in planes times packed rows `column` (BLOCK_N,); results go to the rows `row` that exist."""
    depth = tl.arange(0, BLOCK_K).to(tl.int64)
    x_at, w_at = x_ptr + x_row[:, None] * plane * PER, w_ptr + (column % n)[:, None] * w_row
    scale_at = w_scale_ptr + (column % n) * w_scale_row
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, width, group):  # bytes
        sums, x_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32), tl.zeros((BLOCK_M,), dtype=tl.int32)
        for start in range(0, group, BLOCK_K):
            inside = (depth < tl.minimum(group, width - first) - start)[None, :]
            at = (first + start + depth)[None, :]
            packed = tl.load(w_at + at * w_step, mask=inside, other=0)
            for i in tl.static_range(PER):
                x = tl.load(x_at + i * plane + at, mask=inside, other=0)
                sums = tl.dot(x, tl.trans(_levels(packed, i, BITS)), sums, out_dtype=tl.int32)
                if GROUPED:
                    x_sum += tl.sum(x.to(tl.int32), axis=1)
        if not GROUPED:
            x_sum = tl.load(x_sum_ptr + x_row, mask=exists, other=0)
        part = (sums * STEP + (lowest * x_sum)[:, None]).to(tl.float32) - (zero * x_sum.to(tl.float32))[:, None]
        if GROUPED:
            y += part * tl.load(scale_at + first // group * w_scale_step)[None, :]
        else:
            y = part
    x_scale = tl.load(x_scale_ptr + x_row, mask=exists, other=0.0)
    store(y, out_ptr, x_scale, w_scale_ptr, w_scale_row, bias_ptr, row, exists, column, n, BIAS, ONE_SCALE, GROUPED)


@tuned(INTERPRETED_TILES, TILE_CONFIGS, ("bucket", "n", "width", "BITS", "GROUPED"))
@triton.jit
def _tiles_kernel(
    x_ptr,
    x_scale_ptr,
    x_sum_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    out_ptr,
    m,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, column = place(m, n, BLOCK_M, BLOCK_N)
    tile_products(
        *(x_ptr, x_scale_ptr, x_sum_ptr, w_ptr, w_scale_ptr, bias_ptr, out_ptr, row % m, row, row < m, column, n),
        *(width, plane, w_row, w_step, w_scale_row, w_scale_step, group, lowest, zero),
        *(STEP, BITS, PER, GROUPED, ONE_SCALE, BIAS, BLOCK_M, BLOCK_N, BLOCK_K),
    )


@triton.jit
def _levels(packed, i, BITS: tl.constexpr):
    """Level `i` of each byte, as int8; those of 8 bits less 128, for which the caller's lowest code makes up."""
    if BITS == 8:
        return (packed ^ 128).to(tl.int8, bitcast=True)
    return ((packed >> (BITS * i)) & ((1 << BITS) - 1)).to(tl.int8)


def _multiply(x: Planes, weight: PackedWeight, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Quantized rows times a packed weight."""
    packed, scale, bias = weight
    (m, per, plane), (n, width) = x.codes.shape, packed.shape
    out = torch.empty(m, n, dtype=dtype, device=packed.device)
    if not out.numel():
        return out
    groups, step = scale.shape[1], 0 if scale.shape[0] == 1 else scale.stride(0)
    held = out if bias is None else bias.contiguous()
    flags = {"STEP": layout.step, "BITS": layout.bits, "PER": per, "BIAS": bias is not None}
    flags |= {"GROUPED": groups > 1, "ONE_SCALE": scale.numel() == 1, **EXACT}
    with on_device_of(packed):
        if m <= _MOST_ROWS and has_dp4a(packed) and (words := as_words(packed, groups)) is not None:
            count = words.shape[1]
            _rows_kernel[lambda chosen: (triton.cdiv(n, chosen["BLOCK_N"]),)](
                *(x.codes.view(torch.int32), x.scale, x.sums, words, scale, held, out, m, n, count, words.stride(0)),
                *(step, scale.stride(1), count // groups, layout.lowest, layout.zero_point),
                LANES=lanes_of(layout.bits),
                ROWS=power_of_two(m),
                **flags,
            )
            return out
        _tiles_kernel[products.grid(m, n)](
            *(x.codes, x.scale, x.sums, packed, scale, held, out, m, n, width, plane),
            *(*packed.stride(), step, scale.stride(1), width // groups, lowest_level(layout), layout.zero_point, bucket(m)),
            **flags,
        )
    return out


def lanes_of(bits: int) -> int:
    """The mask of one level in each byte of a word, as int32."""
    mask = 0x01010101 * (2**bits - 1)
    return mask - (1 << 32) if mask >> 31 else mask


def lowest_level(layout: Layout) -> int:
    """The lowest code that tiles see: those of 8 bits are read less 128."""
    return layout.lowest + (128 * layout.step if layout.bits == 8 else 0)


def as_words(packed: Tensor, groups: int) -> Tensor | None:
    """Packed (N, B) as int32 (N, B / 4) where rows and groups are made of whole words, else None."""
    width = packed.shape[1]
    if width % (WORD * groups) or packed.stride(1) != 1 or packed.stride(0) % WORD or packed.storage_offset() % WORD:
        return None
    return packed.view(torch.int32)


def has_dp4a(tensor: Tensor) -> bool:
    """Whether the instruction is there, which NVIDIA's assembly names; the interpreter has it spelt out."""
    return INTERPRETED.value or (tensor.is_cuda and torch.version.hip is None)


def fits_tiles(scale: Tensor, k: int, per: int) -> bool:
    """Whether each group of inputs is a run of whole bytes."""
    groups = scale.shape[1]
    return groups == 1 or (k // groups) % per == 0


def packed_int_linear(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    layout: Layout,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.packed_int_linear`: the weight is unpacked by one kernel and multiplied by another."""
    k = x_codes.shape[-1]
    check_weight(packed, scale, bias, k, -(-k // CODES_PER_BYTE[layout.bits]))
    codes = unpack(packed, layout.bits, layout.lowest, layout.step, k)
    return products.int_linear(x_codes, x_scale, x_zero, codes, scale, layout.zero_point, bias, dtype)


def packed_linears(
    x: Tensor, weights: Sequence[PackedWeight], layout: Layout, rows: RowQuantization, dtype: torch.dtype
) -> list[Tensor]:
    """`reference.packed_linears`: x is quantized once."""
    check_matrix(x)
    (m, k), per = x.shape, CODES_PER_BYTE[layout.bits]
    for weight in weights:
        check_weight(*weight, k, -(-k // per))
        check_device(x, *weight)
    if m > _MANY_ROWS or not k or not all(fits_tiles(scale, k, per) for _, scale, _ in weights):
        codes, x_scale = quantize_rows(x, *rows)
        return [packed_int_linear(codes, x_scale, None, *weight, layout, dtype) for weight in weights]
    plane = -(-weights[0][0].shape[1] // WORD) * WORD
    quantized = quantize_planes(x, plane, per, *rows)
    return [_multiply(quantized, weight, layout, dtype) for weight in weights]


def packed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    layout: Layout,
    rows: RowQuantization,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.packed_linear`."""
    return packed_linears(x, [(packed, scale, bias)], layout, rows, dtype)[0]
