"""The two ways in which mlx-lm stores a quantized weight, as what the format writes, describes and compares. Own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import kernels
from ..config import NATIVE_METHOD
from ..modules import QuantizedLayer, shape_of
from ..modules.native import pack_rows
from ..surgery import kept_for_native
from .affine import GROUP_SIZES, Affine, Layer, affine_of, biases, scales, values, words
from .format import Source
from .mlx_check import UNPACKED_ROWS, compare_levels
from .native_check import compare_codes
from .native_problems import native_problems
from .report import Check
from .rounding import rounded
from .scales import scale_of
from .stream import Planned


class Layout:
    """One of the two. `layers`: name -> layer or table, of all that have tensors of their own."""

    def problems(self, source: Source, layers: Mapping[str, Layer]) -> list[str]:
        """Why it cannot hold the model."""
        raise AssertionError("abstract")

    def notes(self, layers: Mapping[str, Layer]) -> list[str]:
        raise AssertionError("abstract")

    def tensors(self, name: str, layer: Layer) -> list[Planned]:
        """What is written of a weight."""
        raise AssertionError("abstract")

    def described(self, layer: Layer) -> tuple[str, str]:
        """Its kind, and why it is another than was asked for."""
        raise AssertionError("abstract")

    def settings(self, model: PreTrainedModel, layers: Mapping[str, Layer]) -> dict[str, Any]:
        """What config.json says of it."""
        raise AssertionError("abstract")

    def check(self, layers: Mapping[str, Layer], folder: Path) -> Check:
        """Codes in the files, read without mlx."""
        raise AssertionError("abstract")

    def holds(self, layer: Layer) -> bool:
        """Whether the layer is quantized in mlx; else it is stored as floats."""
        return True

    def held_by_mlx(self, layer: Layer) -> Iterator[Tensor]:
        """What mlx-lm's layer holds; see `mlx_check.mlx_checks`."""
        raise AssertionError("abstract")

    def values(self, layer: Layer) -> Tensor:
        """float32 (N, K) as mlx computes them."""
        raise AssertionError("abstract")


@dataclass(frozen=True)
class AffineLayout(Layout):
    """Levels and groups. A weight that no group size divides is stored as floats.

    Attributes:
        dtype: of scales, biases and floats. group_size: the largest; None for any. min_bits: the least bits of a level.
    """

    dtype: torch.dtype
    group_size: int | None
    min_bits: int

    def _affine(self, layer: Layer) -> Affine | None:
        return affine_of(layer, self.group_size or GROUP_SIZES[0], self.min_bits)

    def problems(self, source: Source, layers: Mapping[str, Layer]) -> list[str]:
        if any(self._affine(layer) is not None for layer in layers.values()):
            return []
        inputs = sorted({_run(layer) for layer in layers.values()})
        return [f"no weight has groups of {GROUP_SIZES[-1]} inputs with one scale, here are {inputs}; export as 'dense'"]

    def notes(self, layers: Mapping[str, Layer]) -> list[str]:
        used = [each for layer in layers.values() if (each := self._affine(layer)) is not None]
        return (
            ["weights of 1 bit need mlx 0.32; min_bits=2 serves earlier ones"] if any(each.bits == 1 for each in used) else []
        )

    def tensors(self, name: str, layer: Layer) -> list[Planned]:
        affine, dtype, (rows, columns) = self._affine(layer), self.dtype, shape_of(layer)
        if affine is None:
            shape, count = (rows, columns), rows * columns
            return [Planned(f"{name}.weight", dtype, shape, lambda: self._floats(name, layer), count)]
        shape, groups = (rows, columns * affine.bits // 32), (rows, columns // affine.group_size)
        return [
            Planned(f"{name}.weight", torch.uint32, shape, lambda: words(layer, affine), rows * columns),
            Planned(f"{name}.scales", dtype, groups, lambda: self._checked(name, layer, affine, scales), 0),
            Planned(f"{name}.biases", dtype, groups, lambda: self._checked(name, layer, affine, biases), 0),
        ]

    def _floats(self, name: str, layer: Layer) -> Tensor:
        return rounded(f"format 'mlx': {name}", layer.quantized_weight().dequantize(), self.dtype)

    def _checked(self, name: str, layer: Layer, affine: Affine, make: Callable[[Layer, Affine, torch.dtype], Tensor]) -> Tensor:
        """The scales or biases; refused where the dtype cannot hold them."""
        rounded(f"format 'mlx': the scale of {name}", make(layer, affine, torch.float32), self.dtype, is_scale=True)
        return make(layer, affine, self.dtype)

    def described(self, layer: Layer) -> tuple[str, str]:
        affine, words = self._affine(layer), f"does not divide the {_run(layer)} inputs that share a scale"
        if affine is None:
            return str(self.dtype).removeprefix("torch."), f"{GROUP_SIZES[-1]} {words}"
        why = "" if self.group_size in (None, affine.group_size) else f"{self.group_size} {words}"
        return f"{affine.bits}-bit in groups of {affine.group_size}", why

    def settings(self, model: PreTrainedModel, layers: Mapping[str, Layer]) -> dict[str, Any]:
        used = {name: each for name, layer in layers.items() if (each := self._affine(layer)) is not None}
        said = {name: (each.group_size, each.bits) for name, each in used.items()}
        usual = Counter(said.values()).most_common(1)[0][0]
        others = {name: _words(*each) for name, each in said.items() if each != usual}
        quantization = {**_words(*usual), **others}
        return {"quantization": quantization, "quantization_config": quantization}

    def check(self, layers: Mapping[str, Layer], folder: Path) -> Check:
        expected = {name: (layer, each) for name, layer in layers.items() if (each := self._affine(layer)) is not None}
        return compare_levels(expected, folder)

    def holds(self, layer: Layer) -> bool:
        return self._affine(layer) is not None

    def held_by_mlx(self, layer: Layer) -> Iterator[Tensor]:
        affine = self._affine(layer)
        assert affine is not None
        first = next(Source.blocks(layer)).codes[:UNPACKED_ROWS].cpu()
        yield from words(layer, affine)
        yield kernels.pack(first, 8, affine.lowest, layer.quantizer.grid.step)

    def values(self, layer: Layer) -> Tensor:
        affine = self._affine(layer)
        assert affine is not None
        return values(layer, affine, self.dtype)


@dataclass(frozen=True)
class RowLayout(Layout):
    """The layout of transformers' own method `bitnet`.

    Attributes:
        dtype: of the scale, which has to be that of the activations.
        multiplies: mlx-lm multiplies by the stored scale, or divides.
        everywhere: mlx-lm's model has no other layers between embeddings and head.
    """

    dtype: torch.dtype
    multiplies: bool
    everywhere: bool

    def problems(self, source: Source, layers: Mapping[str, Layer]) -> list[str]:
        found = native_problems(source, online=False, packed=True)
        kept = [name for name in kept_for_native(source.model) if name.startswith("layers.")] if self.everywhere else []
        return found + [
            f"{name} is kept, and mlx-lm's {source.model.config.model_type} has no plain layer there" for name in kept[:1]
        ]

    def notes(self, layers: Mapping[str, Layer]) -> list[str]:
        return ["mlx-lm runs this layout on Apple GPUs only"]

    def tensors(self, name: str, layer: Layer) -> list[Planned]:
        rows, columns = shape_of(layer)
        return [
            Planned(f"{name}.weight", torch.uint8, (rows // 4, columns), lambda: self._bytes(layer), rows * columns),
            Planned(f"{name}.weight_scale", self.dtype, (1,), lambda: self._scale(layer, name), 0),
        ]

    def _scale(self, layer: Layer, name: str = "") -> Tensor:
        scale = scale_of(layer).detach().float().reshape(1)
        exact = scale if self.multiplies else scale.reciprocal()
        return rounded(f"format 'mlx': the scale of {name}", exact, self.dtype, is_scale=True)

    def described(self, layer: Layer) -> tuple[str, str]:
        return "2-bit", ""

    def settings(self, model: PreTrainedModel, layers: Mapping[str, Layer]) -> dict[str, Any]:
        kept = kept_for_native(model)  # mlx-lm compares whole names
        return {
            "quantization_config": {
                "quant_method": NATIVE_METHOD,
                "linear_class": "autobitlinear" if self.multiplies else "bitlinear",
                "quantization_mode": "offline",
                "modules_to_not_convert": sorted({*kept, *(f"{model.base_model_prefix}.{name}" for name in kept)}),
                "use_rms_norm": False,
            }
        }

    def check(self, layers: Mapping[str, Layer], folder: Path) -> Check:
        named = {f"{name}.weight": layer for name, layer in layers.items() if isinstance(layer, QuantizedLayer)}
        return compare_codes(named, folder)

    def held_by_mlx(self, layer: Layer) -> Iterator[Tensor]:
        yield self._bytes(layer)

    def _bytes(self, layer: Layer) -> Tensor:
        return pack_rows(layer.quantized_weight().codes)

    def values(self, layer: Layer) -> Tensor:
        scale = self._scale(layer).float()
        return layer.quantized_weight().levels(torch.float32) * (scale if self.multiplies else 1 / scale)


def _run(layer: Layer) -> int:
    """Inputs that share a scale."""
    rows, columns = shape_of(layer)
    return columns // layer.quantizer.scale_shape(rows, columns)[1]


def _words(group_size: int, bits: int) -> dict[str, Any]:
    return {"group_size": group_size, "bits": bits, "mode": "affine"}
