"""One quantized activation for the linears that read the same tensor (q/k/v, gate/up). Own.

A one-slot memory per thread: the last tensor quantized, by identity and version, and its codes. The tensor is held
weakly, so the slot never keeps an activation alive and a new tensor at the same address is not mistaken for the old one.
Memory that is written behind torch's back between two calls (`x.data`, a numpy array under the tensor) is not noticed.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from ..quantizers import ActivationScheme, Quantized


class _Slot(threading.local):
    source: weakref.ref[Tensor] | None = None
    key: tuple[object, ...] = ()
    result: Quantized | None = None


_slot = _Slot()


def quantize_shared(x: Tensor, scheme: type[ActivationScheme], scale: Tensor | None) -> Quantized:
    """`scheme.quantize(x, scale)` without gradient, reused while `x` is the very tensor quantized last.

    Args:
        x: float (..., K). scale: 0-dim float32 of a static scheme.

    Returns:
        codes int8 (M, K), scale float32 (M, 1), M the product of the leading sizes.
    """
    if torch.compiler.is_compiling() or x.is_inference() or (scale is not None and scale.is_inference()):
        # the compiler merges equal subgraphs itself; inference tensors carry no version to check
        return _quantize(x, scheme, scale)
    key = (scheme, x._version, None if scale is None else (id(scale), scale._version))
    if _slot.source is None or _slot.source() is not x or _slot.key != key:
        _slot.result, _slot.key, _slot.source = _quantize(x, scheme, scale), key, weakref.ref(x, _forget)
    assert _slot.result is not None
    return _slot.result


def _forget(reference: weakref.ref[Tensor]) -> None:
    if _slot.source is reference:
        _slot.source = _slot.result = None


def _quantize(x: Tensor, scheme: type[ActivationScheme], scale: Tensor | None) -> Quantized:
    with torch.no_grad():
        return scheme.quantize(x.detach().reshape(-1, x.shape[-1]), scale)
