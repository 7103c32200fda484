"""The scale of a layer or table without its codes, for files in which the two stand apart. Own."""

from __future__ import annotations

from torch import Tensor

from ..modules import (
    BitEmbedding,
    NativeLayer,
    PackedBitLinear,
    PackedEmbedding,
    QuantizedEmbedding,
    QuantizedLayer,
    TrainedLayer,
)


def scale_of(layer: QuantizedLayer | QuantizedEmbedding) -> Tensor:
    """float32 scale that `layer.quantized_weight()` has too, bit for bit; made without the codes where that is possible."""
    if isinstance(layer, TrainedLayer):
        learned = layer.weight_scale is not None and not layer.source.idle_scale
        quantizer = layer.quantizer
        return quantizer.usable_scale(layer.weight_scale) if learned else quantizer.compute_scale(layer.matrix)  # type: ignore[arg-type]
    if isinstance(layer, BitEmbedding):
        return layer.quantizer.compute_scale(layer.weight)
    if isinstance(layer, PackedBitLinear | PackedEmbedding) and not isinstance(layer, NativeLayer):
        return layer.weight_scale.detach()
    return layer.quantized_weight().scale
