"""Which body serves which operation here, and why the others do not. Own.

Each operation has bodies in order of preference; the first whose `why_unavailable(device)` is None serves. Nothing falls
back in silence: `explain()` prints the table (`hf-bitnet info --kernels`). Two environment variables, for tests and for bug
reports: `HF_BITNET_KERNELS=reference` (or another body's name) forces one body, `HF_BITNET_CPU_LEVEL=avx2` (or another
level's name) the instruction set of the C++ kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import eager, reference
from .cpu import library
from .cpu.decoder import Described
from .cpu.operators import OPERATIONS as CPU
from .decoder import DecoderLayer
from .reference import Layout, PackedWeight, RowQuantization
from .triton import support
from .triton.operators import OPERATIONS as TRITON


@dataclass(frozen=True)
class Body:
    """One implementation of an operation.

    Attributes:
        name: what `HF_BITNET_KERNELS` and `explain()` call it.
        function: same signature as the function of the same operation in `reference.py`.
        why_unavailable: device type -> None when it can serve there, else the reason.
    """

    name: str
    function: Callable[..., Any]
    why_unavailable: Callable[[str], str | None]


# read once: a changed environment would otherwise be looked up in every layer of every token
_FORCED = os.environ.get("HF_BITNET_KERNELS")


def _always(_: str) -> None:
    return None


def _why_no_triton(device: str) -> str | None:
    return support.why_unavailable(device, interpreted=_FORCED == "triton" and os.environ.get("TRITON_INTERPRET") == "1")


def _why_no_onednn(device: str) -> str | None:
    if device != "cpu":
        return f"torch._int_mm has shape limits on {device}; the float32 body serves"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    # without VNNI oneDNN adds pairs in int16 and saturates: wrong sums, so it is refused rather than trusted
    if not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return "the processor has no AVX-512 VNNI, oneDNN's int8 product could saturate"
    return None


def _why_no_blocks(device: str) -> str | None:
    return None if device == "cpu" else f"blocks serve the CPU's caches; on {device} they would only be more launches"


def _compiled(operation: str, *between: Body) -> list[Body]:
    """The C++ body, the Triton body if there is one, what stock torch has to offer, and the definition."""
    triton = [Body("triton", TRITON[operation], _why_no_triton)] if operation in TRITON else []
    return [
        Body("cpu", CPU[operation], library.why_unavailable),
        *triton,
        *between,
        Body("reference", getattr(reference, operation), _always),
    ]


def _products(operation: str, make: Callable[[Callable[..., Tensor]], Callable[..., Any]]) -> list[Body]:
    """The bodies of an operation that is made from an `int_linear`."""
    onednn, float32 = (eager.make_int_linear(product) for product in (eager.int_matmul_onednn, eager.int_matmul_float32))
    return _compiled(operation, Body("onednn", make(onednn), _why_no_onednn), Body("float32", make(float32), _always))


def _blocked(operation: str) -> list[Body]:
    return _compiled(operation, Body("blocked", getattr(eager, operation), _why_no_blocks))


_BODIES: dict[str, list[Body]] = {
    "int_matmul": _compiled(
        "int_matmul",
        Body("onednn", eager.int_matmul_onednn, _why_no_onednn),
        Body("float32", eager.int_matmul_float32, _always),
    ),
    "int_linear": _products("int_linear", lambda int_linear: int_linear),
    "packed_linear": _products("packed_linear", eager.make_packed_linear),
    "packed_linears": _products("packed_linears", eager.make_packed_linears),
    "packed_experts": _compiled("packed_experts"),
    "packed_int_linear": _products("packed_int_linear", eager.make_packed_int_linear),
    "fixed_matmul": _compiled("fixed_matmul", Body("float", eager.fixed_matmul, _always)),
    "quantize_rows": _blocked("quantize_rows"),
    "quantize_columns": _compiled("quantize_columns"),
    "norm_quantize_rows": _blocked("norm_quantize_rows"),
    "mean_magnitudes": _compiled("mean_magnitudes"),
    "quantize_weight": _blocked("quantize_weight"),
    "quantize_sign": _compiled("quantize_sign"),
    "rms_norm": _compiled("rms_norm"),
    "rotate": _compiled("rotate"),
    "quantize_pack": _blocked("quantize_pack"),
    "sign_pack": _blocked("sign_pack"),
    "scale_rows": _blocked("scale_rows"),
    "pack": _compiled("pack"),
    "unpack": _compiled("unpack"),
    "pack_trits": _compiled("pack_trits"),
    "unpack_trits": _compiled("unpack_trits"),
}


_NAMES = sorted({body.name for candidates in _BODIES.values() for body in candidates})
if _FORCED and _FORCED not in _NAMES:
    raise ValueError(f"HF_BITNET_KERNELS={_FORCED!r} names no kernel body; legal: {', '.join(_NAMES)}, or leave it unset")
_LEVEL = os.environ.get("HF_BITNET_CPU_LEVEL")
if _LEVEL and library.why_unavailable() is None:
    library.choose_level(_LEVEL)


def bodies(operation: str) -> tuple[Body, ...]:
    """All bodies of an operation, preferred first."""
    return tuple(_BODIES[operation])


def _select(operation: str, device: str) -> Callable[..., Any]:
    candidates = _BODIES[operation]
    if any(body.name == _FORCED for body in candidates):
        candidates = [body for body in candidates if body.name == _FORCED]
    reasons = []
    for body in candidates:
        reason = body.why_unavailable(device)
        if reason is None:
            return body.function
        reasons.append(f"{body.name}: {reason}")
    raise RuntimeError(f"no kernel body serves {operation} on {device}: {'; '.join(reasons)}")


# a plain dict, filled for the CPU at import: a lookup costs nothing per layer and torch.compile traces it
_CHOSEN = {(operation, "cpu"): _select(operation, "cpu") for operation in _BODIES}


def _body(operation: str, tensor: Tensor) -> Callable[..., Any]:
    key = (operation, "cpu" if tensor.is_cpu else tensor.device.type)  # asking for the device costs as much as a small copy
    return _CHOSEN.get(key) or _CHOSEN.setdefault(key, _select(*key))


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """int8 (M, K) x int8 (N, K) -> exact int32 (M, N)."""
    return _body("int_matmul", a)(a, b)


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
    """int8 (M, K) x int8 (N, K), scales, zero points, bias (N,) -> (M, N) in `dtype`; see `reference.int_linear`."""
    return _body("int_linear", x_codes)(x_codes, x_scale, x_zero, w_codes, w_scale, w_zero, bias, dtype)


def packed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    layout: Layout,
    rows: RowQuantization,
    dtype: torch.dtype,
) -> Tensor:
    """float (M, K), quantized per row, x packed uint8 (N, B) -> (M, N) in `dtype`; see `reference.packed_linear`."""
    return _body("packed_linear", x)(x, packed, scale, bias, layout, rows, dtype)


def packed_linears(
    x: Tensor, weights: Sequence[PackedWeight], layout: Layout, rows: RowQuantization, dtype: torch.dtype
) -> list[Tensor]:
    """`packed_linear` of several weights (packed, scale, bias) that read the same x -> list of (M, N_i) in `dtype`."""
    return _body("packed_linears", x)(x, weights, layout, rows, dtype)


def packed_experts(
    x: Tensor,
    index: Tensor,
    maps: Sequence[Sequence[PackedWeight]],
    layout: Layout,
    rows: RowQuantization,
    dtype: torch.dtype,
) -> list[Tensor]:
    """float (T, K), int64 (T, k), for each map E packed weights -> (T * k, N_i) each; see `reference.packed_experts`."""
    return _body("packed_experts", x)(x, index, maps, layout, rows, dtype)


def serves_experts(tensor: Tensor) -> bool:
    """Whether a kernel takes all experts at once where `tensor` is: the definition takes one after another, slowly."""
    return _body("packed_experts", tensor) is not reference.packed_experts


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
    """int8 (M, K) x packed uint8 (N, B) -> (M, N) in `dtype`; see `reference.packed_int_linear`."""
    return _body("packed_int_linear", x_codes)(x_codes, x_scale, x_zero, packed, scale, bias, layout, dtype)


def fixed_matmul(
    a: Tensor, a_scale: Tensor | None, codes: Tensor, zero_point: float, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """float (M, K), scaled by a_scale (K), x int8 (K, N) -> (M, N) in `dtype`; see `reference.fixed_matmul`."""
    return _body("fixed_matmul", a)(a, a_scale, codes, zero_point, scale, dtype)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype a linear layer's output has for input `x`: the autocast dtype where autocast is on, else x's own."""
    device = x.device.type
    # autocast leaves float64 alone, and knows no meta device
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def quantize_rows(x: Tensor, qmin: int, qmax: int, eps: float) -> tuple[Tensor, Tensor]:
    """float (..., K) -> int8 codes (..., K), float32 scale (..., 1)."""
    return _body("quantize_rows", x)(x, qmin, qmax, eps)


def quantize_columns(x: Tensor, factor: Tensor | None, qmin: int, qmax: int, eps: float) -> tuple[Tensor, Tensor]:
    """float (M, N), row factors float32 (M, 1) or None -> int8 codes (N, M), float32 scale (N, 1)."""
    return _body("quantize_columns", x)(x, factor, qmin, qmax, eps)


def norm_quantize_rows(
    x: Tensor, norm_weight: Tensor, norm_eps: float, qmin: int, qmax: int, eps: float
) -> tuple[Tensor, Tensor]:
    """float (..., K), RMS-normed with gain (K,) -> int8 codes (..., K), float32 scale (..., 1)."""
    return _body("norm_quantize_rows", x)(x, norm_weight, norm_eps, qmin, qmax, eps)


def mean_magnitudes(rows: Tensor) -> Tensor:
    """float (R, n) -> mean|row|, float32 (R, 1)."""
    return _body("mean_magnitudes", rows)(rows)


def quantize_weight(
    rows: Tensor, scale: Tensor, zero_point: float, qmin: int, qmax: int, dtype: torch.dtype = torch.int8
) -> Tensor:
    """float (R, n), float32 scale (R, 1) -> codes (R, n) in `dtype`."""
    return _body("quantize_weight", rows)(rows, scale, zero_point, qmin, qmax, dtype)


def quantize_sign(rows: Tensor, threshold: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """float (R, n), float32 threshold that broadcasts -> codes -1, +1 (R, n) in `dtype`."""
    return _body("quantize_sign", rows)(rows, threshold, dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float (..., K), gain (K,) of the same dtype -> (..., K): an RMS norm with the roundings of `reference.rms_norm`."""
    return _body("rms_norm", x)(x, weight, eps)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """float (B, H, T, D), (B, H', T, D), cos and sin (B or 1, T, D) -> q and k with their rotary embedding."""
    return _body("rotate", q)(q, k, cos, sin)


def quantize_pack(weight: Tensor, scale: Tensor, qmin: int, qmax: int, layout: Layout) -> Tensor:
    """float (N, K), float32 scale (1, 1), (N, 1) or (N, G) -> packed uint8 (N, ceil(K * bits / 8))."""
    return _body("quantize_pack", weight)(weight, scale, qmin, qmax, layout)


def sign_pack(weight: Tensor, threshold: Tensor) -> Tensor:
    """float (N, K), float32 threshold (1, 1), (N, 1) or (N, G) -> packed uint8 (N, ceil(K / 8)), bit 1 for +1."""
    return _body("sign_pack", weight)(weight, threshold)


def scale_rows(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 or float (M, K) times float32 (M, 1), rounded once to `dtype`."""
    return _body("scale_rows", x)(x, scale, dtype)


def pack(codes: Tensor, bits: int, lowest: int, step: int) -> Tensor:
    """int8 codes (N, K) -> uint8 (N, ceil(K * bits / 8))."""
    return _body("pack", codes)(codes, bits, lowest, step)


def unpack(packed: Tensor, bits: int, lowest: int, step: int, in_features: int) -> Tensor:
    """uint8 (N, ceil(K * bits / 8)) -> int8 codes (N, in_features)."""
    return _body("unpack", packed)(packed, bits, lowest, step, in_features)


def pack_trits(codes: Tensor) -> Tensor:
    """Ternary int8 codes (N, K) -> uint8 (N, ceil(K / 5))."""
    return _body("pack_trits", codes)(codes)


def unpack_trits(packed: Tensor, in_features: int) -> Tensor:
    """uint8 (N, ceil(K / 5)) -> ternary int8 codes (N, in_features)."""
    return _body("unpack_trits", packed)(packed, in_features)


def describe_layer(layer: DecoderLayer) -> Described | None:
    """A decoder layer for decoding in one call on the CPU; None where there are no C++ kernels or another body is forced.

    Raises:
        ValueError: the parts of the layer do not belong together.
    """
    if _FORCED not in (None, "cpu") or library.why_unavailable() is not None:
        return None
    return Described(layer)


def explain(device: str = "cpu") -> str:
    """A table: operation, the body that serves on `device`, why the others do not; then what is compiled for the device."""
    lines = [f"{'operation':<18} {'body':<10} others"]
    for operation, candidates in _BODIES.items():
        forced = _select(operation, device)
        serving = next(body.name for body in candidates if body.function is forced)
        reasons = [(body.name, body.why_unavailable(device) or "slower") for body in candidates if body.name != serving]
        others = "; ".join(f"{name}: {reason}" for name, reason in reasons)
        lines.append(f"{operation:<18} {serving:<10} {others or '-'}")
    if device == "cpu":
        return "\n".join([*lines, f"CPU kernels: {library.describe()}"])
    reason = _why_no_triton(device)
    return "\n".join([*lines, f"GPU kernels: {f'none serve: {reason}' if reason else support.describe()}"])
