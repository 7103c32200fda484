"""The forward of a trained layer whose weight carries noise (`noise.py`). Own.

Noise that leaves the weight on the grid keeps the integer step: codes are made from the noisy weight, again in backward, and
nothing more is saved. The other kinds multiply float values, as below full strength.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..noise import WeightNoise
from ..quantizers import Quantized
from .functional import FakeQuantizeActivation, FakeQuantizeWeight, WeightSource
from .relaxed import mixed_weight, relaxed_input

if TYPE_CHECKING:
    from .bit_linear import TrainedLayer


@dataclass(frozen=True)
class NoisySource:
    """`source`, of the noisy weight; the key is the same in forward and backward."""

    source: WeightSource
    noise: WeightNoise
    key: Tensor

    def codes(self, weight: Tensor, scale: Tensor | None) -> Quantized:
        return self.source.codes(self.noise.latent(weight, self.key), scale)

    def gradients(
        self, value_grad: Tensor, weight: Tensor, scale: Tensor | None, temperature: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.source.gradients(value_grad, self.noise.latent(weight, self.key), scale, temperature)


def noisy_forward(layer: TrainedLayer, x: Tensor, noise: WeightNoise) -> Tensor:
    """float (..., in_features), already normed -> (..., out_features)."""
    matrix, key = layer.matrix, layer.noise_key
    scale, temperature = layer.weight_scale, layer.ste_temperature
    if noise.on_grid and not layer.relaxed:
        if torch.compiler.is_compiling():  # a source that holds a tensor is beyond the compiler
            return layer.apply_codes(x, noise.latent(matrix, key), scale, temperature, layer.source)
        return layer.apply_codes(x, matrix, scale, temperature, NoisySource(layer.source, noise, key))
    value = FakeQuantizeWeight.apply(noise.latent(matrix, key), scale, temperature, layer.source).to(matrix.dtype)
    value = noise.value(matrix, value, lambda: _step(layer, matrix), key)
    if layer.activation.quantizes:
        quantized = FakeQuantizeActivation.apply(x, layer.activation, layer.act_scale)
        x = relaxed_input(x, quantized, layer.strength) if layer.relaxed else quantized
    if layer.relaxed:
        value = mixed_weight(matrix, value, scale, layer.strength, layer.source, layer.spec.relaxation)
    return layer.float_linear(x, value)


def _step(layer: TrainedLayer, matrix: Tensor) -> Tensor:
    """Distance of two levels, float32, broadcasts to (N, K)."""
    scale = layer.source.codes(matrix, layer.weight_scale).scale
    return (scale * layer.quantizer.grid.step).repeat_interleave(matrix.shape[-1] // scale.shape[-1], dim=-1)
