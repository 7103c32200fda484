"""Modules that stand for quantized layers while torch.onnx.export looks at a model: each becomes one operator. Own.

They are traced, never computed with: their operators have no body outside onnxruntime.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...modules import EmbeddingSpec, SubNorm
from .blocks import Blocks

_DOMAIN = "com.microsoft"


class MatMulNBits(nn.Module):
    """y = x W^T + b.

    Attributes:
        weight: uint8 (rows, blocks, bytes of a block). scales: (rows * blocks,). zero_points: the same, or None.
        accuracy_level: 0 for float activations, 4 for int8 ones.
    """

    def __init__(
        self,
        blocks: Blocks,
        weight: nn.Parameter,
        scales: nn.Parameter,
        zero_points: nn.Parameter | None,
        bias: nn.Parameter | None,
        *,
        sub_norm: SubNorm | None,
        accuracy_level: int,
    ) -> None:
        super().__init__()
        self.blocks, self.accuracy_level, self.sub_norm = blocks, accuracy_level, sub_norm
        self.weight, self.scales, self.zero_points, self.bias = weight, scales, zero_points, bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., rows)."""
        if self.sub_norm is not None:
            x = self.sub_norm(x)
        blocks = self.blocks
        sizes = {"K": blocks.columns, "N": blocks.rows, "bits": blocks.bits, "block_size": blocks.block}
        inputs = [x, self.weight, self.scales, *([] if self.zero_points is None else [self.zero_points])]
        y = torch.onnx.ops.symbolic(
            f"{_DOMAIN}::MatMulNBits",
            inputs,
            {**sizes, "accuracy_level": self.accuracy_level},
            dtype=x.dtype,
            shape=(*x.shape[:-1], blocks.rows),
            version=1,
        )
        return y if self.bias is None else y + self.bias


class GatherBlockQuantized(nn.Module):
    """Rows of a table.

    Attributes:
        weight: uint8 (rows, bytes of a row). scales: (rows, blocks). Both may be an output head's, in its shapes.
    """

    def __init__(self, blocks: Blocks, weight: nn.Parameter, scales: nn.Parameter, spec: EmbeddingSpec) -> None:
        super().__init__()
        self.blocks, self.spec = blocks, spec
        self.weight, self.scales = weight, scales

    def forward(self, ids: Tensor) -> Tensor:
        """int64 (...) -> (..., columns)."""
        blocks = self.blocks
        y = torch.onnx.ops.symbolic(
            f"{_DOMAIN}::GatherBlockQuantized",
            [self.weight.flatten(1), ids, self.scales.view(blocks.rows, blocks.count)],
            {"bits": blocks.bits, "block_size": blocks.block, "gather_axis": 0, "quantize_axis": 1},
            dtype=self.scales.dtype,
            shape=(*ids.shape, blocks.count * blocks.block),
            version=1,
        )
        return self.spec.scaled(y[..., : blocks.columns])
