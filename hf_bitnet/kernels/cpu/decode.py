"""What a decoder layer does between its products, through the C++ library (`src/hf_bitnet_decode.h`). Own.

Signatures and roundings of `reference.py`, which serves for what the library has no form for, and in graphs, where the
compiler fuses the plain form.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from .. import reference
from ..graph import is_recording
from .common import FLOATS, check
from .library import functions

_HEADS = struct.Struct("@PP7q")  # hb_heads: x, out, heads, strides of both
_PLAIN = (Tensor, torch.nn.Parameter)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`; the sum of squares is added in another order."""
    k = x.shape[-1]
    plain = type(x) is Tensor and type(weight) in _PLAIN and not is_recording()
    same = x.dtype == weight.dtype and x.dtype in FLOATS and weight.shape == (k,) and weight.is_cpu and weight.is_contiguous()
    if not plain or not same or not x.numel():
        return reference.rms_norm(x, weight, eps)
    x = x.contiguous()
    out = torch.empty_like(x)
    address = out.data_ptr()
    check(functions().hb_rms_norm(x.data_ptr(), FLOATS[x.dtype], x.numel() // k, k, k, weight.data_ptr(), eps, address))
    return out


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.rotate`, bit for bit."""
    if not _is_rotatable(q, k, cos, sin):
        return reference.rotate(q, k, cos, sin)
    outs = torch.empty_like(q), torch.empty_like(k)
    described = b"".join([_heads(x, out) for x, out in zip((q, k), outs, strict=True)])
    batch, _, tokens, d = q.shape
    stride, token_stride, _ = cos.stride()
    angles = cos.data_ptr(), sin.data_ptr(), 0 if cos.shape[0] == 1 else stride, token_stride
    check(functions().hb_rotate(described, 2, FLOATS[q.dtype], batch, tokens, d, *angles))
    return outs


def _is_rotatable(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    computed = not is_recording() and all(type(x) is Tensor and x.is_cpu for x in (q, k, cos, sin))
    if not computed or q.dim() != 4 or k.dim() != 4:
        return False
    batch, _, tokens, d = q.shape
    return (
        q.dtype in FLOATS
        and q.dtype == k.dtype == cos.dtype == sin.dtype
        and k.shape[0] == batch
        and k.shape[2:] == q.shape[2:]
        and cos.shape == sin.shape
        and cos.shape in ((1, tokens, d), (batch, tokens, d))
        and cos.stride() == sin.stride()
        and d % 2 == 0
        and q.numel() > 0
        and q.stride(3) == k.stride(3) == cos.stride(2) == 1
    )


def _heads(x: Tensor, out: Tensor) -> bytes:
    return _HEADS.pack(x.data_ptr(), out.data_ptr(), x.shape[1], *x.stride()[:3], *out.stride()[:3])
