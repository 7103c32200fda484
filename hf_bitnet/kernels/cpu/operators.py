"""The C++ bodies as operators `torch.ops.hf_bitnet.*`, for graphs; and the functions that the dispatch table lists. Own.

Eager calls go straight to the library: an operator's way through the dispatcher would cost more than a decoded row's product.
Under torch.compile and torch.export, and for tensors that only pretend (FakeTensor and other subclasses), the same functions
go through operators, which have a fake implementation and are one node of the graph. Elementwise steps that a compiler fuses
with their neighbours stay plain torch there, as they were.

Leaves out: gradients. These operators serve below the straight-through estimators, which have their own backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import Layout, PackedWeight, RowQuantization
from . import bodies, fixed, products
from .common import is_recording

_NAMESPACE = "hf_bitnet"
_LIBRARY = torch.library.Library(_NAMESPACE, "DEF")
_LAYOUT = "int bits, int lowest, int step, float zero_point"
_ROWS = "int qmin, int qmax, float eps"


def _operator(schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Registers an operator with its CPU body and its fake; returns the overload, which graphs call."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, body, "CPU")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


def _traced(tensor: Tensor) -> bool:
    """Whether calls are being recorded or transformed rather than computed: those must go through torch's dispatcher."""
    return is_recording() or not (type(tensor) is Tensor or type(tensor) is torch.nn.Parameter)


def _bytes(k: Any, bits: int) -> Any:
    return (k * bits + 7) // 8


# ---- products ----

_int_matmul = _operator(
    "int_matmul(Tensor a, Tensor b) -> Tensor",
    products.int_matmul,
    lambda a, b: a.new_empty(a.shape[0], b.shape[0], dtype=torch.int32),
)


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`reference.int_matmul`."""
    return _int_matmul(a, b) if _traced(a) else products.int_matmul(a, b)


def _fake_int_linear(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero: Any,
    w_codes: Tensor,
    w_scale: Tensor,
    w_zero: float,
    bias: Any,
    dtype: torch.dtype,
) -> Tensor:
    return x_codes.new_empty(x_codes.shape[0], w_codes.shape[0], dtype=dtype)


_int_linear = _operator(
    "int_linear(Tensor x_codes, Tensor x_scale, Tensor? x_zero, Tensor w_codes, Tensor w_scale, float w_zero, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
    products.int_linear,
    _fake_int_linear,
)


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
    call = _int_linear if _traced(x_codes) else products.int_linear
    return call(x_codes, x_scale, x_zero, w_codes, w_scale, w_zero, bias, dtype)


_packed_linears = _operator(
    f"packed_linears(Tensor x, Tensor[] packed, Tensor[] scale, Tensor?[] bias, {_LAYOUT}, {_ROWS}, ScalarType dtype)"
    " -> Tensor[]",
    lambda x, packed, scale, bias, bits, lowest, step, zero_point, qmin, qmax, eps, dtype: products.packed_linears(
        x,
        list(zip(packed, scale, bias, strict=True)),
        Layout(bits, lowest, step, zero_point),
        RowQuantization(qmin, qmax, eps),
        dtype,
    ),
    lambda x, packed, scale, bias, bits, lowest, step, zero_point, qmin, qmax, eps, dtype: [
        x.new_empty(x.shape[0], weight.shape[0], dtype=dtype) for weight in packed
    ],
)


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
    if torch._C._get_tracing_state() is not None:  # TorchScript knows no lists of optional tensors
        return reference.packed_linear(x, packed, scale, bias, layout, rows, dtype)
    if _traced(x):
        return _packed_linears(x, [packed], [scale], [bias], *layout, *rows, dtype)[0]
    return products.packed_linear(x, packed, scale, bias, layout, rows, dtype)


def packed_linears(
    x: Tensor, weights: Sequence[PackedWeight], layout: Layout, rows: RowQuantization, dtype: torch.dtype
) -> list[Tensor]:
    """`reference.packed_linears`."""
    if torch._C._get_tracing_state() is not None:
        return reference.packed_linears(x, weights, layout, rows, dtype)
    if not _traced(x):
        return products.packed_linears(x, weights, layout, rows, dtype)
    packed, scale, bias = ([weight[i] for weight in weights] for i in range(3))
    return list(_packed_linears(x, packed, scale, bias, *layout, *rows, dtype))


_packed_int_linear = _operator(
    "packed_int_linear(Tensor x_codes, Tensor x_scale, Tensor? x_zero, Tensor packed, Tensor scale, Tensor? bias, "
    f"{_LAYOUT}, ScalarType dtype) -> Tensor",
    lambda x_codes, x_scale, x_zero, packed, scale, bias, bits, lowest, step, zero_point, dtype: products.packed_int_linear(
        x_codes, x_scale, x_zero, packed, scale, bias, Layout(bits, lowest, step, zero_point), dtype
    ),
    lambda x_codes, x_scale, x_zero, packed, scale, bias, bits, lowest, step, zero_point, dtype: x_codes.new_empty(
        x_codes.shape[0], packed.shape[0], dtype=dtype
    ),
)


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
    if _traced(x_codes):
        return _packed_int_linear(x_codes, x_scale, x_zero, packed, scale, bias, *layout, dtype)
    return products.packed_int_linear(x_codes, x_scale, x_zero, packed, scale, bias, layout, dtype)


_fixed_matmul = _operator(
    "fixed_matmul(Tensor a, Tensor? a_scale, Tensor codes, float zero_point, Tensor? scale, ScalarType dtype) -> Tensor",
    fixed.fixed_matmul,
    lambda a, a_scale, codes, zero_point, scale, dtype: a.new_empty(a.shape[0], codes.shape[1], dtype=dtype),
)


def fixed_matmul(
    a: Tensor, a_scale: Tensor | None, codes: Tensor, zero_point: float, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`reference.fixed_matmul`."""
    return (_fixed_matmul if _traced(a) else fixed.fixed_matmul)(a, a_scale, codes, zero_point, scale, dtype)


# ---- rows ----

_norm_quantize_rows = _operator(
    "norm_quantize_rows(Tensor x, Tensor norm_weight, float norm_eps, int qmin, int qmax, float eps) -> (Tensor, Tensor)",
    bodies.norm_quantize_rows,
    lambda x, norm_weight, norm_eps, qmin, qmax, eps: (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(*x.shape[:-1], 1, dtype=torch.float32),
    ),
)


def norm_quantize_rows(
    x: Tensor, norm_weight: Tensor, norm_eps: float, qmin: int, qmax: int, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.norm_quantize_rows`."""
    call = _norm_quantize_rows if _traced(x) else bodies.norm_quantize_rows
    return call(x, norm_weight, norm_eps, qmin, qmax, eps)


def quantize_rows(x: Tensor, qmin: int, qmax: int, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rows`."""
    return (reference if _traced(x) else bodies).quantize_rows(x, qmin, qmax, eps)


def quantize_weight(
    rows: Tensor, scale: Tensor, zero_point: float, qmin: int, qmax: int, dtype: torch.dtype = torch.int8
) -> Tensor:
    """`reference.quantize_weight`."""
    return (reference if _traced(rows) else bodies).quantize_weight(rows, scale, zero_point, qmin, qmax, dtype)


def quantize_sign(rows: Tensor, threshold: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """`reference.quantize_sign`."""
    return (reference if _traced(rows) else bodies).quantize_sign(rows, threshold, dtype)


def mean_magnitudes(rows: Tensor) -> Tensor:
    """`reference.mean_magnitudes`."""
    return (reference if _traced(rows) else bodies).mean_magnitudes(rows)


def scale_rows(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.scale_rows`."""
    return (reference if _traced(x) else bodies).scale_rows(x, scale, dtype)


# ---- bytes ----

_quantize_pack = _operator(
    f"quantize_pack(Tensor weight, Tensor scale, int qmin, int qmax, {_LAYOUT}) -> Tensor",
    lambda weight, scale, qmin, qmax, bits, lowest, step, zero_point: bodies.quantize_pack(
        weight, scale, qmin, qmax, Layout(bits, lowest, step, zero_point)
    ),
    lambda weight, scale, qmin, qmax, bits, lowest, step, zero_point: weight.new_empty(
        weight.shape[0], _bytes(weight.shape[1], bits), dtype=torch.uint8
    ),
)
_sign_pack = _operator(
    "sign_pack(Tensor weight, Tensor threshold) -> Tensor",
    bodies.sign_pack,
    lambda weight, threshold: weight.new_empty(weight.shape[0], _bytes(weight.shape[1], 1), dtype=torch.uint8),
)
_pack = _operator(
    "pack(Tensor codes, int bits, int lowest, int step) -> Tensor",
    bodies.pack,
    lambda codes, bits, lowest, step: codes.new_empty(*codes.shape[:-1], _bytes(codes.shape[-1], bits), dtype=torch.uint8),
)
_unpack = _operator(
    "unpack(Tensor packed, int bits, int lowest, int step, SymInt in_features) -> Tensor",
    bodies.unpack,
    lambda packed, bits, lowest, step, in_features: packed.new_empty(*packed.shape[:-1], in_features, dtype=torch.int8),
)
_pack_trits = _operator(
    "pack_trits(Tensor codes) -> Tensor",
    bodies.pack_trits,
    lambda codes: codes.new_empty(*codes.shape[:-1], (codes.shape[-1] + 4) // 5, dtype=torch.uint8),
)
_unpack_trits = _operator(
    "unpack_trits(Tensor packed, SymInt in_features) -> Tensor",
    bodies.unpack_trits,
    lambda packed, in_features: packed.new_empty(*packed.shape[:-1], in_features, dtype=torch.int8),
)


def quantize_pack(weight: Tensor, scale: Tensor, qmin: int, qmax: int, layout: Layout) -> Tensor:
    """`reference.quantize_pack`."""
    if _traced(weight):
        return _quantize_pack(weight, scale, qmin, qmax, *layout)
    return bodies.quantize_pack(weight, scale, qmin, qmax, layout)


def sign_pack(weight: Tensor, threshold: Tensor) -> Tensor:
    """`reference.sign_pack`."""
    return _sign_pack(weight, threshold) if _traced(weight) else bodies.sign_pack(weight, threshold)


def pack(codes: Tensor, bits: int, lowest: int, step: int) -> Tensor:
    """`reference.pack`."""
    return (_pack if _traced(codes) else bodies.pack)(codes, bits, lowest, step)


def unpack(packed: Tensor, bits: int, lowest: int, step: int, in_features: int) -> Tensor:
    """`reference.unpack`."""
    return (_unpack if _traced(packed) else bodies.unpack)(packed, bits, lowest, step, in_features)


def pack_trits(codes: Tensor) -> Tensor:
    """`reference.pack_trits`."""
    return (_pack_trits if _traced(codes) else bodies.pack_trits)(codes)


def unpack_trits(packed: Tensor, in_features: int) -> Tensor:
    """`reference.unpack_trits`."""
    return (_unpack_trits if _traced(packed) else bodies.unpack_trits)(packed, in_features)
