"""Where the Triton kernels serve, and what all their launches share. Own.

Nothing in this file imports Triton when it is imported itself: `hf_bitnet info` asks it on machines that have none.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from contextlib import AbstractContextManager
from functools import lru_cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

# Triton makes integer products of matrices from this generation on
_SMALLEST_CAPABILITY = (8, 0)
# devices that Triton has a compiler for; ROCm calls itself cuda
_SERVED = ("cuda", "xpu")
# what torch's builds for different devices call it; and the first version that has all that the kernels use
_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows")
_OLDEST = (3, 5)
_INTERPRETABLE = (
    "Triton compiles for GPUs; TRITON_INTERPRET=1 with HF_BITNET_KERNELS=triton interprets the kernels here, slowly, for tests"
)


@lru_cache
def why_unavailable(device: str, interpreted: bool = False) -> str | None:
    """None where the kernels serve tensors on `device` (a device type), else the reason in one line.

    Args:
        interpreted: Triton's interpreter was asked for: the kernels then run anywhere, on the CPU's tensors.
    """
    if device == "cpu" and not interpreted:
        return _INTERPRETABLE
    if device not in (*_SERVED, "cpu"):
        return f"Triton has no compiler for {device}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install triton"
    if (found := _version()) is not None and _numbers(found) < _OLDEST:
        return f"Triton {found} is older than {'.'.join(map(str, _OLDEST))}; install a newer torch, which brings its own"
    if device != "cpu" and not torch.get_device_module(device).is_available():
        return "torch sees no such device here"
    return _why_old_gpu() if device == "cuda" else None


def _version() -> str | None:
    """The version of Triton, None where there is none or it is not known."""
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, (0,) for what has none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else (0,)


def _why_old_gpu() -> str | None:
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability()) < _SMALLEST_CAPABILITY:
        found, needed = (".".join(map(str, each)) for each in (capability, _SMALLEST_CAPABILITY))
        return f"this GPU has compute capability {found}, its integer products need {needed}"
    return None


def describe() -> str:
    """One line: the version of Triton, or that there is none."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = _version() or "of unknown version"
    return f"Triton {version}, compiled and tuned at the first call of a shape, kept in its cache on disk"


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.is_cpu:
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`, and 1 at least."""
    return 1 << max(number - 1, 0).bit_length()


def bucket(rows: int) -> int:
    """What the number of rows counts as where a configuration is chosen, so that another batch length measures nothing anew."""
    return min(power_of_two(rows), 1 << 14)


def as_matrix(x: Tensor) -> Tensor:
    """`x` (..., K) as (R, K): a view where its strides allow one, else a copy. Columns may lie apart."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x.shape[:-1].numel(), x.shape[-1])
