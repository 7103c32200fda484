"""Integer products through the C++ library, with the signatures of `reference.py`; eager tensors on the CPU. Own.

One call takes one block of memory: the input, the sizes, how weights are stored, and each weight with the address of its
output (`hb_linear_block` in src/linear_call.cpp). Decoding calls the same weights with one row again and again, and Python's
part of that must not cost more than the product: the block of such a call is kept, with holes for the addresses that change.
It is found by the identity of the packed tensor, dies with it, and serves only while every tensor of the weight is the same
object with the same address and size; the numbers themselves are read at every call.

Leaves out: `bodies.py` has what is not a product, `operators.py` tracing by torch.compile and torch.export; gradients.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..fits import check_codes, check_input, check_matrix, check_weight
from ..kept import KeptFor
from ..reference import CODES_PER_BYTE, Layout, PackedWeight, RowQuantization
from .common import DTYPES, FLOATS, as_float, as_float32, as_rows, check, require_cpu
from .library import functions

# parts of the block, in the layout of src/hf_bitnet_cpu.h
INPUT = struct.Struct("@qPPPiiffff")  # after x: stride, scale, zero, norm weight, dtype, its dtype, norm eps, qmin, qmax, eps
_SIZES = struct.Struct("@qqqi")  # m, k, count, out dtype
GRID = struct.Struct("@iiiif")  # bits, packed, lowest, step, zero point
_WEIGHT = struct.Struct("@PqqPqqPq")  # weight, n, stride, scale, its rows, its groups, bias, its dtype; then RESULT
RESULT = struct.Struct("@Pq")  # address and stride of what a weight's products are written to
NO_RESULT = RESULT.pack(0, 0)

# one look-up less in a large dictionary, see `graph.py`; named, because tensors may be made elsewhere by default
_empty, _CPU = torch.empty, torch.device("cpu")


class _Grid(NamedTuple):
    """`hb_grid`. `packed` is False for int8 codes, which have 8 bits and no layout."""

    bits: int
    packed: bool
    lowest: int
    step: int
    zero_point: float


class _Block:
    """The arguments of one call but for the addresses of x and of the outputs.

    Attributes:
        widths: the output features of each weight.
        spec: shape and dtype of x and the settings it was made for; None if it is for one call only.
        made_of: per weight what `traits_of` found, for the test whether the block still describes it.
    """

    __slots__ = ("computed", "dtype", "function", "holes", "made_of", "parts", "rows", "spec", "widths")

    spec: tuple[Any, ...] | None
    made_of: list[tuple[Any, ...]]

    def __init__(self, given: bytes, m: int, k: int, grid: _Grid, weights: Sequence[PackedWeight], dtype: torch.dtype) -> None:
        self.rows, self.dtype = m, dtype
        self.computed = dtype if dtype in FLOATS else torch.float32  # the library does not know float64
        self.widths = [weight[0].shape[0] for weight in weights]
        parts = [describe(weight) for weight in weights]
        parts[0] = given + _SIZES.pack(m, k, len(weights), FLOATS[self.computed]) + GRID.pack(*grid) + parts[0]
        # an output's stride is its width
        self.parts = parts[:1] + [struct.pack("@q", n) + part for n, part in zip(self.widths, parts[1:], strict=False)]
        self.holes = struct.Struct("@P" + "".join(f"{len(part)}sP" for part in self.parts) + "q")
        self.function = functions().hb_linear_call
        self.spec, self.made_of = None, []

    def one(self, x: Tensor) -> Tensor:
        """`all` of a single weight."""
        (n,) = self.widths
        out = _empty(self.rows, n, dtype=self.computed, device=_CPU)
        error = self.function(self.holes.pack(x.data_ptr(), self.parts[0], out.data_ptr(), n))
        if error:
            check(error)
        return out if self.computed is self.dtype else out.to(self.dtype)

    def all(self, x: Tensor) -> list[Tensor]:
        """One (m, n) for each weight."""
        outs = [_empty(self.rows, n, dtype=self.computed, device=_CPU) for n in self.widths]
        filled: list[bytes | int] = [x.data_ptr()]
        for part, out in zip(self.parts, outs, strict=True):
            filled += (part, out.data_ptr())
        check(self.function(self.holes.pack(*filled, self.widths[-1])))
        return outs if self.computed is self.dtype else [out.to(self.dtype) for out in outs]


def describe(weight: PackedWeight) -> bytes:
    """The first part of `hb_weight`; RESULT has the rest. The tensors have to be `usable_weight`s."""
    codes, scale, bias = weight
    address, dtype = (0, 0) if bias is None else (bias.data_ptr(), FLOATS[bias.dtype])
    return _WEIGHT.pack(codes.data_ptr(), codes.shape[0], codes.stride(0), scale.data_ptr(), *scale.shape, address, dtype)


def usable_weight(weight: PackedWeight, k: int, width: int) -> PackedWeight:
    """The same numbers in a form that the library reads. Raises ValueError when they do not belong together."""
    codes, scale, bias = weight
    require_cpu(*weight)
    check_weight(codes, scale, bias, k, width)
    return as_rows(codes), as_float32(scale), None if bias is None else as_float(bias).contiguous()


def packed_grid(layout: Layout, k: int) -> tuple[_Grid, int]:
    """The library's `hb_grid`, and the bytes of a row of k codes."""
    if layout.bits not in CODES_PER_BYTE:
        raise ValueError(f"a packed weight has 1, 2, 4 or 8 bits, not {layout.bits}")
    return _Grid(layout.bits, True, layout.lowest, layout.step, layout.zero_point), -(-k * layout.bits // 8)


# ---- float rows: quantized inside the call ----

# blocks of calls with one row, for their first packed tensor
_KEPT: KeptFor[_Block] = KeptFor()


def traits_of(codes: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    """What must not have changed for a kept block to describe this weight."""
    if bias is None:
        return codes.data_ptr(), codes.shape, codes.stride(), scale.data_ptr(), scale.shape
    of_bias = bias.data_ptr(), bias.shape, bias.dtype
    return codes.data_ptr(), codes.shape, codes.stride(), scale.data_ptr(), scale.shape, of_bias


def _make(x: Tensor, weights: Sequence[PackedWeight], spec: tuple[Any, ...]) -> tuple[_Block, Tensor, Sequence[PackedWeight]]:
    """The block of this call, and the tensors that have to live until it was made."""
    _, _, layout, rows, dtype = spec
    check_matrix(x)
    k = x.shape[1]
    grid, width = packed_grid(layout, k)
    read = as_rows(as_float(x))
    usable = [usable_weight(weight, k, width) for weight in weights]
    given = INPUT.pack(read.stride(0), 0, 0, 0, FLOATS[read.dtype], 0, 0.0, *rows)
    block = _Block(given, read.shape[0], k, grid, usable, dtype)
    same = read is x and all(
        a is b for found, used in zip(weights, usable, strict=True) for a, b in zip(found, used, strict=True)
    )
    if x.shape[0] == 1 and x.is_contiguous() and same:
        _keep(block, weights, spec)
    return block, read, usable


def _keep(block: _Block, weights: Sequence[PackedWeight], spec: tuple[Any, ...]) -> None:
    block.spec = spec
    block.made_of = [traits_of(*weight) for weight in weights]
    _KEPT.put(weights[0][0], block)


def _kept(x: Tensor, weights: Sequence[PackedWeight], spec: tuple[Any, ...]) -> _Block | None:
    """The block that was kept for this very call, if nothing has changed since."""
    block = _KEPT.get(weights[0][0])
    if block is None or block.spec != spec or not x.is_contiguous():
        return None
    # the number of weights counts: a block of q, k and v is kept under q
    return block if block.made_of == [traits_of(*weight) for weight in weights] else None


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
    spec = x.shape, x.dtype, layout, rows, dtype
    block = _KEPT.get(packed)  # `_kept` of one weight
    if block is not None and block.spec == spec and x.is_contiguous() and block.made_of == [traits_of(packed, scale, bias)]:
        return block.one(x)
    if x.shape[-1] == 0:
        return reference.packed_linear(x, packed, scale, bias, layout, rows, dtype)
    block, read, _alive = _make(x, ((packed, scale, bias),), spec)
    return block.one(read)


def packed_linears(
    x: Tensor, weights: Sequence[PackedWeight], layout: Layout, rows: RowQuantization, dtype: torch.dtype
) -> list[Tensor]:
    """`reference.packed_linears`."""
    if not weights:
        return []
    spec = (x.shape, x.dtype, layout, rows, dtype)
    block = _kept(x, weights, spec)
    if block is not None:
        return block.all(x)
    if x.shape[-1] == 0:
        return reference.packed_linears(x, weights, layout, rows, dtype)
    alike = [list(run) for _, run in groupby(weights, _groups_of)]
    if len(alike) > 1:  # a call of the library has one size of groups; each quantizes x
        return [y for run in alike for y in packed_linears(x, run, layout, rows, dtype)]
    block, read, _alive = _make(x, weights, spec)
    return block.all(read)


def _groups_of(weight: PackedWeight) -> torch.Size:
    return weight[1].shape[1:]


# ---- codes ----


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`reference.int_matmul`."""
    check_codes(a, b)
    require_cpu(a, b)
    a, b = as_rows(a), as_rows(b)
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty(m, n, dtype=torch.int32, device="cpu")
    check(functions().hb_int_matmul(a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), m, n, k, out.data_ptr()))
    return out


def _of_codes(
    x_codes: Tensor, x_scale: Tensor, x_zero: Tensor | None, grid: _Grid, weight: PackedWeight, width: int, dtype: torch.dtype
) -> Tensor:
    require_cpu(x_codes, x_scale, x_zero)
    check_input(x_codes, x_scale, x_zero)
    m, k = x_codes.shape
    x, scale = as_rows(x_codes), as_float32(x_scale)
    zero = None if x_zero is None else as_float32(x_zero)
    usable = usable_weight(weight, k, width)
    addresses = scale.data_ptr(), 0 if zero is None else zero.data_ptr()
    given = INPUT.pack(x.stride(0), *addresses, 0, DTYPES[torch.int8], 0, 0.0, 0.0, 0.0, 0.0)
    return _Block(given, m, k, grid, [usable], dtype).one(x)


def int_linear(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    w_codes: Tensor,
    w_scale: Tensor,
    w_zero: float,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.int_linear`."""
    if w_codes.dtype != torch.int8:
        raise ValueError(f"the weight of an integer product is int8 (N, K), not {w_codes.dtype}")
    grid, k = _Grid(8, False, 0, 1, w_zero), x_codes.shape[-1]
    return _of_codes(x_codes, x_scale, x_zero, grid, (w_codes, w_scale, bias), k, dtype)


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
    """`reference.packed_int_linear`."""
    grid, width = packed_grid(layout, x_codes.shape[-1])
    return _of_codes(x_codes, x_scale, x_zero, grid, (packed, scale, bias), width, dtype)
