"""Whether a body returned what `reference.py` returns. Own.

Integers are equal, floats near by the ratio of root mean squares: no cosine, and no entries that are allowed to be wrong,
but for operations that round what was summed, where a sum in another order moves a code at a tie by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# of the root mean square: float32 sums against float64 ones, and one rounding to bfloat16
_RATIO = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 5e-4}
# operations on gradients may round their operands, too
_ON_GRADIENTS = ("fixed_matmul",)
_ROUNDED = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# operations that round what was summed: in another order a code at a tie is another code
_TIES = ("norm_quantize_rows",)


def difference(found: Any, expected: Any, operation: str = "") -> str | None:
    """What `found` has wrong, in a few words; None where it is as good as `expected`.

    Args:
        found, expected: a tensor, or a sequence of tensors; both on one device.
        operation: name in the dispatch table; some are compared by rules of their own.
    """
    if isinstance(expected, tuple | list):
        if len(found) != len(expected):
            return f"{len(found)} results, not {len(expected)}"
        parts = (difference(a, b, operation) for a, b in zip(found, expected, strict=True))
        return next((part for part in parts if part), None)
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return f"{found.dtype} {tuple(found.shape)}, not {expected.dtype} {tuple(expected.shape)}"
    if not expected.numel():
        return None
    return _float_difference(found, expected, operation) if expected.is_floating_point() else _wrong(found, expected, operation)


def _wrong(found: Tensor, expected: Tensor, operation: str) -> str | None:
    off = (found.long() - expected.long()).abs()
    allowed = max(1, 1e-3 * off.numel()) if operation in _TIES else 0
    total = int(off.sum())
    return f"{int((off > 0).sum())} of {off.numel()} integers differ, by {int(off.max())} at most" if total > allowed else None


def _float_difference(found: Tensor, expected: Tensor, operation: str) -> str | None:
    error = (found.double() - expected.double()).square().mean().sqrt()
    size = expected.double().square().mean().sqrt()
    limit = (_ROUNDED if operation in _ON_GRADIENTS else _RATIO)[expected.dtype]
    if error <= limit * size:  # false for NaN
        return None
    return f"error {error:.3g} for a root mean square of {size:.3g}, more than {limit:g} of it"


def moved(value: Any, device: torch.device | str) -> Any:
    """Arguments of an operation with all tensors on `device` and their strides kept; also inside sequences.

    Strides are what some of the cases are about, and `Tensor.to` makes expanded and sliced views dense.
    """
    if isinstance(value, Tensor):
        return _moved(value, torch.device(device))
    if type(value) in (list, tuple):
        return type(value)(moved(each, device) for each in value)
    return value


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device == device or not tensor.numel():
        return tensor.to(device)
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    memory = tensor.as_strided((reach,), (1,)).to(device)
    return memory.as_strided(tensor.shape, tensor.stride())
