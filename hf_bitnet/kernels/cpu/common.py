"""Tensors as the C++ library reads them, and its error codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPES = {**FLOATS, torch.int8: 3}
_PLAIN: Any = getattr(Tensor, "__torch_dispatch__", None)
_ERRORS = {1: "an argument makes no sense to them", 2: "this level does not offer it", 3: "out of memory"}


def check(error: int) -> None:
    """Raises RuntimeError for the HB_ERROR_* that a function of the library returned."""
    if error:
        raise RuntimeError(f"the CPU kernels failed: {_ERRORS.get(error, error)}")


def as_float(x: Tensor) -> Tensor:
    """`x` in a floating dtype that the library reads: others become float32, as in the definitions."""
    return x if x.dtype in FLOATS else x.float()


def as_float32(x: Tensor) -> Tensor:
    """`x` as float32 without gaps."""
    return (x if x.dtype == torch.float32 else x.float()).contiguous()


def as_rows(x: Tensor) -> Tensor:
    """`x` as a matrix (R, K) whose rows have no gaps; rows themselves may lie apart."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    return x.contiguous().view(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(x.shape[:-1].numel(), 0)


def require_cpu(*tensors: Tensor | None) -> None:
    """Raises ValueError when a tensor is on another device, or has no memory: the library reads what is at its address."""
    for tensor in tensors:
        if tensor is None:
            continue
        if not tensor.is_cpu:
            raise ValueError(f"all tensors of a CPU kernel have to be on the CPU, one is on {tensor.device}")
        if getattr(type(tensor), "__torch_dispatch__", _PLAIN) is not _PLAIN:  # a DTensor has the address 0
            raise ValueError(
                f"a {type(tensor).__name__} has no memory that a CPU kernel could read; a sharded weight is put together "
                "before its layer is called (model(...), or unshard())"
            )
