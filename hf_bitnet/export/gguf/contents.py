"""What stands in a tensor of the file: codes and scales of a layer, or plain floats; made some rows at a time. Own.

Every part can be had as bytes, which are written, and as the values that a reader has to find.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...modules import QuantizedEmbedding, QuantizedLayer, shape_of
from ...pages import release_mapped
from ...quantizers import Quantized
from ..format import Source
from ..rounding import rounded
from .blocks import Steps
from .kinds import Kind

# the scale of a normal half-precision number is off by 2^-11 at most
MOST_ROUNDING = 2.0**-10
# weights that are encoded at once: what they pass through stays in the cache
_AT_ONCE = 1 << 21


class Part(Protocol):
    """Some rows."""

    def bytes(self) -> Tensor:
        """uint8."""
        ...

    def values(self) -> Tensor:
        """float32 (rows, columns), or (n,) of a vector."""
        ...


@dataclass(frozen=True)
class CodesPart:
    """name: of the layer. levels: int8 (R, K). d: (R, number of scales of a row), in the kind's dtype."""

    name: str
    kind: Kind
    steps: Steps
    levels: Tensor
    d: Tensor

    def bytes(self) -> Tensor:
        if self.kind.encode is None:
            return _as_bytes(
                rounded(self.name, self.values(), self.kind.dtype, "export with kind='F32', or with format='dense'")
            )
        blocks = self.levels.shape[1] // self.kind.block
        return self.kind.encode(self.levels, self.d.repeat_interleave(blocks // self.d.shape[1], dim=1), self.steps)

    def values(self) -> Tensor:
        groups = self.levels.float().unflatten(1, (self.d.shape[1], -1))
        return groups.mul_(self.d.float().unsqueeze(2)).flatten(1)


@dataclass(frozen=True)
class Codes:
    """The weight of a quantized layer or table.

    Attributes:
        name: of the layer. steps: the levels that `kind` stores.
        order: int64 (N,), the row of the layer that stands in each row of the file; None leaves them as they are.
    """

    name: str
    layer: QuantizedLayer | QuantizedEmbedding
    kind: Kind
    steps: Steps
    order: Tensor | None = None

    def parts(self, weights: int = _AT_ONCE) -> Iterator[CodesPart]:
        for block in self._blocks():
            rows, columns = block.codes.shape
            levels = self._levels(block)
            scale = self._scale(block, levels).expand(rows, -1)
            height = max(1, weights // columns)
            for start in range(0, rows, height):
                part = slice(start, start + height)
                yield CodesPart(self.name, self.kind, self.steps, levels[part], scale[part])

    def tail(self) -> Tensor:
        """uint8 (kind.tail,): the one scale of the tensor in float32, then zeros."""
        out = torch.zeros(self.kind.tail, dtype=torch.uint8, device="cpu")
        if self.kind.tail:
            scale = next(Source.blocks(self.layer)).scale.detach().float().cpu().reshape(1)
            out[:4] = (scale / self.steps.factor).view(torch.uint8)
        return out

    def _blocks(self) -> Iterator[Quantized]:
        if self.order is None:
            yield from Source.blocks(self.layer)
            return
        # rows move within a head only, but these matrices are the small ones of a model
        whole = self.layer.quantized_weight()
        order = self.order.to(whole.codes.device)
        scale = whole.scale if len(whole.scale) == 1 else whole.scale[order]
        yield Quantized(whole.codes[order], scale, whole.zero_point)

    def _levels(self, block: Quantized) -> Tensor:
        factor, zero = self.steps.factor, float(block.zero_point)
        codes = block.codes.detach().cpu()
        if factor == 1 and zero == 0:
            return codes
        return codes * factor - int(zero * factor)

    def _scale(self, block: Quantized, levels: Tensor) -> Tensor:
        """In the kind's dtype. Raises ValueError where that is another number."""
        exact = block.scale.detach().float().cpu() / self.steps.factor
        scale = exact.to(self.kind.scale_dtype)
        wrong = (scale.float() - exact).abs() > exact.abs() * MOST_ROUNDING
        if wrong.any():
            # of a group of zeros no scale matters
            used = levels.reshape(exact.numel(), -1).any(dim=1).view_as(exact)
            if (wrong & used).any():
                worst = exact[wrong & used].abs().max().item()
                raise ValueError(
                    f"{self.name}: its scale {worst:.3g} is no number of half precision (6.1e-05 .. 65504), which "
                    f"{self.kind.name} needs; export with kind='F32', or with format='dense'"
                )
        return scale


@dataclass(frozen=True)
class FloatsPart:
    tensor: Tensor

    def bytes(self) -> Tensor:
        return _as_bytes(self.tensor)

    def values(self) -> Tensor:
        return self.tensor.float()


@dataclass(frozen=True)
class Floats:
    """A tensor that is not quantized, rounded to the kind's dtype.

    Attributes:
        name: of the parameter. order: as of `Codes`.
        offset, factor: it stands for (tensor + offset) * factor, in float32.
    """

    name: str
    tensor: Tensor
    kind: Kind
    order: Tensor | None = None
    offset: float = 0.0
    factor: float = 1.0

    def parts(self, weights: int = _AT_ONCE) -> Iterator[FloatsPart]:
        tensor = self.tensor if self.order is None else self.tensor[self.order.to(self.tensor.device)]
        rows = max(1, weights // max(1, tensor[:1].numel()))
        for part in tensor.detach().split(rows):
            values = part.cpu()
            if (self.offset, self.factor) != (0.0, 1.0):
                values = (values.float() + self.offset) * self.factor
            yield FloatsPart(rounded(self.name, values, self.kind.dtype, "export with other='f32'"))
            release_mapped(part)

    def tail(self) -> Tensor:
        return torch.zeros(0, dtype=torch.uint8, device="cpu")


def shape(content: Codes | Floats) -> tuple[int, ...]:
    return shape_of(content.layer) if isinstance(content, Codes) else tuple(content.tensor.shape)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
