"""PackedBitLinear: the layer that serves. 1, 2, 4 or 8 bits a weight in a frozen uint8 parameter. Own.

A subclass of nn.Linear so that peft and transformers find it; the packed weight is a Parameter, not a buffer, because
buffers are re-broadcast by DDP and not sharded by FSDP2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..quantizers import ActivationScheme, Grid, Quantized, WeightQuantizer
from .base import QuantizedLayer
from .bit_linear import BitConv1D, TrainedLayer
from .functional import Packed
from .shared_activation import quantize_shared
from .shared_product import Readers, product
from .transformed import is_transforming, transformed_product


class PackedBitLinear(QuantizedLayer, nn.Linear):
    """y = x W^T + b from packed codes.

    Attributes:
        weight: uint8 (out_features, ceil(in_features * bits / 8)); neighbours along the input share a byte, the first in
            the lowest bits; a stored level is `(code - grid.lowest) / grid.step`.
        weight_scale: float32 (1, 1), (out_features, 1) or (out_features, groups); float32 even after `.to(bfloat16)`.
        bits: stored bits per weight: 1, 2, 4 or 8.
        layout: what `bits` and the grid are to the kernels.
        was_conv1d: it replaces a GPT-2 Conv1D, whose float weight is laid out (in_features, out_features).
        readers: the layers that were seen to read what this one reads; see `shared_product.py`.
    """

    weight_scale: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        quantizer: WeightQuantizer,
        activation: type[ActivationScheme],
        sub_norm: bool = False,
        was_conv1d: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate the float weight
        self.in_features, self.out_features = in_features, out_features
        self.packed_by, self.was_conv1d = quantizer, was_conv1d
        self.bits = quantizer.storage_bits
        self.grid: Grid = quantizer.grid
        self.layout = kernels.Layout(self.bits, self.grid.lowest, self.grid.step, self.grid.zero_point)
        self.source = Packed(self.bits, self.grid, in_features)
        self.readers = Readers()
        bytes_per_row = -(-in_features * self.bits // 8)
        packed = torch.zeros(out_features, bytes_per_row, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        shape = quantizer.scale_shape(out_features, in_features)
        self.weight_scale = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=device), requires_grad=False)
        empty = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty)
        self.setup_activation(activation, sub_norm, device, dtype)

    @classmethod
    def from_trained(cls, layer: TrainedLayer) -> PackedBitLinear:
        """Packs the codes that the layer's forward uses. Biases and norms are taken over, not copied."""
        packed = cls(
            layer.in_features,
            layer.out_features,
            bias=False,
            quantizer=layer.spec.weight,
            activation=layer.activation,
            was_conv1d=isinstance(layer, BitConv1D),
            device="meta",
        )
        if not layer.weight.is_meta:  # an empty layer, which a checkpoint will fill
            packed._hold(*layer.quantizer.pack(layer.matrix, layer.weight_scale))
        packed.bias = layer.bias
        packed.act_scale, packed.sub_norm = layer.act_scale, layer.sub_norm
        packed.training = layer.training
        return packed

    @torch.no_grad()
    def store(self, quantized: Quantized) -> None:
        """Replaces the weight by these codes (out_features, in_features) and their scale."""
        packed = kernels.pack(quantized.codes, self.bits, self.grid.lowest, self.grid.step)
        self._hold(packed, quantized.scale.detach().float().clone())

    def _hold(self, packed: Tensor, scale: Tensor) -> None:
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    @property
    def quantizer(self) -> WeightQuantizer:
        return self.packed_by

    def quantized_weight(self) -> Quantized:
        """Codes (out_features, in_features) and scale, unpacked."""
        return self.source.codes(self.weight, self.weight_scale)

    def forward(self, input: Tensor) -> Tensor:
        """float (..., in_features) -> (..., out_features) in the autocast dtype, else the input's.

        The gradient by the input passes straight through the quantizer, so adapters below this layer train.
        """
        self.check_input(input)
        x = input if self.sub_norm is None else self.sub_norm(input)
        if is_transforming():
            return transformed_product(x, self.quantized_weight(), self.bias, self.activation, self.act_scale)
        if not self.activation.quantizes or (torch.is_grad_enabled() and self._needs_gradient(x)):
            return self.apply_codes(x, self.weight, self.weight_scale, None, self.source)
        return self._serve(x).view(*x.shape[:-1], self.out_features)

    def _needs_gradient(self, x: Tensor) -> bool:
        return x.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def _serve(self, x: Tensor) -> Tensor:
        """float (..., in_features) -> (M, out_features): the product of `apply_codes`, without a gradient."""
        dtype, rows = kernels.autocast_dtype(x), self.activation.rows
        weight, scale, bias = self.operands()
        if rows is None:
            codes, x_scale, x_zero = quantize_shared(x, self.activation, self.act_scale)
            zero = x_zero if isinstance(x_zero, Tensor) else None
            return kernels.packed_int_linear(codes, x_scale, zero, weight, scale, bias, self.layout, dtype)
        if torch.compiler.is_compiling() or x.is_inference():  # the compiler follows no weak references
            return kernels.packed_linear(x.reshape(-1, self.in_features), weight, scale, bias, self.layout, rows, dtype)
        return product(self, x, rows, dtype)

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Packed weight, scale and bias. Read from the dict, because nn.Module's attributes cost half a microsecond each."""
        parameters = self._parameters
        weight, scale = parameters.get("weight"), parameters.get("weight_scale")
        if weight is None or scale is None:  # a replica of nn.DataParallel has plain attributes
            return self.weight, self.weight_scale, self.bias
        return weight, scale, parameters.get("bias")

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight={self.quantizer.scheme}/{self.quantizer.granularity}, bits={self.bits}, "
            f"activation={self.activation.__name__}"
        )
