"""The one object that travels through the library. Own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels


class Quantized(NamedTuple):
    """Integer codes and what turns them back into values: `value = (codes - zero_point) * scale`.

    The scale always multiplies. Trainer, packer, exporter and report all read this object, made by one function.

    Attributes:
        codes: int8 (N, K) for weights, (..., K) for activations.
        scale: float32. Weights: (1, 1) one for the tensor, (N, 1) one a channel, (N, G) one for each run of K / G
            inputs. Activations: (..., 1).
        zero_point: a number (weights) or float32 (..., 1) (asymmetric activations).
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | float = 0.0

    def levels(self, dtype: torch.dtype) -> Tensor:
        """`codes - zero_point` in `dtype`, same shape as the codes. Exact in float32, bfloat16 and float16."""
        levels = self.codes.to(dtype)
        if isinstance(self.zero_point, Tensor) or self.zero_point != 0.0:
            levels = levels - (self.zero_point.to(dtype) if isinstance(self.zero_point, Tensor) else self.zero_point)
        return levels

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, computed in float32 and rounded once to `dtype`; same shape as the codes."""
        groups = self.scale.shape[-1]
        if groups == 1 and self._is_of_plain_rows():
            return kernels.scale_rows(self.codes, self.scale.expand(self.codes.shape[0], 1), dtype)
        levels = self.levels(torch.float32)
        if groups > 1:
            levels = levels.unflatten(-1, (groups, -1))
            return (levels * self.scale.unsqueeze(-1)).flatten(-2).to(dtype)
        return (levels * self.scale).to(dtype)

    def _is_of_plain_rows(self) -> bool:
        """Whether the values are codes times scales of rows, and nobody asks for their gradient."""
        codes, scale, zero = self
        if type(codes) is not Tensor or codes.dim() != 2 or scale.dim() != 2 or isinstance(zero, Tensor):
            return False
        return zero == 0.0 and not (torch.is_grad_enabled() and (codes.requires_grad or scale.requires_grad))
