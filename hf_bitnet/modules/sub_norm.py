"""An RMS norm in front of a quantized linear (SubLN of BitNet b1.58 2B4T, arXiv 2504.12285; 2505.08823). Blend: own.

A plain insertion destroys a pretrained model. Here the layer starts as the identity (`blend` 0) and its gain is
calibrated, so that moving `blend` to 1 changes the function as little as a norm can.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SubNorm(nn.Module):
    """`y = (1 - blend) x + blend * weight * x / rms(x)`.

    Attributes:
        weight: gain, (features,).
        blend: 0-dim buffer, 0 identity .. 1 plain RMS norm; saved with the model.
    """

    def __init__(
        self,
        features: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features, device=device, dtype=dtype))
        self.blend: Tensor
        self.register_buffer("blend", torch.zeros((), dtype=torch.float32, device=device))

    def normalized(self, x: Tensor) -> Tensor:
        """x / rms(x) over the last dimension, float32."""
        x = x.float()
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, (self.normalized(x) * self.weight).to(x.dtype), self.blend.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
