"""A view of a quantized model that torch.onnx.export can trace, and what its parameters stand for. Own.

The view has the modules of the model and none of its memory: each parameter is one zero, expanded to its shape. The graph that
is traced names its initializers as the view its parameters, and they are filled one by one when the file is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...modules import QuantizedEmbedding, QuantizedLayer
from ...quantizers import Quantized
from ...surgery import detach, independent_copy, quantized_layers, quantized_tables
from ...surgery.places import Places
from ..format import Source
from .blocks import Blocks, plan
from .filled import Filled
from .operators import GatherBlockQuantized, MatMulNBits

# numbers that are cast or packed at once
_AT_ONCE = 2**22


@dataclass(frozen=True)
class Wanted:
    """What the user asked for.

    Attributes:
        dtype: of everything that is float. accuracy_level: of the products. min_bits: of the codes.
    """

    dtype: torch.dtype
    accuracy_level: int
    min_bits: int


def plans(source: Source, wanted: Wanted) -> dict[str, Blocks]:
    """Dotted name -> layout, of every quantized layer and table. A head that is tied to a table shares its layout.

    Raises ValueError that names the layer that has none.
    """
    blocks, tied = {}, {}
    for name, table in source.tables.items():
        blocks[name] = _plan(name, table, table.num_embeddings, table.embedding_dim, wanted.min_bits, False)
        tied[id(table.weight), table.quantizer] = blocks[name]
    for name, layer in source.layers.items():
        # the products with int8 activations take whole zeros only
        float_zero = wanted.accuracy_level == 0
        same = tied.get((id(layer.weight), layer.quantizer))
        sizes = layer.out_features, layer.in_features
        blocks[name] = same or _plan(name, layer, *sizes, wanted.min_bits, float_zero)
    return blocks


def _plan(
    name: str, layer: QuantizedLayer | QuantizedEmbedding, rows: int, columns: int, min_bits: int, float_zero: bool
) -> Blocks:
    try:
        return plan(layer.quantizer, rows, columns, min_bits=min_bits, float_zero=float_zero)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def traced_view(source: Source, wanted: Wanted) -> tuple[Any, dict[str, Filled]]:
    """The model of `source`, which is left as it is, with an operator in the place of each quantized layer and table.

    Returns it, on the CPU, and dotted name of a parameter -> what that stands for.
    """
    stand_ins = _StandIns(wanted.dtype)
    copies = {id(each): stand_ins.copy(name, each) for name, each in source.model.named_parameters()}
    model: Any = independent_copy(source.model, copies)
    blocks, places = plans(source, wanted), Places(model)
    for name, copied in [*quantized_layers(model)]:
        layer, how = source.layers[name], blocks[name]
        zero = None if how.zero is None else stand_ins.make(f"{name}.zero_points", (how.rows * how.count,), how.zeros)
        bias = None if layer.plain_bias is None else stand_ins.copy(f"{name}.bias", layer.plain_bias)
        parameters = *stand_ins.matrix(name, layer, how), zero, bias
        places.put(copied, MatMulNBits(how, *parameters, sub_norm=copied.sub_norm, accuracy_level=wanted.accuracy_level))
    for name, copied in quantized_tables(model):
        how = blocks[name]
        places.put(copied, GatherBlockQuantized(how, *stand_ins.matrix(name, source.tables[name], how), copied.spec))
    detach(model)
    named = model.named_parameters(remove_duplicate=False)
    return model.cpu().eval(), {name: stand_ins.filled[id(each)] for name, each in named}


class _StandIns:
    """Makes parameters without memory, and remembers what each stands for.

    Attributes:
        filled: id of a stand-in -> what it stands for.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._kept: list[nn.Parameter] = []  # so that no id is given twice
        self._shared: dict[tuple[int, Blocks], tuple[nn.Parameter, nn.Parameter]] = {}
        self._latest = _Latest()
        self.filled: dict[int, Filled] = {}

    def _add(self, filled: Filled) -> nn.Parameter:
        parameter = nn.Parameter(torch.zeros((), dtype=filled.dtype).expand(filled.shape), requires_grad=False)
        self._kept.append(parameter)
        self.filled[id(parameter)] = filled
        return parameter

    def copy(self, name: str, tensor: Tensor) -> nn.Parameter:
        """Of a tensor that is written as it is, floats in the wanted dtype."""
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
        flat = tensor.detach().reshape(-1)
        return self._add(
            Filled(name, dtype, tuple(tensor.shape), lambda: map(_to(dtype), flat.split(_AT_ONCE)), tensor.numel())
        )

    def make(self, name: str, shape: tuple[int, ...], make: Callable[[torch.dtype], Tensor]) -> nn.Parameter:
        """Of floats that belong to a packed matrix."""
        return self._add(Filled(name, self._dtype, shape, lambda: iter([make(self._dtype)]), 0))

    def matrix(self, name: str, layer: QuantizedLayer | QuantizedEmbedding, how: Blocks) -> tuple[nn.Parameter, nn.Parameter]:
        """Packed codes and scales, the same ones for tied layers."""
        key, get = (id(layer.weight), how), self._latest
        if key not in self._shared:
            rows = max(1, _AT_ONCE // how.columns)
            pieces = Filled(
                f"{name}.weight",
                torch.uint8,
                how.shape,
                lambda: map(how.pack, get(layer).codes.split(rows)),
                how.rows * how.columns,
            )
            scales = self.make(f"{name}.scales", (how.rows * how.count,), lambda dtype: _scales(name, how, get(layer), dtype))
            self._shared[key] = self._add(pieces), scales
        return self._shared[key]


def _to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype)


def _scales(name: str, how: Blocks, quantized: Quantized, dtype: torch.dtype) -> Tensor:
    try:
        return how.scales(quantized, dtype)
    except ValueError as error:
        raise ValueError(f"format 'onnx': {name}: {error}") from None


class _Latest:
    """Codes and scale of the layer that was asked for last: they are written one after the other."""

    def __init__(self) -> None:
        self._layer: Any = None
        self._quantized: Quantized | None = None

    def __call__(self, layer: QuantizedLayer | QuantizedEmbedding) -> Quantized:
        if self._layer is not layer or self._quantized is None:
            self._quantized = None  # two would take twice the memory
            self._quantized = layer.quantized_weight()
            self._layer = layer
        return self._quantized
