"""Soft to hard: what a layer uses while the quantization strength is below 1.

A relaxation maps (weight, its quantized value, strength) to the weight used. Contract: exactly the weight at strength 0,
exactly the quantized value at strength 1, differentiable in both tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .registry import Registry

Relaxation = Callable[[Tensor, Tensor, Tensor], Tensor]
RELAXATIONS: Registry[Relaxation] = Registry("relaxation")


@RELAXATIONS.register("linear")
def linear(value: Tensor, quantized: Tensor, strength: Tensor) -> Tensor:
    """The straight mix of the warm-up recipe for 1.58-bit fine-tuning (Hugging Face blog, 2024).

    `torch.lerp` is exact at both ends; `value + strength * (quantized - value)` is not.
    """
    return torch.lerp(value, quantized, strength.to(value.dtype))
