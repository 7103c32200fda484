"""A view of a quantized model that torch.onnx.export can trace, and what its parameters stand for. Own.

The view has the modules of the model and none of its memory: each parameter is one zero, expanded to its shape. The graph that
is traced names its initializers as the view its parameters, and they are made when the file is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...modules import QuantizedEmbedding, QuantizedLayer, shape_of
from ...pages import release_mapped
from ...surgery import detach, independent_copy, quantized_layers, quantized_tables
from ...surgery.places import Places
from ..format import Source
from ..rounding import rounded
from ..stream import Planned
from .blocks import Blocks, plan
from .operators import GatherBlockQuantized, MatMulNBits

_WAY_OUT = "export with dtype='float32'"
# numbers that are cast at once
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
        blocks[name] = tied[id(table.weight), table.quantizer] = _plan(name, table, wanted.min_bits, float_zero=False)
    for name, layer in source.layers.items():
        # the products with int8 activations take whole zeros only
        same = tied.get((id(layer.weight), layer.quantizer))
        blocks[name] = same or _plan(name, layer, wanted.min_bits, float_zero=wanted.accuracy_level == 0)
    return blocks


def _plan(name: str, layer: QuantizedLayer | QuantizedEmbedding, min_bits: int, *, float_zero: bool) -> Blocks:
    try:
        return plan(layer.quantizer, *shape_of(layer), min_bits=min_bits, float_zero=float_zero)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def traced_view(source: Source, wanted: Wanted) -> tuple[Any, dict[str, Planned]]:
    """The model of `source`, which is left as it is, with an operator in the place of each quantized layer and table.

    Returns it, on the CPU, and dotted name of a parameter -> what that stands for.
    """
    stand_ins = _StandIns(wanted.dtype)
    copies = {id(each): stand_ins.copy(name, each) for name, each in source.model.named_parameters()}
    model: Any = independent_copy(source.model, copies)
    blocks, places = plans(source, wanted), Places(model)
    for name, copied in [*quantized_layers(model)]:
        layer, how = source.layers[name], blocks[name]
        zero = stand_ins.zeros(f"{name}.zero_points", how)
        bias = None if layer.plain_bias is None else stand_ins.copy(f"{name}.bias", layer.plain_bias)
        parameters = *stand_ins.matrix(name, layer, how), zero, bias
        places.put(copied, MatMulNBits(how, *parameters, sub_norm=copied.sub_norm, accuracy_level=wanted.accuracy_level))
    for name, copied in quantized_tables(model):
        how = blocks[name]
        places.put(copied, GatherBlockQuantized(how, *stand_ins.matrix(name, source.tables[name], how), copied.spec))
    detach(model)
    named = model.named_parameters(remove_duplicate=False)
    return model.cpu().eval(), {name: stand_ins.planned[id(each)] for name, each in named}


def _cast(name: str, parts: Iterable[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    for part in parts:
        yield rounded(name, part, dtype, _WAY_OUT)
        release_mapped(part)


class _StandIns:
    """Makes parameters without memory, and remembers what each stands for.

    Attributes:
        planned: id of a stand-in -> what it stands for.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._kept: list[nn.Parameter] = []  # so that no id is given twice
        self._shared: dict[tuple[int, Blocks], tuple[nn.Parameter, nn.Parameter]] = {}
        self.planned: dict[int, Planned] = {}

    def add(self, planned: Planned) -> nn.Parameter:
        parameter = nn.Parameter(torch.zeros((), dtype=planned.dtype, device="cpu").expand(planned.shape), requires_grad=False)
        self._kept.append(parameter)
        self.planned[id(parameter)] = planned
        return parameter

    def copy(self, name: str, tensor: Tensor) -> nn.Parameter:
        """Of a tensor that is written as it is, floats in the wanted dtype."""
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype

        def parts() -> Tensor | Iterator[Tensor]:
            if tensor.dim() == 0:
                return rounded(name, tensor, dtype, _WAY_OUT)
            rows = max(1, _AT_ONCE * len(tensor) // max(1, tensor.numel()))
            return _cast(name, tensor.detach().split(rows), dtype)

        return self.add(Planned(name, dtype, tuple(tensor.shape), parts, tensor.numel()))

    def zeros(self, name: str, how: Blocks) -> nn.Parameter | None:
        """Of a layer; None where the operator's own serves."""
        if how.zero is None:
            return None
        return self.add(Planned(name, self._dtype, (how.rows * how.count,), lambda: how.zeros(self._dtype), 0))

    def matrix(self, name: str, layer: QuantizedLayer | QuantizedEmbedding, how: Blocks) -> tuple[nn.Parameter, nn.Parameter]:
        """Packed codes and scales, the same ones for tied layers."""

        def scales() -> Iterator[Tensor]:
            try:
                yield from (how.scales(part, self._dtype) for part in Source.blocks(layer))
            except ValueError as error:
                raise ValueError(f"format 'onnx': {name}: {error}") from None

        key = id(layer.weight), how
        if key not in self._shared:
            codes = Planned(
                f"{name}.weight", torch.uint8, how.shape, lambda: map(how.pack, Source.blocks(layer)), how.rows * how.columns
            )
            of_blocks = Planned(f"{name}.scales", self._dtype, (how.rows * how.count,), scales, 0)
            self._shared[key] = self.add(codes), self.add(of_blocks)
        return self._shared[key]
